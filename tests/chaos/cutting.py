"""Token data of every kind that `sota` opens, read by plain numpy, and how it has to be cut.

`Side` is a split as stored in the files: ours by docs/format.md, other projects' by their own
formats. What follows from it (windows of the stream, best-fit pieces, document boundaries) is
computed here from the documents alone, one at a time, without any code of the program.
`windows.py` makes the data and compares.
"""

import json
import random
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .corpora import EOT, SPLITS

PAD = 50_257
Array = np.ndarray[Any, Any]
LLMC_HEADER = 256  # int32


@dataclass
class Side:
    """One split: its tokens and where each document ends; the last one may be incomplete."""

    tokens: Array
    ends: list[int]

    @property
    def documents(self) -> list[Array]:
        """Each document with its end-of-text."""
        return np.split(self.tokens, self.ends[:-1]) if self.ends else []

    @property
    def numbers(self) -> Array:
        """The document number of every token."""
        return np.repeat(np.arange(len(self.ends)), np.diff([0, *self.ends]))


def prepared(folder: Path, split: str) -> Side:
    """The concatenated shards; documents by their .ends files, not by end-of-text."""
    names = sorted(p for p in folder.glob(f"{split}-*.npy") if p.name.count(".") == 1)
    tokens, ends, at = [np.zeros(0, np.int64)], list[int](), 0
    for path in names:
        tokens.append(np.load(path).astype(np.int64))
        ends += (np.load(path.with_name(f"{path.stem}.ends.npy")).astype(int) + at).tolist()
        at += len(tokens[-1])
        assert ends[-1] == at, f"{path}: the last document does not end where the shard does"
    side = Side(np.concatenate(tokens), ends)
    assert [end - 1 for end in ends] == np.flatnonzero(side.tokens == EOT).tolist()
    return side


def foreign(folder: Path, split: str) -> Side:
    """Raw ids of the files in name order; validation by name; a document ends at EOT."""
    tokens = [np.zeros(0, np.int64)]
    for path in sorted(folder.iterdir()):
        words = re.split("[^a-z]+", path.name.lower())
        side = "val" if {"val", "valid", "validation"} & set(words) else "train"
        if path.suffix in (".bin", ".ds") and side == split and not path.name.startswith("."):
            skipped = 4 * LLMC_HEADER if "llmc" in path.name else 0
            tokens.append(np.frombuffer(path.read_bytes()[skipped:], "<u2").astype(np.int64))
    whole = np.concatenate(tokens)
    ends = (np.flatnonzero(whole == EOT) + 1).tolist()
    return Side(whole, ends if not len(whole) or whole[-1] == EOT else [*ends, len(whole)])


def read(folder: Path) -> dict[str, Side]:
    """Both splits of any folder."""
    ours = (folder / "manifest.json").exists()
    sides = {split: (prepared if ours else foreign)(folder, split) for split in SPLITS}
    for split, side in sides.items() if ours else ():
        told = json.loads((folder / "manifest.json").read_text())["splits"][split]
        assert (len(side.tokens), len(side.ends)) == (told["tokens"], told["documents"])
    return sides


@dataclass
class Cut:
    """Windows (n, T + 1), and for each of their T inputs its document's number."""

    windows: Array
    numbers: Array
    own: int = 0
    """Targets that are padding in the data itself, which no loss counts and no message mentions."""

    @property
    def targets(self) -> int:
        """All targets except padding."""
        return int((self.windows[:, 1:] != PAD).sum())


