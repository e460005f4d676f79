"""`sota evaluate`: all requested figures, as one table or one JSON object."""

import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from sota_transformer.commands import examples
from sota_transformer.commands.common import Opened, check, decoded, open_model, warn
from sota_transformer.data.documents import documents, separate
from sota_transformer.data.progress import Meter
from sota_transformer.data.shards import TokenWindows
from sota_transformer.data.sources import ARCHIVES, CODECS, Skipped, Source, find, looks_like
from sota_transformer.data.tables import Tables
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.data.units import whole
from sota_transformer.durable import MANIFEST, read_manifest
from sota_transformer.errors import BAD_DATA, NO_INPUT, USAGE, SotaError
from sota_transformer.inference import benchmarks
from sota_transformer.inference.perplexity import Array, paired, sliding_sums, summarise
from sota_transformer.inference.references import REFERENCES
from sota_transformer.options import Evaluate
from sota_transformer.training import checkpoint
from sota_transformer.words import counted, json_line, perplexity, printable


def run_evaluate(options: Evaluate) -> int:
    """Print all requested figures as one table or one JSON object."""
    least = min(options.tokens, options.limit, options.context, options.stride)
    check({"--tokens, --limit, --context and --stride must be 0 or more": least >= 0})
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
    rows = list[benchmarks.Benchmark]()
    if options.lambada:
        texts, standard = examples.lambada(options.lambada, options.limit)
        rows += benchmarks.lambada(opened.model, tokenizer, texts, standard)
    if options.hellaswag:
        choices = examples.hellaswag(options.hellaswag, options.limit)
        rows += benchmarks.hellaswag(opened.model, tokenizer, choices)
    result["benchmarks"] = [row._asdict() for row in rows]
    if options.tasks:
        result["lm_eval"] = _harness(options, opened, tokenizer)
    if options.json:
        print(json_line(result))
    else:
        _print_table(result)
    return 0


def _text_figures(options: Evaluate, opened: Opened, tokenizer: Tokenizer) -> dict[str, Any]:
    """Perplexity on the given texts or the run's validation split, and the --against model's."""
    models = [opened]
    if options.against is not None:
        models.append(open_model(options.against, options.device, None))
    longest = min(each.model.config.seq_len for each in models)
    context = min(options.context or longest, longest)
    stride = min(options.stride or context, context)
    most, files = options.tokens or sys.maxsize, list[Source]()
    if options.text:
        name = ", ".join(map(str, options.text))
        files, skipped = find(tuple(map(str, options.text)))
        encoded = map(tokenizer.encode, _texts(files, skipped))
        texts = _first((np.array([EOT, *ids], np.uint16) for ids in encoded), most)
        if skipped:
            first = printable(f"the first is {skipped[0].where}: {skipped[0].reason}")
            warn(f"skipped {counted(len(skipped), 'item')}; {first}")
    else:
        windows = _validation_split(opened, context)
        name = f"validation split of {opened.data}"
        for each in models:
            _warn_of_other_data(each, opened, windows.fingerprint)
        texts = [windows.read(0, min(windows.tokens, most + 1))]
    try:
        sums = [_sums(each, texts, tokenizer.token_bytes, context, stride) for each in models]
        figures = [summarise(each) for each in sums]
    except ValueError as error:
        raise SotaError(f"{name}: {error}", BAD_DATA) from error
    result: dict[str, Any] = {"text": name, "files": len(files), "context": context}
    result |= {"stride": stride} | figures[0]._asdict()
    if options.against is not None:
        other = {"model": models[1].name, "step": models[1].step} | figures[1]._asdict()
        difference, error = paired(*sums)
        result["against"] = other | {"difference": difference, "paired_error": error}
    return result


def _first(texts: Iterable[Array], most: int) -> list[Array]:
    """The first texts, up to `most` predicted tokens, the last one cut; reads no further."""
    kept = []
    for tokens in texts:
        kept.append(tokens[: most + 1])
        most -= len(kept[-1]) - 1
        if most <= 0:
            break
    return kept


