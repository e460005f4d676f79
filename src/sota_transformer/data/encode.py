"""Hashes and encodes the documents of one unit of work into one self-checking result file.

The file is a cache that lets a killed preparation resume: it is renamed into place whole, carries
the key of its input and a checksum, and is rewritten if either does not match. So it needs no
fsync: damage from a power cut is detected.
"""

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from sota_transformer.data.documents import Document, documents
from sota_transformer.data.grams import GramSet
from sota_transformer.data.near import Place
from sota_transformer.data.sketch import sketch
from sota_transformer.data.sources import EXAMPLES, REPAIRED, Skipped
from sota_transformer.data.tables import Tables
from sota_transformer.data.tokenizer import EOT, Encoder
from sota_transformer.data.units import UNIT_BYTES, Job, Segment, Unit

HASH_KEY = b"sota_transformer document hash 1"
HASH_BYTES = 16
HASH_RULE = f"BLAKE3-{8 * HASH_BYTES} of the UTF-8 text, key {HASH_KEY.decode()}"
DUPLICATE = "exact duplicate"
EXCLUDED = "shares text with an excluded file"
EXCLUDE_GRAM = 13  # consecutive tokens; GPT-3's decontamination used 13 words


@dataclass
class Rejects:
    """Skipped items by reason, as a manifest has them: their number and the first few places."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, reason: str, *places: str, count: int = 1) -> None:
        """Record a skipped document or file, or several."""
        entry = self.entries.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += count
        entry["examples"] += places[: max(0, EXAMPLES - len(entry["examples"]))]

    def merge(self, entries: dict[str, dict[str, Any]]) -> None:
        """Add those of another unit or manifest."""
        for reason, entry in entries.items():
            self.add(reason, *entry["examples"], count=entry["count"])


@dataclass
class Encoded:
    """The result of a unit. `tokens` holds all its documents, each closed by end-of-text."""

    tokens: NDArray[np.uint16]  # (sum of lengths,)
    lengths: NDArray[np.uint32]  # (documents,) tokens, including end-of-text
    text_bytes: NDArray[np.uint32]  # (documents,)
    hashes: NDArray[np.uint64]  # (documents, 2), see HASH_RULE
    inputs: NDArray[np.uint32]  # (documents,) the input each document came with
    keys: NDArray[np.uint32]  # (documents, bands) of their sketches; (documents, 0) without them
    marks: NDArray[np.uint8]  # (documents, bins) of the same; (documents, 0) without them
    rejects: Rejects
    place: Place | None = None  # location of the tokens, once stored


_ARRAYS = (
    ("hashes", np.dtype("<u8")),  # widest first keeps all arrays aligned
    ("lengths", np.dtype("<u4")),
    ("text_bytes", np.dtype("<u4")),
    ("inputs", np.dtype("<u4")),
    ("keys", np.dtype("<u4")),
    ("marks", np.dtype("u1")),  # an even number per document keeps the tokens aligned
    ("tokens", np.dtype("<u2")),
)


class Tools:
    """State that a worker keeps between units."""

    def __init__(self, job: Job) -> None:
        self.job, self.encoder, self.tables = job, Encoder(), Tables()
        self.excluded = GramSet(np.load(job.excluded)) if job.excluded else None


def encode_unit(unit: Unit, tools: Tools) -> Encoded:
    """Read, hash and encode all documents of a unit, dropping exact duplicates within it."""
    tokens = np.empty(UNIT_BYTES // 2, np.uint16)  # rarely too small, and untouched pages are free
    used, lengths, sizes, inputs = 0, [], [], []
    hashes: dict[bytes, str] = {}
    rejects = Rejects()
    for segment in unit.segments:
        for document in _guarded(segment, tools):
            if isinstance(document, Skipped):
                repaired = document.repaired if tools.job.options.bad_text == "replace" else b""
                rejects.add(document.reason + REPAIRED * bool(repaired), document.where)
                if not repaired:
                    continue
                document = repaired
            digest = blake3(document, key=HASH_KEY).digest(HASH_BYTES)
            if digest in hashes:
                rejects.add(DUPLICATE, segment.name)
                continue
            hashes[digest] = segment.name
            ids = tools.encoder(document)
            end = used + len(ids)
            if end >= len(tokens):
                tokens = np.concatenate([tokens, np.empty(len(tokens) + len(ids), np.uint16)])
            tokens[used:end] = ids
            tokens[end] = EOT
            lengths.append(end + 1 - used)
            sizes.append(len(document))
            inputs.append(segment.input)
            used = end + 1
    encoded = Encoded(
        tokens=tokens[:used],
        lengths=np.array(lengths, np.uint32),
        text_bytes=np.array(sizes, np.uint32),
        hashes=np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2),
        inputs=np.array(inputs, np.uint32),
        keys=np.empty((len(lengths), 0), np.uint32),
        marks=np.empty((len(lengths), 0), np.uint8),
        rejects=rejects,
    )
    if tools.excluded:
        _exclude(encoded, tools.excluded, list(hashes.values()))
    if tools.job.options.near_dedup:
        encoded.keys, encoded.marks = sketch(encoded.tokens, encoded.lengths)
    return encoded


def _exclude(encoded: Encoded, excluded: GramSet, names: list[str]) -> None:
    """Drop the documents that share an n-gram with the excluded texts."""
    ends = np.cumsum(encoded.lengths, dtype=np.int64)
    hits = excluded.find_runs(encoded.tokens, EXCLUDE_GRAM)
    if not len(hits):
        return
    owners = np.searchsorted(ends, hits, "right")
    # The excluded n-grams contain no end-of-text, so no hit crosses the end of a document.
    drop = np.zeros(len(ends), bool)
    drop[owners] = True
    for document in np.flatnonzero(drop).tolist():
        encoded.rejects.add(EXCLUDED, names[document])
    encoded.tokens = encoded.tokens[np.repeat(~drop, encoded.lengths)]
    for name, _ in _ARRAYS[:-1]:  # all but the tokens
        setattr(encoded, name, getattr(encoded, name)[~drop])


def _guarded(segment: Segment, tools: Tools) -> Iterator[Document]:
    """The segment's documents; a missing or unreadable file becomes a reject."""
    try:
        yield from documents(segment, tools.job.options.text_field, tools.tables)
    except OSError as error:
        yield Skipped(f"cannot be read ({error.strerror})", segment.name)
    except MemoryError:
        yield Skipped("not enough memory", segment.name)


