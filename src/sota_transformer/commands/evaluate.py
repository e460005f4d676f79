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
from sota_transformer.inference.perplexity import Array, paired, sliding_sums, summarise
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
    if options.text or options.against or not benchmarks_only:
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
    """Perplexity on the texts given, or the run's validation split; beside another's if asked."""
    models, folders = [opened], [options.run]
    if options.against is not None:
        models.append(open_model(options.against, options.device, None))
        folders.append(options.against)
    most = min(each.model.config.seq_len for each in models)
    context = min(options.context or most, most)
    stride = min(options.stride or context, context)
    if options.text:
        files = _text_files(options.text)
        read = (
            np.array([EOT, *tokenizer.encode(decoded(p.read_bytes(), p))], np.uint16) for p in files
        )
        name = ", ".join(map(str, options.text))
    else:
        path, windows = _validation_split(opened, context)
        for folder, each in zip(folders, models, strict=True):
            _warn_of_other_data(folder, each, path, windows.fingerprint)
        count = windows.tokens if not options.tokens else min(windows.tokens, options.tokens + 1)
        read, files = iter([windows.read(0, count)]), []
        name = f"validation split of {path}"
    texts, left = [], options.tokens or sys.maxsize
    for tokens in read:
        texts.append(tokens[: left + 1])
        left -= len(texts[-1]) - 1
        if left <= 0:
            break
    size = tokenizer.token_bytes
    try:
        sums = [_sums(each, texts, size, context, stride) for each in models]
        figures = [summarise(each) for each in sums]
    except ValueError as error:
        raise SotaError(f"{name}: {error}", BAD_DATA) from error
    result: dict[str, Any] = {"text": name, "files": len(files), "context": context}
    result |= {"stride": stride} | figures[0]._asdict()
    if options.against is not None:
        other = {"model": models[1].name, "step": models[1].step} | figures[1]._asdict()
        difference = paired(*sums)
        result["against"] = other | {
            "difference": difference.nats,
            "paired_error": difference.error,
        }
    return result


def _validation_split(opened: Opened, context: int) -> tuple[Path, TokenWindows]:
    """The folder of the data that the run was trained on, and its windows for validation."""
    if opened.config is None or not _trained_here(opened):
        kind = "exported" if opened.config is None else "imported"
        raise SotaError(f"an {kind} model has no validation split; give --text FILE")
    path = opened.config.data.path
    if not path.is_dir():
        raise SotaError(
            f"{path}, the run's data, is not here; go to the folder from which the run was "
            "started, or judge it on --text FILE",
            NO_INPUT,
        )
    return path, TokenWindows(path, "val", context)


def _sums(
    opened: Opened, texts: list[Array], token_bytes: Array, context: int, stride: int
) -> Array:
    """(N, 3) of all texts. ValueError when there is none."""
    masked = opened.config is not None and opened.config.data.document_mask
    with Meter("evaluate", sum(len(tokens) - 1 for tokens in texts)) as meter:
        return np.concatenate(
            [
                sliding_sums(
                    opened.model,
                    each,
                    token_bytes,
                    context,
                    stride,
                    document_mask=masked,
                    meter=meter,
                )
                for each in texts
            ]
        )


def _warn_of_other_data(run: Path, opened: Opened, judged: Path, fingerprint: str) -> None:
    """Say so where the data is not what the model was trained on."""
    if not _trained_here(opened):
        warn(f"{run} does not say what it was trained on: what is judged here may have been")
        return
    assert opened.step is not None
    manifest = read_manifest(checkpoint.path_of(run, opened.step) / MANIFEST)
    trained = str(manifest.get("data") or fingerprint)
    if not trained.startswith(fingerprint):  # behind it stood once how it was cut
        warn(f"{judged} is not what {run} was trained on: what is judged here may have been")


def _trained_here(opened: Opened) -> bool:
    """Whether it is a run that was trained, not an exported or imported model."""
    return opened.config is not None and opened.config.data.path != Path()


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
    if other := result.get("against"):
        _print_difference(other)
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


def _print_difference(other: dict[str, Any]) -> None:
    """The other model's loss, and who is better as far as this text can tell."""
    step = "" if other["step"] is None else f", step {other['step']:,}"
    line = f"against {other['model']}{step}: {other['nats']:.4f}"
    if other["error"] is None:
        print(f"{line}\n  difference      {other['difference']:+.4f}")
        return
    told = "no difference that this text can show"
    if abs(other["difference"]) > 2 * other["paired_error"]:
        told = "worse" if other["difference"] > 0 else "better"
    print(
        f"{line} +- {other['error']:.4f}\n  difference      {other['difference']:+.4f} +- "
        f"{other['paired_error']:.4f} (error over the same windows): {told}"
    )
