"""Held-out loss after equal training time: same text, machine, model size and windows per step.

    sota prepare books.jsonl.zst --out data/books
    python benchmarks/budget.py --data data/books --folder /tmp/budget --nanogpt ../nanoGPT

First the steps of all contenders are timed in turn. Then each trains alone for as many steps as
fill `--minutes`, and the same code evaluates all of them on the same windows of the validation
split. Startup and compilation come on top and are included in `whole`. Contenders:

    fast, seed      `sota train 16m` with these recipes, unchanged
    nanogpt RATE    its train.py as it runs on a CPU, with its own AdamW and cosine
    trainer RATE    transformers' Trainer, compiled, with nanoGPT's AdamW and cosine on our Llama

The peers have no recipe for this model size and run length: each is tried with every learning rate
of `--rates` (the first is nanoGPT's for GPT-2 small) and a twentieth of the run as warm-up.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from training import llama, run

PRESET, ROWS, WARMUP = "16m", 4, 0.05


def steps_in(options: argparse.Namespace) -> dict[str, int]:
    """Steps that fill the minutes for each contender, from the median of three timed steps."""
    timing = argparse.Namespace(rows=ROWS, steps=3, nanogpt=options.nanogpt)
    kinds = ["ours", "fast", *(["nanogpt"] if options.nanogpt else []), "trainer+compile"]
    found = {kind: run(PRESET, kind, timing) for kind in kinds}
    return {
        {"ours": "seed", "trainer+compile": "trainer"}.get(kind, kind): max(
            20, int(options.minutes * 60 / timed[0]["seconds"])
        )
        for kind, timed in found.items()
        if timed
    }


def ours(recipe: str, steps: int, out: Path, options: argparse.Namespace) -> list[str]:
    """The command for one recipe, with validation at the end only."""
    command = [sys.executable, "-m", "sota_transformer", "train", PRESET, "--recipe", recipe]
    command += ["--data", str(options.data), "--out", str(out), "--steps", str(steps)]
    command += ["--train.batch-rows", str(ROWS), "--train.eval-every", "0"]
    return [*command, "--train.sample-every", "0"]


def nanogpt(rate: float, steps: int, out: Path, options: argparse.Namespace) -> list[str]:
    """The nanoGPT command, with everything that depends on the length of the run."""
    from sota_transformer.presets import PRESETS

    model = PRESETS[PRESET]().model
    given: dict[str, Any] = {
        "dataset": options.folder.resolve() / "bins",  # an absolute path overrides data/
        "out_dir": out,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "compile": torch.cuda.is_available(),
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_embd": model.d_model,
        "block_size": model.seq_len,
        "batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "max_iters": steps,
        "lr_decay_iters": steps,
        "warmup_iters": int(WARMUP * steps),
        "learning_rate": rate,
        "min_lr": rate / 10,
        "eval_interval": steps,
        "eval_iters": 1,
    }
    return [sys.executable, "train.py", *(f"--{name}={value}" for name, value in given.items())]


def trainer(rate: float, steps: int, out: Path, bins: Path) -> None:
    """Train the Llama with the Trainer and save it."""
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    from sota_transformer.runtime import activations

    shape, cuda = llama(PRESET), torch.cuda.is_available()
    dtype, _ = activations("auto", torch.device("cuda" if cuda else "cpu"))
    tokens = np.fromfile(bins / "train.bin", np.uint16).astype(np.int64)
    size = shape.max_position_embeddings
    chosen = np.random.default_rng(0).integers(len(tokens) - size, size=steps * ROWS)
    rows = [torch.from_numpy(tokens[start : start + size]) for start in chosen]
    given = TrainingArguments(
        str(out),
        per_device_train_batch_size=ROWS,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=int(WARMUP * steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        torch_compile=True,
        use_cpu=not cuda,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = LlamaForCausalLM(shape)
    Trainer(model, given, train_dataset=[{"input_ids": x, "labels": x} for x in rows]).train()
    model.save_pretrained(out)


def logits_of(name: str, out: Path, checkout: Path | None) -> Callable[[torch.Tensor], Any]:
    """(B, T) ids -> (B, T, V) logits of the model that a contender trained."""
    cpu = torch.device("cpu")
    if name.startswith("nanogpt"):
        sys.path.insert(0, str(checkout))
        from model import GPT, GPTConfig  # type: ignore[import-not-found]

        saved = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=False)
        network = GPT(GPTConfig(**saved["model_args"])).eval()
        state = saved["model"].items()
        network.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in state})
        return lambda ids: network(ids, ids)[0]  # without targets: last position only
    if name.startswith("trainer"):
        from transformers import LlamaForCausalLM

        loaded = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        return lambda ids: loaded(ids).logits
    from sota_transformer.training import checkpoint

    model, _, _ = checkpoint.load_model(out, cpu, None, print)
    return lambda ids: model.logits(model(ids))


@torch.no_grad()
def nats(logits: Callable[[torch.Tensor], Any], windows: np.ndarray) -> tuple[float, float]:
    """Mean loss per token over windows (N, T + 1), and its standard error across windows."""
    losses = []
    for row in torch.from_numpy(windows.astype(np.int64)):
        losses.append(float(F.cross_entropy(logits(row[None, :-1])[0].float(), row[1:])))
    return float(np.mean(losses)), float(np.std(losses, ddof=1) / len(losses) ** 0.5)


def contest(options: argparse.Namespace) -> None:
    """Time, train and evaluate; print one line per contender."""
    bins = options.folder / "bins"
    options.folder.mkdir(parents=True, exist_ok=True)
    ours_ = [sys.executable, "-m", "sota_transformer"]
    export = [*ours_, "data", str(options.data), "--export-bin", str(bins)]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    held = np.memmap(bins / "val.bin", np.uint16, "r")
    size = llama(PRESET).max_position_embeddings
    starts = np.linspace(0, len(held) - size - 1, options.windows).astype(int)
    windows = np.stack([held[start : start + size + 1] for start in starts])
    print(f"{options.minutes:g} minutes, {ROWS} x {size} tokens per step, {len(windows)} windows")
    print(f"{'':<18} {'steps':>6} {'tokens':>9} {'whole':>7} {'nats':>7} {'+-':>6}", flush=True)
    for kind, steps in steps_in(options).items():
        rates = options.rates if kind in ("nanogpt", "trainer") else [0.0]
        for rate in rates:
            name = f"{kind} {rate:g}" if rate else kind
            out = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=options.folder)).resolve()
            where = None
            if kind == "nanogpt":
                command, where = nanogpt(rate, steps, out, options), options.nanogpt
            elif kind == "trainer":
                command = [sys.executable, __file__, "--child", str(out), "--rates", str(rate)]
                command += ["--steps", str(steps), "--folder", str(options.folder)]
            else:
                out = out / "run"
                command = ours(kind, steps, out, options)
            began = time.perf_counter()
            subprocess.run(command, cwd=where, check=True, stdout=subprocess.DEVNULL)
            whole = time.perf_counter() - began
            loss, error = nats(logits_of(name, out, options.nanogpt), windows)
            tokens = steps * ROWS * size
            print(f"{name:<18} {steps:>6} {tokens:>9,} {whole:>6.0f}s {loss:>7.4f} {error:>6.4f}",
                  flush=True)  # fmt: skip


def main() -> None:
    """Run the contest, or run as its Trainer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="prepared data")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sota-budget"))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[6e-4, 1.8e-3])
    parser.add_argument("--windows", type=int, default=128, help="validation windows to evaluate")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        trainer(options.rates[0], options.steps, options.child, options.folder / "bins")
    else:
        contest(options)


if __name__ == "__main__":
    main()
