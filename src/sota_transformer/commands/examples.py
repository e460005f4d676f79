"""The examples of LAMBADA and HellaSwag: JSON lines in a local file, or from the Hugging Face hub.

They are downloaded from the hub once and cached as local files. The hub keeps every public data
set as Parquet on the branch `refs/convert/parquet`. `HF_ENDPOINT`, `HF_HUB_OFFLINE` and
`XDG_CACHE_HOME` have their usual meaning.
"""

import io
import json
import os
import urllib.request
from collections import ChainMap
from http.client import HTTPException
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sota_transformer import durable
from sota_transformer.commands.common import text_of
from sota_transformer.errors import BAD_DATA, IO_FAILED, NO_INPUT, SotaError
from sota_transformer.inference.benchmarks import Choice, without_markup
from sota_transformer.shapes import misfit

_SECONDS = 20


# The hub's tables for each benchmark, and our names for their columns.
_TABLES = {
    "lambada": {
        "EleutherAI/lambada_openai default/test": {"text": "text"},
        "cimec/lambada plain_text/test": {"text": "standard"},
    },
    "hellaswag": {
        "Rowan/hellaswag default/validation": {
            name: name for name in ("activity_label", "ctx_a", "ctx_b", "endings", "label")
        },
    },
}


def lambada(place: Path, limit: int) -> tuple[list[str], list[str]]:
    """Texts in OpenAI's and in the original form, from a file or `hub`. SotaError 65 or 66."""
    path, examples = _objects("lambada", place, limit)
    texts, standard = ([e[field] for e in examples if field in e] for field in ("text", "standard"))
    both = [*texts, *standard]
    if not both or not all(isinstance(text, str) and " " in text.strip() for text in both):
        raise SotaError(
            f"{path}: each line needs a field `text` (or `standard`, the original text) of at "
            "least two words",
            BAD_DATA,
        )
    return texts, standard


def hellaswag(place: Path, limit: int) -> list[Choice]:
    """Questions from a file or `hub`. SotaError 65 or 66."""
    path, examples = _objects("hellaswag", place, limit)
    return [_choice(path, example) for example in examples]


def _choice(path: Path, example: dict[str, Any]) -> Choice:
    """One HellaSwag example, with the hub's fields or with only ctx. SotaError 65."""
    texts = ("activity_label", "ctx_a", "ctx_b") if "ctx_a" in example else ("ctx",)
    shape = dict.fromkeys(texts, str) | {"endings": [str], "label": (int, str)}
    if wrong := misfit(example, shape):
        raise SotaError(
            f"{path}: not a HellaSwag example ({wrong}); each line needs ctx, endings and label, "
            "the index of the right ending",
            BAD_DATA,
        )
    endings, label = example["endings"], str(example["label"])
    if "ctx_a" in example:  # as published, formatted as in lm-eval
        text = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
        context, endings = without_markup(text), [without_markup(ending) for ending in endings]
    else:
        context = example["ctx"]
    # Checked as scored: an ending of nothing but WikiHow marks is empty by now.
    if label not in map(str, range(len(endings))) or not all(e.strip() for e in endings):
        raise SotaError(f"{path}: endings must not be empty and label must be an index", BAD_DATA)
    return Choice(context, endings, int(label))


def _objects(name: str, place: Path, limit: int) -> tuple[Path, list[dict[str, Any]]]:
    """The file that `place` refers to, and the objects in its JSON lines."""
    path = _fetch(name) if str(place) == "hub" else place
    examples = []
    for number, line in enumerate(text_of(path).split("\n"), 1):
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
    return path, examples


def _fetch(name: str) -> Path:
    """JSON lines of `lambada` or `hellaswag`, from the cache or the hub. SotaError 65 or 66."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:  # a user without a home folder, as in some containers
        raise SotaError(f"{error}; set XDG_CACHE_HOME to a folder", NO_INPUT) from error
    cache = home / "sota_transformer"
    path = cache / f"{name}.jsonl"
    if path.is_file():
        return path
    tables = [_rows(name, place, columns) for place, columns in _TABLES[name].items()]
    lines = [dict(ChainMap(*rows)) for rows in zip_longest(*tables, fillvalue={})]
    try:
        durable.make_folder(cache)
        durable.write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    except OSError as error:  # a home folder that does not exist or is not the user's own
        advice = "set XDG_CACHE_HOME to a folder that you can write to"
        raise SotaError(f"cannot write {path}: {error.strerror}; {advice}", IO_FAILED) from error
    return path


def _rows(name: str, place: str, columns: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of one table, with columns renamed to ours."""
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise SotaError(
            f"--{name} hub reads Parquet, and the package {error.name} is missing: "
            "pip install 'sota-transformer[parquet]'"
        ) from error
    data = _download(name, place)
    try:
        table = read_table(io.BytesIO(data)).select(list(columns))
        return table.rename_columns(list(columns.values())).to_pylist()
    except (ValueError, OSError, KeyError) as error:
        line = str(error).strip().partition("\n")[0]
        raise SotaError(f"the hub's {place} has an unexpected format: {line}", BAD_DATA) from error


def _download(name: str, place: str) -> bytes:
    repository, _, split = place.partition(" ")
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{host}/datasets/{repository}/resolve/refs%2Fconvert%2Fparquet/{split}/0000.parquet"
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            return answer.read()
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", None) or error
        raise SotaError(
            f"cannot download {repository} from {host} ({why}); offline, use --{name} FILE",
            NO_INPUT,
        ) from error
