"""LAMBADA and HellaSwag from the Hugging Face hub, fetched once; from then on they are local files.

The hub keeps every public data set as Parquet on the branch `refs/convert/parquet`. `HF_ENDPOINT`,
`HF_HUB_OFFLINE` and `XDG_CACHE_HOME` mean what they mean to other programs.
"""

import io
import json
import os
import urllib.request
from http.client import HTTPException
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from sota_transformer import durable
from sota_transformer.errors import BAD_DATA, NO_INPUT, SotaError

_LARGEST = 64 << 20
_SECONDS = 20


class _Source(NamedTuple):
    """One table of the hub, and the names its columns get here."""

    place: str
    columns: dict[str, str]


_TABLES = {
    "lambada": (
        _Source("EleutherAI/lambada_openai default/test", {"text": "text"}),
        _Source("cimec/lambada plain_text/test", {"text": "standard"}),
    ),
    "hellaswag": (
        _Source(
            "Rowan/hellaswag default/validation",
            {name: name for name in ("activity_label", "ctx_a", "ctx_b", "endings", "label")},
        ),
    ),
}


def fetch(name: str) -> Path:
    """JSON lines of `lambada` or `hellaswag`, from the cache or the hub. SotaError 65 or 66."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:  # a user without a home, as in some containers
        raise SotaError(f"{error}; set XDG_CACHE_HOME to a folder", NO_INPUT) from error
    cache = home / "sota_transformer"
    path = cache / f"{name}.jsonl"
    if path.is_file():
        return path
    tables = [_rows(name, source) for source in _TABLES[name]]
    lines = [
        {key: value for row in rows if row for key, value in row.items()}
        for rows in zip_longest(*tables)
    ]
    durable.make_folder(cache)
    durable.write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return path


def _rows(name: str, source: _Source) -> list[dict[str, Any]]:
    """The rows of one table, under our names of its columns."""
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise SotaError(
            f"--{name} hub reads Parquet, and the package {error.name} is missing: "
            "pip install 'sota-transformer[parquet]'"
        ) from error
    data = _download(name, source.place)
    try:
        table = read_table(io.BytesIO(data), columns=list(source.columns))
        return [
            {ours: row[theirs] for theirs, ours in source.columns.items()}
            for row in table.to_pylist()
        ]
    except (ValueError, OSError, KeyError) as error:
        line = str(error).strip().partition("\n")[0]
        raise SotaError(f"the hub's {source.place} is not what it was: {line}", BAD_DATA) from error


def _download(name: str, place: str) -> bytes:
    repository, _, split = place.partition(" ")
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{host}/datasets/{repository}/resolve/refs%2Fconvert%2Fparquet/{split}/0000.parquet"
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            data = answer.read(_LARGEST + 1)
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", None) or error
        raise SotaError(
            f"cannot fetch {repository} from {host} ({why}); offline, give --{name} a local FILE",
            NO_INPUT,
        ) from error
    if len(data) > _LARGEST:
        raise SotaError(f"{url} is larger than {_LARGEST >> 20} MiB", BAD_DATA)
    return data
