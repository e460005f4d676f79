"""Near-duplicates: MinHash over token 5-grams to find candidates, exact Jaccard to decide.

1. `sketch`    a worker's part: one-permutation MinHash of every document of a unit
2. `Similar`   the merger's part: documents that share a band of their sketch are candidates; a
               document goes if its 5-grams overlap with those of an earlier one that stayed by at
               least the threshold (size of intersection over size of union)

Both are functions of the documents and their order, so the result is the same on every machine.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.alike import FINER, GRAM, Text, grams_of, jaccard, texts
from sota_transformer.data.grams import gram_order, mixed
from sota_transformer.errors import BAD_DATA, SotaError

_BIN_BITS = 6
BINS, _ROWS = 1 << _BIN_BITS, 4
BANDS = BINS // _ROWS
_PER_BIN = 8  # grams looked at for each bin: it stays empty though it should not with p = exp(-8)
_EMPTY = np.uint32(0xFFFFFFFF)
_STEP = 0x9E3779B9
_MIX = np.uint64(0xD6E8FEB86659FD93)
_KEPT = 1 << 13  # earlier documents whose 5-grams stay in memory, at most 8 kB each
_CACHED, _CACHED_TOKENS = 128, 1 << 16  # long ones of which more than a share stay, the longest
_DOUBT = 0.22  # four standard deviations of the share of equal bins


def sketch(tokens: NDArray[np.uint16], lengths: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MinHash of each document: (documents, BINS).

    `tokens` holds the documents one after another, each closed by end-of-text, `lengths` long.
    """
    signature = np.full((len(lengths), BINS), _EMPTY, np.uint32)
    order = gram_order(tokens, GRAM)
    ends = np.cumsum(lengths, dtype=np.int64)
    grams = np.maximum(0, lengths.astype(np.int64) - GRAM)
    small = np.ones(len(order), bool)
    # Only the smallest values of a bin matter, so of a long document only its small ones do.
    for n in np.flatnonzero(grams > _PER_BIN * BINS).tolist():
        own = slice(int(ends[n] - lengths[n]), int(ends[n]))
        limit = np.uint32(_PER_BIN * BINS / grams[n] * 2.0**32)
        np.less_equal(order[own], limit, out=small[own])
    # No gram may reach over its document's end.
    last = np.maximum(ends[:, None] - np.arange(1, GRAM + 1), (ends - lengths)[:, None])
    small[last[last < len(small)]] = False
    chosen = np.flatnonzero(small)
    counts = np.diff(np.searchsorted(chosen, ends), prepend=0)
    document = np.repeat(np.arange(len(lengths)), counts)
    kept = order[chosen]
    cell = document * BINS + (kept * np.uint32(_STEP) >> np.uint32(32 - _BIN_BITS))
    np.minimum.at(signature.reshape(-1), cell, kept)
    return _dense(np.where(signature == _EMPTY, _EMPTY, mixed(signature)))