def stream(side: Side, length: int) -> Cut:
    """Window i is tokens i x T to i x T + T; less than one window is left over."""
    starts = np.arange(max(0, len(side.tokens) - 1) // length) * length
    at = starts[:, None] + np.arange(length + 1)
    assert len(side.tokens) - 1 - len(starts) * length < length
    return Cut(side.tokens[at], side.numbers[at][:, :-1])


def pieces(side: Side, length: int) -> list[tuple[int, int]]:
    """Documents as they fit windows of T + 1: whole, otherwise in parts that share a token.

    So each pair of neighbors within a document is in exactly one part.
    """
    found = []
    for first, end in zip([0, *side.ends], side.ends, strict=False):
        at = first
        while end - at > 1:  # a single token predicts nothing
            stop = min(end, at + length + 1)
            found.append((at, stop))
            at = stop - 1
    pairs = Counter(place for at, stop in found for place in range(at, stop - 1))
    inside = set(range(len(side.tokens) - 1)) - {end - 1 for end in side.ends}
    assert set(pairs) == inside and set(pairs.values()) <= {1}
    return found


def filled(lengths: list[int], size: int) -> list[int]:
    """Fill levels of best-fit windows: longest first, each into the smallest room that fits."""
    rooms = np.zeros(len(lengths), np.int64)
    count = 0
    for length in sorted(lengths, reverse=True):
        fits = np.flatnonzero(rooms[:count] >= length)
        if len(fits):
            rooms[fits[rooms[fits].argmin()]] -= length
        else:
            rooms[count] = size - length
            count += 1
    return sorted((size - rooms[:count]).tolist())


def best_fit(side: Side, length: int, windows: Array) -> tuple[Cut, list[str]]:
    """The program's windows in their own order, taken apart; and what is wrong with them."""
    wanted = Counter(side.tokens[at:stop].tobytes() for at, stop in pieces(side, length))
    tail = side.tokens[([0, *side.ends])[-2] :] if side.ends else side.tokens[:0]
    cut_off = len(tail) > 0 and tail[-1] != EOT
    found, wrong = Counter[bytes](), list[str]()
    numbers = np.full((len(windows), length), -1)
    for row, window in enumerate(windows):
        text = window[: length + 1 - int((window[::-1] == PAD).cumprod().sum())]
        parts = np.split(text, np.flatnonzero(text == EOT) + 1)
        parts = [part for part in parts if len(part)]
        found.update(part.tobytes() for part in parts)
        if parts and parts[-1][-1] != EOT and len(text) <= length and not cut_off:
            wrong.append(f"window {row} ends inside a document too early")
        sizes = [len(part) for part in parts]
        numbers[row, : len(text)] = np.repeat(np.arange(len(sizes)), sizes)[:length]
    if found != wanted:
        lost, strange = wanted - found, found - wanted
        told = [np.frombuffer(key, np.int64)[:30].tolist() for key in [*lost][:1] + [*strange][:1]]
        wrong.append(f"best fit: {len(lost)} pieces lost, {len(strange)} strange: {told}")
    full = sorted((windows != PAD).sum(1).tolist())
    if full != filled([stop - at for at, stop in pieces(side, length)], length + 1):
        wrong.append(f"best fit: {len(full)} windows, not filled longest first")
    return Cut(windows, numbers), wrong


def evenly(count: int, wanted: int) -> list[set[int]]:
    """Which of `count` windows may be the evenly spread ones, including first and last."""
    if wanted == 1:
        return [{0}]
    exact = [(count - 1) * i / (wanted - 1) for i in range(wanted)]
    return [{int(at + 1e-9), int(at)} for at in exact]


def mask(numbers: Array) -> Array:
    """Who may attend to whom: (B, T) -> (B, T, T), back to the start of the own document."""
    size = numbers.shape[-1]
    may = np.zeros((*numbers.shape, size), bool)
    for row, own in enumerate(numbers):
        for at in range(size):
            may[row, at, : at + 1] = own[: at + 1] == own[at]
    return may


def raw(source: random.Random) -> list[list[int]]:
    """Documents of another project: of zero to thousands of tokens, from the whole vocabulary."""
    kind, found = source.choice(["tiny", "giant", "mixed", "mixed", "empty"]), list[list[int]]()
    sizes = {"tiny": [(1, 3)], "giant": [(900, 4000)], "empty": [(0, 0), (0, 5), (20, 40)],
             "mixed": [(1, 9), (5, 60), (60, 300)]}[kind]  # fmt: skip
    for _ in range({"tiny": 600, "giant": 2}.get(kind, source.randint(30, 90))):
        length = source.randint(*source.choice(sizes))
        found.append([source.randrange(EOT) for _ in range(length)])
    return found


def write_foreign(folder: Path, source: random.Random) -> str:
    """A folder as another program leaves it; returns its kind."""
    folder.mkdir()
    kind = source.choice(["nanogpt", "llmc", "megatron", "datatrove"])
    style = source.choice(["behind", "behind", "before", "none", "cut", "cut"])
    pads = source.random() < 0.15
    for split in SPLITS[: 1 if source.random() < 0.08 else 2]:  # some have no validation
        count = source.randint(1, 3) if kind in ("llmc", "datatrove") else 1
        word = source.choice(["val", "validation", "VALID"]) if split == "val" else split
        for number in range(count):
            made, lengths = list[int](), list[int]()
            for document in raw(source):
                own = {"before": [EOT, *document], "none": document}.get(style, [*document, EOT])
                lengths.append(len(own))
                made += own
            if style == "cut":  # as after `head -c`
                made = made[: -source.randint(2, 60)]
                lengths = [len(made)]
            if pads:
                at = source.randrange(len(made))
                made[at : at + 90] = [PAD] * len(made[at : at + 90])
            name = f"{word}.bin" if kind == "nanogpt" else f"{kind}_{word}_{number:03d}"
            _write(folder, kind, name, made, lengths)
    return f"{kind} {style}{' with padding' * pads}"


def _write(folder: Path, kind: str, name: str, made: list[int], lengths: list[int]) -> None:
    """One file of a kind, with its index."""
    ids = np.array(made, "<u2").tobytes()
    if kind == "nanogpt":
        (folder / name).write_bytes(ids)
    elif kind == "llmc":
        head = np.zeros(LLMC_HEADER, "<i4")
        head[:3] = 20240520, 1, len(made)
        (folder / f"{name}.bin").write_bytes(head.tobytes() + ids)
    elif kind == "megatron":  # its version 1: sizes, pointers, documents
        starts = np.cumsum([0, *lengths[:-1]]) * 2
        index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
        index += np.array(lengths, "<i4").tobytes() + starts.astype("<i8").tobytes()
        index += np.arange(len(lengths) + 1, dtype="<i8").tobytes()
        (folder / f"{name}.bin").write_bytes(ids)
        (folder / f"{name}.idx").write_bytes(index)
    else:
        (folder / f"{name}.ds").write_bytes(ids)
        (folder / f"{name}.ds.index").write_bytes(np.cumsum(lengths).astype("<u8").tobytes())
