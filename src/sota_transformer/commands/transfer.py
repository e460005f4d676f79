"""`sota export` and `sota import`: a run becomes a model of other programs, and the other way."""

import dataclasses
import glob
import json
import shlex
import shutil
from pathlib import Path

from sota_transformer import durable
from sota_transformer.commands.common import Opened, check, open_model
from sota_transformer.config import VOCAB, Data, Optim, Run, RunConfig, Train
from sota_transformer.data.shards import load_manifest
from sota_transformer.errors import IO_FAILED, LOCKED, SotaError
from sota_transformer.inference.export import (
    probe_logits,
    proof,
    prove_huggingface,
    write_huggingface,
)
from sota_transformer.inference.folder import read_model
from sota_transformer.model.transformer import Transformer
from sota_transformer.options import Export, Import
from sota_transformer.presets import PRESETS, command
from sota_transformer.report import validations
from sota_transformer.training import checkpoint
from sota_transformer.training.guard import Guard
from sota_transformer.training.runlog import read_metrics
from sota_transformer.words import counted, perplexity


def run_export(options: Export) -> int:
    """Write, read back, compare, and only then let the folder appear."""
    check(
        {
            "--dtype q8_0 needs --format gguf": options.dtype != "q8_0" or options.format == "gguf",
            **_free(options.out),
        }
    )
    opened = open_model(options.run, "cpu", options.step)
    model, out = opened.model, options.out.absolute()
    size = 4 * model.config.parameter_count
    if shutil.disk_usage(_existing(out)).free < 1.2 * size:
        raise SotaError(f"{out}: needs up to {1.2 * size / 1e6:,.0f} MB of free disk", IO_FAILED)
    durable.make_folder(out.parent)
    for left in out.parent.glob(f".tmp-{glob.escape(out.name)}-????????"):  # by a killed export
        durable.remove(left)
    with durable.commit_folder(out, {"format": options.format, "dtype": options.dtype}) as writer:
        if options.format == "gguf":
            proofs = _gguf(writer, opened, options.dtype)
        else:
            write_huggingface(writer, model, options.dtype, _card(opened, options.dtype))
            proofs = prove_huggingface(writer.path, model, options.dtype)
    print("\n".join(proofs))
    step = "" if opened.step is None else f", step {opened.step}"
    print(f"{out}: {options.format}, {options.dtype}{step}")
    return 0


def _free(out: Path, but: tuple[str, ...] = ()) -> dict[str, bool]:
    """The rules that the folder to write must keep: it is empty, but for what begins so."""
    if out == Path():
        return {"name the folder to write, not the current one: --out FOLDER": False}
    taken = out.is_symlink() or (out.exists() and not out.is_dir())
    taken |= out.is_dir() and not all(path.name.startswith(but) for path in out.iterdir())
    return {
        f"{out} exists already; give another --out": not taken,
        f"{out.absolute()} is not UTF-8, as safetensors needs it; give another --out": (
            checkpoint.is_utf8(out)
        ),
    }


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _gguf(writer: durable.FolderWriter, opened: Opened, dtype: str) -> list[str]:
    """The file, a Modelfile for Ollama, and the proof."""
    try:
        from sota_transformer.inference import gguf_file
    except ImportError as error:
        raise SotaError(
            f"--format gguf needs the package {error.name}: pip install 'sota-transformer[gguf]'"
        ) from error
    aside = writer.path / ".part"
    gguf_file.write_gguf(aside, opened.model, dtype, opened.name)
    with writer.create(gguf_file.NAME) as file, aside.open("rb") as source:
        shutil.copyfileobj(source, file, 1 << 22)
    aside.unlink()
    writer.write("Modelfile", gguf_file.modelfile(opened.model.config).encode())
    back = gguf_file.read_gguf(writer.path / gguf_file.NAME, opened.model.config)
    return [proof("gguf", probe_logits(opened.model), probe_logits(back), dtype)]


