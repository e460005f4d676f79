"""`sota evaluate`: every figure that was asked for, as one table or one JSON object."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sota_transformer.commands.common import Opened, check, decoded, open_model, warn
from sota_transformer.commands.hub import fetch
from sota_transformer.data.progress import Meter
from sota_transformer.data.shards import TokenWindows
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.durable import MANIFEST, read_manifest
from sota_transformer.errors import BAD_DATA, NO_INPUT, USAGE, SotaError
from sota_transformer.inference import benchmarks
from sota_transformer.inference.generate import EOT
from sota_transformer.inference.perplexity import sliding_sums, summarise
from sota_transformer.inference.references import REFERENCES
from sota_transformer.options import Evaluate
from sota_transformer.training import checkpoint
from sota_transformer.words import counted, json_line, perplexity


def run_evaluate(options: Evaluate) -> int:
    """One table, or one JSON object, of every figure that was asked for."""
    check(
        {
            "--tokens, --limit, --context and --stride must be 0 or more": min(
                options.tokens, options.limit, options.context, options.stride
            )
            >= 0
        }
    )
    opened = open_model(options.run, options.device, options.step)
    tokenizer = Tokenizer()
    result: dict[str, Any] = {
        "model": opened.name,
        "step": opened.step,
        "parameters": opened.model.config.parameter_count,
    }
    benchmarks_only = options.lambada or options.hellaswag or options.tasks
    if options.text or not benchmarks_only:
        result |= _text_figures(options, opened, tokenizer)
    result["benchmarks"] = [row._asdict() for row in _benchmarks(options, opened, tokenizer)]
    if options.tasks:
        result["lm_eval"] = _harness(options, opened, tokenizer)
    if options.json:
        print(json_line(result))
    else:
        _print_table(result)
    return 0


def _text_figures(options: Evaluate, opened: Opened, tokenizer: Tokenizer) -> dict[str, Any]:
    """Perplexity of the texts given, or of the run's validation split."""
    context = min(options.context or opened.model.config.seq_len, opened.model.config.seq_len)
    stride = min(options.stride or context, context)
    if options.text:
        files = _text_files(options.text)
        read = (
            np.array([EOT, *tokenizer.encode(decoded(p.read_bytes(), p))], np.uint16) for p in files
        )
        name = ", ".join(map(str, options.text))
    else:
        if opened.config is None or opened.config.data.path == Path():  # `sota import` alone
            kind = "exported" if opened.config is None else "imported"
            raise SotaError(f"an {kind} model has no validation split; give --text FILE")
        path = opened.config.data.path
        if not path.is_dir():
            raise SotaError(
                f"{path}, the run's data, is not here; go to the folder from which the run was "
                "started, or judge it on --text FILE",
                NO_INPUT,
            )
        windows = TokenWindows(path, "val", context)
        _warn_of_other_data(options.run, opened, windows.fingerprint)
        count = windows.tokens if not options.tokens else min(windows.tokens, options.tokens + 1)
        read, files = iter([windows.read(0, count)]), []
        name = f"validation split of {path}"
    texts, left = [], options.tokens or sys.maxsize
    for tokens in read:
        texts.append(tokens[: left + 1])
        left -= len(texts[-1]) - 1
        if left <= 0:
            break
    masked = opened.config is not None and opened.config.data.document_mask
    with Meter("evaluate", sum(len(tokens) - 1 for tokens in texts)) as meter:
        size, model = tokenizer.token_bytes, opened.model
        sums = [
            sliding_sums(model, each, size, context, stride, document_mask=masked, meter=meter)
            for each in texts
        ]
    try:
        figures = summarise(np.concatenate(sums))
    except ValueError as error:
        raise SotaError(f"{name}: {error}", BAD_DATA) from error
    return {"text": name, "files": len(files), "context": context, "stride": stride} | (
        figures._asdict()
    )


def _warn_of_other_data(run: Path, opened: Opened, fingerprint: str) -> None:
    """Say so where the data is no longer what the model was trained on."""
    assert opened.config is not None and opened.step is not None
    manifest = read_manifest(checkpoint.path_of(run, opened.step) / MANIFEST)
    trained = str(manifest.get("data") or fingerprint)
    if not trained.startswith(fingerprint):  # behind it stood once how it was cut
        text = f"{opened.config.data.path} is not what the run was trained on"
        warn(f"{text}: what is judged here may have been")


