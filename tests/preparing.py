"""Small inputs, and access to the results, for data preparation tests."""

import errno
import hashlib
import itertools
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sota_transformer.data import documents as reading
from sota_transformer.data import units
from sota_transformer.data.prepare import prepare
from sota_transformer.data.shards import load_manifest
from sota_transformer.data.sources import Skipped, Source, find
from sota_transformer.data.tables import Tables, probe
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.options import Prepare


class PrivateMap(mmap.mmap):
    """`mmap` as on many FUSE drives: writes are invisible to others."""

    def __new__(cls, fileno: int, length: int, flags: int = mmap.MAP_SHARED, **how: Any) -> Any:
        if fileno >= 0 and flags & mmap.MAP_SHARED and how.get("access") != mmap.ACCESS_COPY:
            raise OSError(errno.ENODEV, "No such device")
        return super().__new__(cls, fileno, length, flags, **how)


WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of a few hundred bytes, some of them not English."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        words = random.choice(WORDS, size=int(random.integers(5, 120)))
        made.append(f"{i} {'日本 ' if i % 7 == 0 else ''}{' '.join(words)}.\n")
    return made


def jsonl(items: list[str]) -> bytes:
    """Texts as JSON lines."""
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in items).encode()


def run(out: Path, *inputs: Path | str, **options: Any) -> dict[str, Any]:
    """Prepare with one worker and a tenth for validation, unless `options` says otherwise."""
    options = {"val_fraction": 0.1, "workers": 1} | options
    return prepare(Prepare(inputs=tuple(map(str, inputs)), out=out, **options))


def documents(folder: Path, split: str) -> list[str]:
    """Texts of one split, in order."""
    manifest, tokenizer, found = json.loads((folder / "manifest.json").read_text()), Tokenizer(), []
    for name in manifest["splits"][split]["shards"]:
        ids = np.load(folder / name)
        ends = [0, *np.load(folder / name.replace(".npy", ".ends.npy")).tolist()]
        assert all(ids[end - 1] == EOT for end in ends[1:])
        found += [tokenizer.decode(ids[a : b - 1]) for a, b in itertools.pairwise(ends)]
    return found


def stream(folder: Path, split: str) -> np.ndarray:
    """Ids of one split, over all its shards."""
    names = load_manifest(folder)["splits"][split]["shards"]
    return np.concatenate([np.load(folder / name) for name in names])


def everything(folder: Path) -> list[str]:
    """Texts of both splits, sorted."""
    return sorted(documents(folder, "train") + documents(folder, "val"))


def bytes_of(folder: Path, *, manifest: bool = True) -> dict[str, str]:
    """SHA-256 of every file, with the manifest or without."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if manifest or path.name != "manifest.json"
    }


def refused(code: int, *words: str, out: Path, inputs: tuple[Any, ...], **options: Any) -> None:
    """Assert that preparing ends with this code and one line that contains these words."""
    with pytest.raises(SotaError) as caught:
        run(out, *inputs, **options)
    assert caught.value.code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def read(path: Path, spool: Path) -> tuple[list[str], list[Skipped]]:
    """Documents of one file and what was skipped, without worker processes."""
    found: list[str] = []
    refused: list[Skipped] = []
    tables = Tables()

    def pieces(source: Source) -> list[tuple[int, int, int]]:
        return probe(source, "text")

    for segments in units.cut(find((str(path),))[0], spool, refused.append, pieces):
        for segment in segments:
            for document in reading.documents(segment, "text", tables):
                if isinstance(document, Skipped):
                    refused.append(document)
                else:
                    found.append(document.decode())
    return found, refused
