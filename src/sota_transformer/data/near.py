"""Near-duplicates: MinHash over token 5-grams to find candidates, exact Jaccard to decide.

1. `sketch`    a worker's part: one-permutation MinHash of every document of a unit
2. `Similar`   the merger's part: documents that share a band of their sketch are candidates; a
               document goes if its 5-grams overlap with those of an earlier one that stayed by at
               least the threshold (size of intersection over size of union)

Both are functions of the documents and their order, so the result is the same on every machine.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.grams import gram_hashes

GRAM = 5
BINS, _ROWS = 64, 4
BANDS = BINS // _ROWS
_PER_BIN = 8  # grams looked at for each bin: it stays empty though it should not with p = exp(-8)
_EMPTY = np.uint32(0xFFFFFFFF)
_STEP = 0x9E3779B9
_MIX = np.uint64(0xD6E8FEB86659FD93)
_ENOUGH_GRAMS = 4096  # to know the Jaccard index of long documents to a hundredth ...
_UNSURE = 0.03  # ... and so near the threshold, four standard deviations, all of them are counted
_CACHED, _CACHED_TOKENS = 256, 1 << 16  # documents kept in memory, the longest of them
_DOUBT = 0.22  # four standard deviations of the share of equal bins


def sketch(tokens: NDArray[np.uint16], lengths: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MinHash of each document: (documents, BINS).

    `tokens` holds the documents one after another, each closed by end-of-text, `lengths` long.
    """
    signature = np.full((len(lengths), BINS), _EMPTY, np.uint32)
    hashes = gram_hashes(tokens, GRAM, np.uint32)
    ends = np.cumsum(lengths, dtype=np.int64)
    grams = np.maximum(0, lengths.astype(np.int64) - GRAM)
    # Only the smallest values of a bin matter, so of a long document only its small hashes do.
    share = np.minimum(1.0, _PER_BIN * BINS / np.maximum(1, grams))
    limit = np.minimum(share * 2.0**32, 2.0**32 - 1).astype(np.uint32)
    small = hashes <= np.repeat(limit, lengths)[: len(hashes)]
    # No gram may reach over its document's end.
    last = np.maximum(ends[:, None] - np.arange(1, GRAM + 1), (ends - lengths)[:, None])
    small[last[last < len(small)]] = False
    chosen = np.flatnonzero(small)
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[chosen]
    kept = hashes[chosen]
    cell = document.astype(np.int64) * BINS + (kept & np.uint32(BINS - 1))
    np.minimum.at(signature.reshape(-1), cell, kept // np.uint32(BINS))
    return _dense(signature)


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


def _grams(ids: NDArray[np.uint16], share: int) -> NDArray[np.uint32]:
    """The different 5-grams of a document, sorted; of a long one every `share`-th, by its hash."""
    hashes = gram_hashes(ids, GRAM, np.uint32)  # two of 8,192 are equal by chance once in 128 times
    if share > 1:
        hashes = hashes[hashes & np.uint32(share - 1) == 0]
    hashes.sort()
    first = np.ones(len(hashes), bool)
    np.not_equal(hashes[1:], hashes[:-1], out=first[1:])
    return hashes[first]


def _jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """Size of the intersection over size of the union of two sorted sets."""
    both = np.sort(np.concatenate([a, b]))
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / (len(both) - common)


class _Text:
    """A document's 5-grams, made when they are first asked for."""

    def __init__(self, ids: NDArray[np.uint16]) -> None:
        self.ids = ids
        self._grams: dict[int, NDArray[np.uint32]] = {}

    def grams(self, share: int) -> NDArray[np.uint32]:
        """See `_grams`."""
        if share not in self._grams:
            self._grams[share] = _grams(self.ids, share)
        return self._grams[share]


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
        self._cached = lru_cache(_CACHED)(self._read)
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
        here: dict[int, list[int]] = {}
        texts: dict[int, _Text] = {}
        # Nearly all documents share no band with any other: they are done here.
        for row in np.flatnonzero(
            _shared(keys) | np.isin(np.arange(len(keys)), [*before])
        ).tolist():
            document, bands = int(looked[row]), keys[row].tolist()
            text = _Text(tokens[starts[document] : ends[document] - 1])
            beside = list({n for band in bands for n in here.get(band, ())})
            likely = self._likely(marks, [document] * len(beside), marks, beside)
            if any(self._alike(text, texts[n]) for _, n in likely) or any(
                self._alike(text, self._known(n)) for n in before.get(row, ())
            ):
                stays[document] = False
                continue
            texts[document] = text
            for band in bands:
                here.setdefault(band, []).append(document)
        kept = stays[looked]
        self._remember(keys[kept], looked[kept], starts, lengths, marks, place)
        return stays

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

    def _known(self, other: int) -> _Text:
        """An earlier document; many are like the same one, so the last are kept."""
        small = self._where[other, 2] <= _CACHED_TOKENS
        return self._cached(other) if small else self._read(other)

    def _read(self, other: int) -> _Text:
        """An earlier document, from where it lies."""
        place, start, count = self._where[other].tolist()
        known = self._places[place]
        with known.path.open("rb") as file:
            file.seek(known.offset + 2 * start)
            return _Text(np.frombuffer(file.read(2 * (count - 1)), np.uint16))

    def _alike(self, a: _Text, b: _Text) -> bool:
        """Whether the Jaccard index of two documents' 5-grams reaches the threshold."""
        longer = max(len(a.ids), len(b.ids))
        share = 1 << max(0, (longer // _ENOUGH_GRAMS).bit_length() - 1)
        small, large = sorted((len(a.grams(share)), len(b.grams(share))))
        if not small or small < (self._threshold - _UNSURE) * large:
            return False
        jaccard = _jaccard(a.grams(share), b.grams(share))
        if share > 1 and abs(jaccard - self._threshold) < _UNSURE:
            jaccard = _jaccard(a.grams(1), b.grams(1))
        if jaccard >= self._threshold and len(self.examples) < 5:
            self.examples.append((jaccard, a.ids.copy(), b.ids.copy()))
        return jaccard >= self._threshold

    def _lookup(self, keys: NDArray[np.uint32], marks: NDArray[np.uint8]) -> dict[int, list[int]]:
        """Earlier documents that share a band and may be alike, for each row that has any."""
        flat = keys.reshape(-1)
        pairs = [np.empty(0, np.int64)]
        for run, owners in self._runs:
            at = np.minimum(np.searchsorted(run, flat), len(run) - 1)
            hits = np.flatnonzero(run[at] == flat)
            pairs.append((hits // BANDS << 32) + owners[at[hits]])
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
