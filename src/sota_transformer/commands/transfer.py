"""`sota export` and `sota import`: a run to and from the formats of other programs."""

import dataclasses
import glob
import json
import shlex
import shutil
from pathlib import Path

from sota_transformer import durable
from sota_transformer.commands.common import Opened, check, open_model
from sota_transformer.config import VOCAB, Data, Optim, Run, RunConfig, Train
from sota_transformer.data.guards import one_line_errors
from sota_transformer.data.shards import check_windows
from sota_transformer.errors import SotaError
from sota_transformer.inference.export import (
    probe_logits,
    proof,
    prove_huggingface,
    write_huggingface,
)
from sota_transformer.model.transformer import Transformer
from sota_transformer.options import Export, Import
from sota_transformer.presets import PRESETS, command
from sota_transformer.report import validations
from sota_transformer.training import checkpoint
from sota_transformer.training.guard import Guard
from sota_transformer.training.runlog import read_metrics
from sota_transformer.words import counted, in_shell, perplexity


def run_export(options: Export) -> int:
    """Write the model, read it back, compare logits, and only then commit the folder."""
    check(
        {
            "--dtype q8_0 needs --format gguf": options.dtype != "q8_0" or options.format == "gguf",
            **_free(options.out),
        }
    )
    opened = open_model(options.run, "cpu", options.step)
    model, out = opened.model, options.out.absolute()
    for left in out.parent.glob(f".tmp-{glob.escape(out.name)}-????????"):  # by a killed export
        durable.remove(left)
    made = durable.commit_folder(out, {"format": options.format, "dtype": options.dtype})
    with one_line_errors(out), made as writer:
        if options.format == "gguf":
            proofs = _gguf(writer, opened, options.dtype)
        else:
            write_huggingface(writer, model, options.dtype, _card(opened, options.dtype))
            proofs = prove_huggingface(writer.path, model, options.dtype)
    print("\n".join(proofs))
    step = "" if opened.step is None else f", step {opened.step}"
    print(f"{out}: {options.format}, {options.dtype}{step}")
    if options.format == "gguf":
        file, words = in_shell(options.out / "model.gguf"), '"Once upon a time"'
        print(f"for llama.cpp:  llama-completion -m {file} -n 100 -p {words}")
        recipe = in_shell(options.out / "Modelfile")
        print(f"for Ollama:  ollama create mine -f {recipe} && ollama run mine {words}")
    return 0


def _free(out: Path, but: tuple[str, ...] = ()) -> dict[str, bool]:
    """What the output folder must satisfy: empty, except for names that begin with one of `but`."""
    if out == Path():
        return {"--out must name a new folder, not the current one": False}
    taken = out.is_symlink() or (out.exists() and not out.is_dir())
    taken |= out.is_dir() and not all(path.name.startswith(but) for path in out.iterdir())
    return {
        f"{out} already exists; give another --out": not taken,
        f"{out.absolute()} is not a UTF-8 path, which safetensors requires; give another --out": (
            checkpoint.is_utf8(out)
        ),
    }


def _gguf(writer: durable.FolderWriter, opened: Opened, dtype: str) -> list[str]:
    """Write the file and a Modelfile for Ollama; return the proof."""
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
    """The model card: the model, its training, its validation figures and how to load it."""
    c = opened.model.config
    kind = "Qwen3" if c.qk_norm else "Llama"
    lines = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [sota-transformer]\n---",
        f"# {opened.name}",
        f"A {kind} language model with {c.parameter_count:,} parameters, exported by "
        "`sota_transformer`. It uses GPT-2's tokenizer plus one pad token. It is a base model: it "
        "continues text, was not tuned to follow instructions, and reflects its training text.",
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
        if seen or learned:  # otherwise it was only imported
            lines.append(
                f"Trained for {seen:,} of {counted(opened.config.train.steps, 'step')}{learned}, "
                f"in windows of {c.seq_len}, with seed {opened.config.run.seed}, on the data "
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
    """The last validation up to `step` as a table; empty if there was none."""
    lines = [m for m in validations(read_metrics(folder)) if isinstance(m.get("val_tokens"), int)]
    until = [line for line in lines if line["step"] <= (step or 0)]
    if not until:
        return ""
    last = until[-1]
    return (
        "| validation loss (nats per token) | perplexity | bits per byte | tokens | step |\n"
        "|---|---|---|---|---|\n"
        f"| {last['val_loss']:.4f} | {perplexity(last['val_perplexity'])} | "
        f"{last['val_bits_per_byte']:.4f} | {last['val_tokens']:,} | {last['step']:,} |"
    )


def run_import(options: Import) -> int:
    """Create a run at step 0 with the folder's weights, to evaluate, use or train further."""
    begun = checkpoint.steps(options.out) in ([], [0])  # an import killed before config.json
    check(_free(options.out, (".lock", ".tmp-", "checkpoints") if begun else ()))
    opened = open_model(options.model, "cpu", None)
    model, out = opened.model, options.out.absolute()
    if options.data and model.config.vocab_size < VOCAB:
        raise SotaError(
            f"{options.model} has {model.config.vocab_size:,} token ids and prepared data has "
            f"{VOCAB:,}, so it cannot be trained further; omit --data to evaluate, use or export it"
        )
    data = options.data.absolute() if options.data else Path()
    if options.data:
        check_windows(data, model.config.seq_len)
    config = RunConfig(
        model=model.config,
        data=Data(path=data),
        optim=opened.config.optim if opened.config else Optim(),  # a run's own recipe
        train=Train(steps=options.steps, batch_rows=16),
        run=Run(out=out),
    )
    checkpoint.check_room(out, 4 * model.config.parameter_count)
    with checkpoint.locked(out):
        _write_run(config, model)
    print(f"{out}: {model.config.parameter_count:,} parameters from {options.model}")
    if options.data:
        # The closest preset gives the shortest command.
        words = min((command(name, config) for name in PRESETS), key=len)
        print(f"to train it further:  {shlex.join(words)}")
    return 0


def _write_run(config: RunConfig, model: Transformer) -> None:
    """The checkpoint of step 0, then config.json, whose presence makes the folder a run."""
    state = checkpoint.State(
        step=0,
        model=model.state_dict(),
        optim={},
        trainer={"updates": 0, "guard": Guard().state()},
        manifest={"model": dataclasses.asdict(model.config)},
    )
    checkpoint.save(config.run.out, state)
    durable.write_file(config.run.out / "config.json", config.to_json().encode())