def _validation_split(opened: Opened, context: int) -> TokenWindows:
    """The validation windows of the run's data."""
    if opened.data is None:
        kind = "exported" if opened.config is None else "imported"
        raise SotaError(f"an {kind} model has no validation split; give --text FILE")
    if not opened.data.is_dir():
        here = "" if opened.data.is_absolute() else "change to the folder it was started from, "
        raise SotaError(
            f"{opened.data}, the run's data, does not exist; {here}correct data.path in "
            f"{opened.folder / 'config.json'}, or give --text FILE",
            NO_INPUT,
        )
    return TokenWindows(opened.data, "val", context)


def _sums(
    opened: Opened, texts: list[Array], token_bytes: Array, context: int, stride: int
) -> Array:
    """Nats, tokens and bytes (N, 3) of the windows of all texts."""
    model, masked = opened.model, bool(opened.config and opened.config.data.document_mask)
    with Meter("evaluate", sum(len(tokens) - 1 for tokens in texts)) as meter:
        sums = (sliding_sums(model, t, token_bytes, context, stride, masked, meter) for t in texts)
        return np.concatenate([np.zeros((0, 3)), *sums])


def _warn_of_other_data(opened: Opened, evaluated: Opened, fingerprint: str) -> None:
    """Warn if `opened` was not trained on the data whose validation split is evaluated."""
    run = opened.folder
    if opened.data is None:
        warn(f"the training data of {run} is unknown; it may contain this validation text")
        return
    assert opened.step is not None
    manifest = read_manifest(checkpoint.path_of(run, opened.step) / MANIFEST)
    trained = str(manifest.get("data") or fingerprint)
    if not trained.startswith(fingerprint):  # older manifests append the kind of windows
        data = evaluated.data
        warn(f"{run} was not trained on {data}; its data may contain this validation text")


def _texts(sources: list[Source], skipped: list[Skipped]) -> Iterator[str]:
    """The texts of files: a text file is split at lines of `<|endoftext|>`, a code file is one
    text, others are read as documents as in `sota prepare`; skipped ones go to `skipped`.
    """
    for source in sources:
        if source.kind in ARCHIVES or source.codec in CODECS:
            raise SotaError(
                f"{source.path}: unpack it first, or pipe its contents to --text -", BAD_DATA
            )
        if source.codec:  # standard input
            with NamedTemporaryFile() as spool:
                shutil.copyfileobj(sys.stdin.buffer, spool)
                size = spool.tell()
                spool.seek(0)
                kind = looks_like(spool.read(4096))
                piped = replace(source, path=spool.name, kind=kind, codec="", size=size)
                yield from _texts([piped], skipped)
            continue
        if source.kind in ("text", "code"):
            data = decoded(Path(source.path).read_bytes(), Path(source.name)).encode()
            texts = separate(data) if source.kind == "text" else [(0, len(data))]
            yield from (data[start:stop].decode() for start, stop in texts)
            continue
        for document in documents(whole(source), "text", Tables()):
            if isinstance(document, Skipped):
                skipped.append(document)
            else:
                yield document.decode()


def _harness(options: Evaluate, opened: Opened, tokenizer: Tokenizer) -> dict[str, Any]:
    """Results of EleutherAI's lm-eval."""
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
    """Print the figures, and published ones measured by the same protocols."""
    print(f"{_title(result)}, {result['parameters']:,} parameters")
    if "nats" in result:
        error, unit = "", "nats per token"
        if result["error"] is not None:
            error, unit = f" +- {result['error']:.4f}", f"{unit} (standard error over windows)"
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
        print("published, same protocol, on the whole published test set:")
        for r in shown:
            print(f"  {r.name:<28} {r.value:>12.4f} {r.model}{f' ({r.note})' if r.note else ''}")


def _print_difference(other: dict[str, Any]) -> None:
    """Print the other model's loss, and which model is better if the difference is significant."""
    line = f"against {_title(other)}: {other['nats']:.4f}"
    if other["error"] is None:
        print(f"{line}\n  difference      {other['difference']:+.4f}")
        return
    verdict = "no significant difference on this text"
    if abs(other["difference"]) > 2 * other["paired_error"]:
        verdict = f"{'worse' if other['difference'] > 0 else 'better'} on this text"
    print(
        f"{line} +- {other['error']:.4f}\n  difference      {other['difference']:+.4f} +- "
        f"{other['paired_error']:.4f} (paired standard error): {verdict}"
    )


def _title(result: dict[str, Any]) -> str:
    """The model's name, and its step if it has one."""
    return result["model"] + ("" if result["step"] is None else f", step {result['step']:,}")