def _card(opened: Opened, dtype: str) -> str:
    """The model card: what it is, what it was trained on, how good it is, how to load it."""
    c = opened.model.config
    kind = "Qwen3" if c.qk_norm else "Llama"
    lines = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [sota-transformer]\n---",
        f"# {opened.name}",
        f"A {kind} language model of {c.parameter_count:,} parameters, written by "
        f"`sota_transformer`; GPT-2's tokenizer and one pad token. It continues text; it was "
        "not tuned to follow instructions, and it repeats what its training text says.",
        "| layers | width | heads | key/value heads | feed-forward | context | vocabulary |\n"
        "|---|---|---|---|---|---|---|\n"
        f"| {c.layers} | {c.d_model} | {c.heads} | {c.kv_heads} | {c.d_ff} | {c.seq_len} | "
        f"{c.vocab_size:,} |",
    ]
    if opened.config is not None:
        seen = opened.step or 0
        trainer = json.loads(
            (checkpoint.path_of(opened.folder, seen) / "trainer.json").read_bytes()
        )
        learned = f" on {trainer['tokens']:,} tokens" if "tokens" in trainer else ""
        if seen or learned:  # else imported and no more
            lines.append(
                f"Trained for {seen:,} of {counted(opened.config.train.steps, 'step')}{learned}, "
                f"in windows of {c.seq_len}, seed {opened.config.run.seed}, on the data "
                f"`{opened.config.data.path.name}`."
            )
    if figures := _figures(opened.folder, opened.step):
        lines.append(figures)
    lines.append(
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
    )
    lines.append(f"Weights are {dtype}. SHA-256 of every file: `manifest.json`.")
    return "\n\n".join(lines) + "\n"


def _figures(folder: Path, step: int | None) -> str:
    """The last validation up to `step`, as a table; empty where there was none."""
    lines = [m for m in validations(read_metrics(folder)) if isinstance(m.get("val_tokens"), int)]
    until = [line for line in lines if line["step"] <= (step or 0)]
    if not until:
        return ""
    last = until[-1]
    return (
        "| validation loss (nats a token) | perplexity | bits per byte | tokens | step |\n"
        "|---|---|---|---|---|\n"
        f"| {last['val_loss']:.4f} | {perplexity(last['val_perplexity'])} | "
        f"{last['val_bits_per_byte']:.4f} | {last['val_tokens']:,} | {last['step']:,} |"
    )


def run_import(options: Import) -> int:
    """A run at step 0 with the folder's weights, to evaluate, use or train on."""
    begun = checkpoint.steps(options.out) in ([], [0])  # and killed before config.json
    check(_free(options.out, (".lock", ".tmp-", "checkpoints") if begun else ()))
    if checkpoint.steps(options.model):  # of ours
        model = open_model(options.model, "cpu", None).model
    else:
        model = read_model(options.model)
    out = options.out.absolute()
    if options.data and model.config.vocab_size < VOCAB:
        raise SotaError(
            f"{options.model} has {model.config.vocab_size:,} ids and prepared data {VOCAB:,}, so "
            "it cannot be trained on; leave --data out to evaluate, use or export it"
        )
    data = options.data.absolute() if options.data else Path()
    if options.data:
        load_manifest(data)  # says what is wrong with it
    config = RunConfig(
        model=model.config,
        data=Data(path=data),
        optim=Optim(),
        train=Train(steps=options.steps, batch_rows=16),
        run=Run(out=out),
    )
    try:  # before anything lies where the same command would find it
        checkpoint.check_room(_existing(out), 4 * model.config.parameter_count)
        durable.make_folder(out)
    except OSError as error:
        raise SotaError(f"cannot make {out}: {error.strerror}", LOCKED) from error
    with durable.DirectoryLock(out):
        durable.sweep(out)
        durable.sweep(out / "checkpoints")
        _write_run(config, model)
    print(f"{out}: {model.config.parameter_count:,} parameters from {options.model}")
    if options.data:
        # The preset that is closest to it has the shortest command.
        words = min((command(name, config) for name in PRESETS), key=len)
        print(f"train on:  {shlex.join(words)}")
    return 0


def _write_run(config: RunConfig, model: Transformer) -> None:
    """The checkpoint of step 0, then config.json: it is what makes the folder a run."""
    state = checkpoint.State(
        step=0,
        model=model.state_dict(),
        optim={},
        trainer={"updates": 0, "guard": Guard().state()},
        manifest={"model": dataclasses.asdict(model.config)},
    )
    checkpoint.save(config.run.out, state)
    durable.write_file(config.run.out / "config.json", config.to_json().encode())