def _dense(signature: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Empty bins borrow from the next that is not, marked by the distance; no document, no change.

    Short documents leave many empty: without this they would all look alike there.
    """
    source = signature.copy()
    for distance in range(1, BINS):
        rows = np.flatnonzero((signature == _EMPTY).any(axis=1))
        if not len(rows):
            break
        borrowed, now = np.roll(source[rows], -distance, axis=1), signature[rows]
        fill = (now == _EMPTY) & (borrowed != _EMPTY)
        now[fill] = borrowed[fill] + np.uint32(distance * _STEP % 2**32)
        signature[rows] = now
    return signature


def _bands(signature: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A key for each band of each sketch: (documents, BANDS)."""
    keys = np.zeros((len(signature), BANDS), np.uint64)
    parts = signature.reshape(len(signature), BANDS, _ROWS).astype(np.uint64)
    for row in range(_ROWS):
        keys = (keys ^ parts[:, :, row]) * _MIX
        keys ^= keys >> np.uint64(29)
    keys += np.arange(BANDS, dtype=np.uint64) * _MIX
    return (keys >> np.uint64(32)).astype(np.uint32)


def _shared(keys: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which documents share a key with another of these: (documents,)."""
    flat = keys.reshape(-1)
    order = np.argsort(flat)
    same = flat[order[1:]] == flat[order[:-1]]
    found = np.zeros(len(keys), bool)
    found[order[1:][same] // BANDS] = True
    found[order[:-1][same] // BANDS] = True
    return found


@dataclass(frozen=True)
class Place:
    """Where the tokens of a run of documents lie."""

    path: Path
    offset: int
    """Byte of the first token."""


class Similar:
    """All documents that stayed so far, by the bands of their sketches.

    About 250 bytes each: keys of 32 bits, and of each bin 8 bits, for what they let through in vain
    is found out by its 5-grams.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._runs: list[tuple[NDArray[np.uint32], NDArray[np.int32]]] = []
        self._places: list[Place] = []
        self._where = np.empty((0, 3), np.uint32)  # place, first token, tokens
        self._marks = np.empty((0, BINS), np.uint8)
        self._count = 0
        self._kept: dict[int, Text] = {}
        self._cached = lru_cache(_CACHED)(self._finer)
        self.examples: list[tuple[float, NDArray[np.uint16], NDArray[np.uint16]]] = []

    def new(
        self,
        tokens: NDArray[np.uint16],
        lengths: NDArray[np.uint32],
        signature: NDArray[np.uint32],
        candidates: NDArray[np.bool_],
        place: Place,
    ) -> NDArray[np.bool_]:
        """Which of `candidates` are like no earlier document that stayed: (documents,)."""
        stays = candidates.copy()
        looked = np.flatnonzero(candidates & (signature != _EMPTY).any(axis=1))
        marks = signature.astype(np.uint8)
        keys = _bands(signature[looked])
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        before = self._lookup(keys, marks[looked])
        # Nearly all documents share no band with any other: they are done here.
        asked = np.flatnonzero(_shared(keys) | np.isin(np.arange(len(keys)), [*before]))
        known = self._known(sorted({other for others in before.values() for other in others}))
        here: dict[int, list[int]] = {}
        found: dict[int, Text] = {}
        documents = [tokens[starts[n] : ends[n] - 1] for n in looked[asked].tolist()]
        for row, text in zip(asked.tolist(), texts(documents), strict=True):
            document, bands = int(looked[row]), keys[row].tolist()
            beside = list({n for band in bands for n in here.get(band, ())})
            likely = self._likely(marks, [document] * len(beside), marks, beside)
            if any(self._alike(text, found[n]) for _, n in likely) or any(
                self._alike(text, known[n]) for n in before.get(row, ())
            ):
                stays[document] = False
                continue
            found[document] = text
            for band in bands:
                here.setdefault(band, []).append(document)
        kept = stays[looked]
        for number, document in enumerate(looked[kept].tolist(), self._count):
            if document in found:
                self._keep(found[document].bare(number))
        self._remember(keys[kept], looked[kept], starts, lengths, marks, place)
        return stays

    def _keep(self, text: Text) -> None:
        """Earlier documents' 5-grams stay in memory, the last that were asked for."""
        self._kept[text.number] = text
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]

    def _known(self, numbers: list[int]) -> dict[int, Text]:
        """Earlier documents."""
        known = {n: self._kept.pop(n) for n in numbers if n in self._kept}
        missing = [n for n in numbers if n not in known]
        for n, text in zip(missing, texts(map(self._read, missing)), strict=True):
            known[n] = text.bare(n)
        for text in known.values():
            self._keep(text)
        return known

    def _likely(
        self, a: NDArray[np.uint8], rows: Any, b: NDArray[np.uint8], others: Any
    ) -> list[tuple[int, int]]:
        """Those of the pairs (row of `a`, row of `b`) whose sketches leave it open whether they are
        alike, for their estimate is off by a sixteenth or so; the likeliest first for each row.
        """
        if not len(others):
            return []
        rows, others = np.asarray(rows), np.asarray(others)
        equal = np.count_nonzero(a[rows] == b[others], axis=1)
        open_ = equal >= BINS * (self._threshold - _DOUBT)
        rows, others, equal = rows[open_], others[open_], equal[open_]
        order = np.lexsort((others, -equal, rows))
        return list(zip(rows[order].tolist(), others[order].tolist(), strict=True))

    def _read(self, other: int) -> NDArray[np.uint16]:
        """An earlier document without its end-of-text, from where it lies."""
        place, start, count = self._where[other].tolist()
        known = self._places[place]
        file = os.open(known.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(file, 2 * (count - 1), known.offset + 2 * start)
        finally:
            os.close(file)
        if len(data) != 2 * (count - 1):
            raise SotaError(f"{known.path} is shorter than it was; prepare anew", BAD_DATA)
        return np.frombuffer(data, np.uint16)

    def _ids(self, text: Text) -> NDArray[np.uint16]:
        """A document without its end-of-text."""
        return self._read(text.number) if text.ids is None else text.ids

    def _grams(self, text: Text, share: int) -> NDArray[np.uint32]:
        """Every `share`-th 5-gram of a long document; the same ones are asked for often."""
        if text.ids is None:
            small = self._where[text.number, 2] <= _CACHED_TOKENS
            return (self._cached if small else self._finer)(text.number, share)
        if text.fine is None or text.fine[0] != share:
            text.fine = share, grams_of(text.ids, share)
        return text.fine[1]

    def _finer(self, other: int, share: int) -> NDArray[np.uint32]:
        """The same of an earlier document."""
        return grams_of(self._read(other), share)

    def _alike(self, a: Text, b: Text) -> bool:
        """Whether the Jaccard index of two documents' 5-grams reaches the threshold."""
        share = max(a.share, b.share)
        sets = a.at(share), b.at(share)
        if share == 1 and min(map(len, sets)) < self._threshold * max(map(len, sets)):
            return False
        index, doubt = jaccard(*sets, self._threshold)
        for finer in (share // FINER, 1):
            if share == 1 or abs(index - self._threshold) >= doubt:
                break
            share = max(1, finer)
            sets = self._grams(a, share), self._grams(b, share)
            index, doubt = jaccard(*sets, self._threshold)
        if index >= self._threshold and len(self.examples) < 5:
            self.examples.append((index, self._ids(a).copy(), self._ids(b).copy()))
        return index >= self._threshold

    def _lookup(self, keys: NDArray[np.uint32], marks: NDArray[np.uint8]) -> dict[int, list[int]]:
        """Earlier documents that share a band and may be alike, for each row that has any."""
        order = np.argsort(keys, axis=None)  # neighbours are found near each other
        flat, rows = keys.reshape(-1)[order], order // BANDS << 32
        pairs = [np.empty(0, np.int64)]
        for run, owners in self._runs:
            at = np.minimum(np.searchsorted(run, flat), len(run) - 1)
            hits = np.flatnonzero(run[at] == flat)
            pairs.append(rows[hits] + owners[at[hits]])
        pair = np.unique(np.concatenate(pairs))
        found: dict[int, list[int]] = {}
        for row, other in self._likely(marks, pair >> 32, self._marks, pair & 0xFFFFFFFF):
            found.setdefault(row, []).append(other)
        return found

    def _remember(
        self,
        keys: NDArray[np.uint32],
        documents: NDArray[Any],
        starts: NDArray[np.int64],
        lengths: NDArray[np.uint32],
        marks: NDArray[np.uint8],
        place: Place,
    ) -> None:
        """Documents that stayed, with their keys, become candidates for all that come."""
        if not len(documents):
            return
        rows = np.empty((len(documents), 3), np.uint32)
        rows[:, 0], rows[:, 1], rows[:, 2] = (
            len(self._places),
            starts[documents],
            lengths[documents],
        )
        numbers = np.arange(self._count, self._count + len(documents), dtype=np.int32)
        owners = np.repeat(numbers, BANDS)
        self._places.append(place)
        if self._count + len(rows) > len(self._where):
            grown = np.empty((3 * (self._count + len(rows)) // 2, 3), np.uint32)
            grown[: self._count] = self._where[: self._count]
            self._where = grown
            grown_marks = np.empty((len(grown), BINS), np.uint8)
            grown_marks[: self._count] = self._marks[: self._count]
            self._marks = grown_marks
        self._where[self._count : self._count + len(rows)] = rows
        self._marks[self._count : self._count + len(rows)] = marks[documents]
        self._count += len(rows)
        run = keys.reshape(-1)
        while self._runs and len(self._runs[-1][0]) <= max(len(run), 1 << 18):
            older, old_owners = self._runs.pop()
            run, owners = np.concatenate([older, run]), np.concatenate([old_owners, owners])
        order = np.argsort(run, kind="stable")  # of equal keys the earliest document comes first
        self._runs.append((run[order], owners[order]))
