"""Training speed of each preset against its matrix products alone and against peers.

    python benchmarks/training.py 125m 16m --rounds 3 --nanogpt ../nanoGPT

Each contender runs in its own process, trains on random tokens with the same sizes (rows, context,
layers, widths) and reports its median step time. The contenders take turns and the table shows
medians over rounds, so a machine whose speed drifts affects them all alike. Contenders:

    products        the model's matrix products alone, forward and backward, in the training dtype
    ours            the training step as `sota train` runs it: dropout, smoothing, clipping, AdamW
    trainer         transformers' Trainer and LlamaForCausalLM, bf16 where the device supports it
    trainer+compile the same with torch_compile
    nanogpt         its train.py as shipped, with and without --compile (--nanogpt: a checkout)

On a machine with a GPU the same command measures the GPU.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = {"tiny": 8, "16m": 8, "125m": 4, "250m": 2}  # windows per step on a CPU
PEERS = ("trainer", "trainer+compile", "nanogpt", "nanogpt+compile")


def products(preset: str, rows: int, steps: int) -> float:
    """Seconds for all matrix products of a step: three per matrix and for the head.

    The vocabulary is rounded up to whole cache lines, which makes the products faster.
    """
    import torch

    from sota_transformer.presets import PRESETS
    from sota_transformer.runtime import Runtime

    config = PRESETS[preset]()
    model, runtime = config.model, Runtime.detect(config.run, config.model.parameter_count)
    width, tokens = model.d_model, rows * model.seq_len
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    shapes = [(width, qkv), (width, width), (width, 2 * model.d_ff), (model.d_ff, width)]
    shapes = shapes * model.layers + [(width, -(-model.vocab_size // 64) * 64)]

    def operand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=runtime.dtype, device=runtime.device)

    operands = {
        (i, o): (operand(tokens, i), operand(o, i), operand(tokens, o)) for i, o in set(shapes)
    }

    def step() -> None:
        for shape in shapes:
            x, weight, gradient = operands[shape]
            x @ weight.t()
            gradient @ weight
            gradient.t() @ x
        runtime.synchronize()

    return timed(step, steps)


def ours(preset: str, rows: int, steps: int, recipe: Any = "seed") -> float:
    """Seconds per training step."""
    from sota_transformer.plan import step_seconds
    from sota_transformer.presets import PRESETS
    from sota_transformer.runtime import Runtime

    config = PRESETS[preset](recipe)
    runtime = Runtime.detect(config.run, config.model.parameter_count)
    return step_seconds(config, runtime, rows, steps)[0]


def llama(preset: str) -> Any:
    """The preset as a LlamaConfig of transformers."""
    from transformers import LlamaConfig

    from sota_transformer.presets import PRESETS

    model = PRESETS[preset]().model
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.seq_len,
        tie_word_embeddings=True,
        use_cache=False,
    )


def trainer(preset: str, rows: int, steps: int, compiled: bool) -> float:
    """Seconds per step of transformers' Trainer on the same Llama."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from sota_transformer.runtime import activations

    shape = llama(preset)
    dtype, _ = activations("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokens = torch.randint(shape.vocab_size, (rows * (steps + 3), shape.max_position_embeddings))
    taken: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=rows,
            max_steps=steps + 3,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            torch_compile=compiled,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(
            LlamaForCausalLM(shape),
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            callbacks=[Clock()],
        ).train()
    return statistics.median(taken[3:])


def nanogpt(preset: str, rows: int, steps: int, compiled: bool, checkout: Path) -> float:
    """Seconds per step of nanoGPT's train.py, parsed from its output."""
    import numpy as np
    import torch

    from sota_transformer.presets import PRESETS

    model = PRESETS[preset]().model
    data = checkout / "data" / "sota-bench"
    data.mkdir(exist_ok=True)
    ids = np.random.default_rng(0).integers(0, 50257, 500_000).astype(np.uint16)
    for split in ("train", "val"):
        ids.tofile(data / f"{split}.bin")
    options = {
        "dataset": "sota-bench",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "compile": compiled,
        "batch_size": rows,
        "gradient_accumulation_steps": 1,
        "block_size": model.seq_len,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_embd": model.d_model,
        "max_iters": steps + 3,
        "eval_iters": 1,
        "eval_interval": 10**6,
        "log_interval": 1,
        "always_save_checkpoint": False,
    }
    command = [sys.executable, "train.py", *(f"--{k}={v}" for k, v in options.items())]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    taken = [float(found) / 1000 for found in re.findall(r"time ([0-9.]+)ms", done.stdout)]
    return statistics.median(taken[3:])


def timed(step: Callable[[], None], steps: int) -> float:
    """Median seconds of `steps` calls, after two warm-up calls."""
    taken = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def child(options: argparse.Namespace) -> None:
    """Run one contender; print its seconds per step and peak memory."""
    preset, name, compiled = options.presets[0], options.child, options.child.endswith("+compile")
    arguments = (preset, options.rows, options.steps)
    if name.startswith("trainer"):
        seconds = trainer(*arguments, compiled)
    elif name.startswith("nanogpt"):
        seconds = nanogpt(*arguments, compiled, options.nanogpt.resolve())
    elif name == "products":
        seconds = products(*arguments)
    else:
        seconds = ours(*arguments, "fast" if name == "fast" else "seed")
    print(json.dumps({"seconds": seconds, "memory": peak_memory(name)}))


def peak_memory(name: str) -> float:
    """Peak memory in GB, of the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    who = resource.RUSAGE_CHILDREN if name.startswith("nanogpt") else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit / 1e9


def run(preset: str, name: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Run one contender in its own process and print its time; empty if it failed."""
    rows = options.rows or ROWS[preset]
    command = [sys.executable, __file__, preset, "--child", name, "--rows", str(rows)]
    command += ["--steps", str(options.steps)]
    command += ["--nanogpt", str(options.nanogpt)] if options.nanogpt else []
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        print(f"{preset} {name} failed:\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return []
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{preset} {name}: {result['seconds']:.3f} s per step", file=sys.stderr, flush=True)
    return [result]


def compare(preset: str, options: argparse.Namespace) -> None:
    """Run all contenders in turn and print the table."""
    from sota_transformer.presets import PRESETS

    names = ["products", "ours", *(name for name in PEERS if options.nanogpt or "nano" not in name)]
    names = [name for name in names if not options.only or name in options.only]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name] += run(preset, name, options)
    found = {name: results for name, results in found.items() if results}
    if not found:
        sys.exit(f"{preset}: nothing to compare")
    model, rows = PRESETS[preset]().model, options.rows or ROWS[preset]
    tokens = rows * model.seq_len
    matrices = model.parameter_count - (2 * model.layers + 1) * model.d_model
    own = statistics.median(row["seconds"] for row in found.get("ours", next(iter(found.values()))))
    print(f"{preset}: {rows} x {model.seq_len} tokens per step, {options.rounds} rounds")
    print(f"{'':<16} {'tokens/s':>9} {'min-max':>15} {'TFLOP/s':>8} {'peak GB':>17} {'ours x':>7}")
    for name, results in found.items():
        seconds = [row["seconds"] for row in results]
        middle = statistics.median(seconds)
        span = f"{tokens / max(seconds):,.0f}-{tokens / min(seconds):,.0f}"
        rate = 6e-12 * matrices * tokens / middle
        memory = sorted(row["memory"] for row in results)
        peak = f"{statistics.median(memory):.2f} ({memory[0]:.2f}-{memory[-1]:.2f})"
        print(
            f"{name:<16} {tokens / middle:>9,.0f} {span:>15} {rate:>8.3f} "
            f"{peak:>17} {middle / own:>7.2f}",
            flush=True,
        )


def main() -> None:
    """Compare, or run as one of the contenders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="*", default=["125m", "16m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rows", type=int, default=0, help="windows per step; 0: by preset")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--only", nargs="*", help="contenders to run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    for preset in options.presets:
        compare(preset, options)


if __name__ == "__main__":
    main()