def store(encoded: Encoded, path: Path, key: str) -> None:
    """Write a unit's result atomically to `path`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    check, shapes = blake3(), {}
    with open(temporary, "wb") as file:
        for name, dtype in _ARRAYS:
            array = np.ascontiguousarray(getattr(encoded, name), dtype)
            data = array.reshape(-1).view(np.uint8).data
            file.write(data)
            check.update(data)
            shapes[name] = array.shape
        head = {"key": key, "shapes": shapes, "rejects": encoded.rejects.entries}
        text = json.dumps(head).encode()
        check.update(text)
        file.write(text + check.digest() + len(text).to_bytes(8, "little"))
    temporary.replace(path)


def load(path: Path, key: str, *, check: bool) -> Encoded | None:
    """The stored result if it exists, matches `key` and (if `check`) is intact; else None."""
    try:
        with path.open("rb") as file:
            # Mapped, so that the tokens, which are only copied on, take no memory here. Privately,
            # since many FUSE drives support no other map (numpy#9894, safetensors#545).
            data = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        size = int.from_bytes(data[-8:], "little")
        head = json.loads(data[-40 - size : -40])
        whole = memoryview(data)[:-40]
        if head["key"] != key or (check and blake3(whole).digest() != data[-40:-8]):
            return None
        arrays, at, place = {}, 0, None
        for name, dtype in _ARRAYS:
            shape = head["shapes"][name]
            items = int(np.prod(shape))
            arrays[name] = np.frombuffer(data, dtype, items, at).reshape(shape)
            place = Place(path, at)  # of the tokens, which come last
            at += items * dtype.itemsize
        return Encoded(**arrays, rejects=Rejects(head["rejects"]), place=place)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