def _text_files(paths: tuple[Path, ...]) -> list[Path]:
    """The files themselves, and the .txt, .md and .py files of folders, sorted."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py")]
            found += sorted(p for p in inside if p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise SotaError(f"{path}: no such file or folder", NO_INPUT)
    if not found:
        raise SotaError(f"{', '.join(map(str, paths))}: no .txt, .md or .py file inside", NO_INPUT)
    return found


def _benchmarks(
    options: Evaluate, opened: Opened, tokenizer: Tokenizer
) -> list[benchmarks.Benchmark]:
    """The figures of LAMBADA and HellaSwag from local files or the hub."""
    rows: list[benchmarks.Benchmark] = []
    if options.lambada:
        path = _or_hub(options.lambada, "lambada")
        examples = _examples(path, options.limit)
        texts = [example["text"] for example in examples if "text" in example]
        standard = [example["standard"] for example in examples if "standard" in example]
        if not all(isinstance(t, str) and " " in t.strip() for t in [*texts, *standard]) or not (
            texts or standard
        ):
            raise SotaError(
                f"{path}: each line needs a field `text` (or `standard`, the original text) of at "
                "least two words",
                BAD_DATA,
            )
        rows += benchmarks.lambada(opened.model, tokenizer, texts, standard)
    if options.hellaswag:
        path = _or_hub(options.hellaswag, "hellaswag")
        choices = [_choice(path, example) for example in _examples(path, options.limit)]
        rows += benchmarks.hellaswag(opened.model, tokenizer, choices)
    return rows


def _or_hub(path: Path, name: str) -> Path:
    return fetch(name) if str(path) == "hub" else path


def _choice(path: Path, example: dict[str, Any]) -> benchmarks.Choice:
    """One example of HellaSwag, with the hub's fields or with ctx alone."""
    try:
        endings, label = list(example["endings"]), int(example["label"])
        if not all(isinstance(e, str) and e.strip() for e in endings) or not (
            0 <= label < len(endings)
        ):
            raise ValueError("endings must be texts and label one of their numbers")
        if "ctx_a" in example:
            activity, first = example["activity_label"], example["ctx_a"]
            return benchmarks.hellaswag_choice(activity, first, example["ctx_b"], endings, label)
        return benchmarks.Choice(example["ctx"], endings, label)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"no field {error}" if isinstance(error, KeyError) else error
        raise SotaError(f"{path}: not an example of HellaSwag ({why})", BAD_DATA) from error


def _examples(path: Path, limit: int) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    if not path.is_file():
        raise SotaError(f"{path}: no such file", NO_INPUT)
    examples = []
    for number, line in enumerate(decoded(path.read_bytes(), path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            examples.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise SotaError(f"{path}:{number}: not JSON ({error})", BAD_DATA) from error
        if not isinstance(examples[-1], dict):
            raise SotaError(f"{path}:{number}: not a JSON object", BAD_DATA)
        if len(examples) == limit:
            break
    if not examples:
        raise SotaError(f"{path} has no examples", BAD_DATA)
    return examples


def _harness(options: Evaluate, opened: Opened, tokenizer: Tokenizer) -> dict[str, Any]:
    """Figures of EleutherAI's lm-eval."""
    try:
        from yaml import YAMLError

        from sota_transformer.inference.harness import evaluate
    except ImportError as error:
        raise SotaError(
            f"--tasks needs lm-eval, and {error.name} is missing: "
            "pip install 'sota-transformer[lm-eval]'"
        ) from error
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    try:
        return evaluate(opened.model, tokenizer, tasks, options.limit or None)
    except (KeyError, ValueError, OSError, YAMLError) as error:
        line = " ".join(str(error).split())[:300]
        if isinstance(error, ConnectionError):
            line += "; offline, --lambada and --hellaswag take local files"
        code = NO_INPUT if isinstance(error, OSError) else USAGE
        raise SotaError(f"lm-eval could not run {options.tasks}: {line}", code) from error


def _print_table(result: dict[str, Any]) -> None:
    """The figures, and published ones measured by the same protocols."""
    step = "" if result["step"] is None else f", step {result['step']:,}"
    print(f"{result['model']}{step}, {result['parameters']:,} parameters")
    if "nats" in result:
        error, unit = "", "nats a token"
        if result["error"] is not None:
            error, unit = f" +- {result['error']:.4f}", f"{unit} (error over windows)"
        print(
            f"{result['text']}: {counted(result['tokens'], 'token')} in "
            f"{counted(result['sequences'], 'window')}, "
            f"context {result['context']}, stride {result['stride']}\n"
            f"  loss            {result['nats']:.4f}{error} {unit}\n"
            f"  perplexity      {perplexity(result['perplexity'])}\n"
            f"  bits per byte   {result['bits_per_byte']:.4f}"
        )
    names = []
    for row in result["benchmarks"]:
        error = "" if row["error"] is None else f" +- {row['error']:.4f}"
        print(
            f"  {row['name']:<28} {row['value']:>12.4f}{error:<13} "
            f"{counted(row['examples'], 'example')}, {row['protocol']}"
        )
        names.append(row["name"])
    for task, values in result.get("lm_eval", {}).items():
        for key, value in values.items():
            if isinstance(value, float):
                print(f"  lm-eval {task} {key}: {value:.4f}")
    if shown := [r for r in REFERENCES if r.name in names]:
        print("published, same protocol and full test set:")
        for r in shown:
            print(f"  {r.name:<28} {r.value:>12.4f} {r.model}{f' ({r.note})' if r.note else ''}")
