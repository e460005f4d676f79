"""Near-duplicates: MinHash over token 5-grams finds candidates, their Jaccard index decides.

1. `sketch.sketch`   in the workers: keys and marks of every document of a unit
2. `Similar`         in the merger: documents that share a key are candidates, most of which the
                     marks rule out; a document is dropped if the Jaccard index (size of
                     intersection over size of union) of its 5-grams and those of an earlier kept
                     document reaches the threshold

Both are functions of the documents and their order, so the result is the same on every machine.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.grams import add_run, distinct, gram_order
from sota_transformer.data.sketch import BANDS, GRAM, KEY_BITS, MARKS
from sota_transformer.data.sources import EXAMPLES
from sota_transformer.errors import BAD_DATA, SotaError

_FEW = 2048  # 5-grams compared in full; with more, a sample is compared first, and ...
_FINER = 4  # ... one this many times as large if undecided, until all are compared
_SIGMAS = 4
_AT_ONCE = 1 << 20  # tokens hashed at a time
_KEPT = 1 << 12  # earlier documents whose 5-grams stay in memory, at most 8 kB each
_CACHED, _CACHED_TOKENS = 128, 1 << 16  # finer samples to cache, of documents up to this long
_SEEN_BITS = 24
_LOW = (1 << 32) - 1
_BESIDE = 256  # most documents of its own unit, with the same key, that a document is compared with
_LAST = 8  # the same for earlier units, per run, in addition to the run's first
_PAIRS = 1 << 18  # pairs of documents of one unit examined at a time
_ROWS = 1 << 12  # pairs of marks compared at a time, so that they stay in the CPU cache


@dataclass(frozen=True)
class Place:
    """Location of the tokens of consecutive documents."""

    path: Path
    offset: int
    """Byte offset of the first token."""


@dataclass(frozen=True)
class Batch:
    """Consecutive documents: their lengths, as `sketch` takes them, and what it returns."""

    lengths: NDArray[np.uint32]
    keys: NDArray[np.uint32]
    marks: NDArray[np.uint8]
    place: Place


Sample = tuple[NDArray[np.uint32], int]
"""A document as the sorted set of its 5-grams' numbers; of a long one only one in so many, the
smallest.
"""


class Similar:
    """All documents so far, about 400 bytes each; the kept ones can be found by their keys."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._runs: list[NDArray[np.int64]] = []  # key << 32 | document, in order
        self._seen = np.zeros(1 << _SEEN_BITS, bool)  # by the high bits of the keys in the runs
        self._places: list[Place] = []
        self._where = np.empty((0, 3), np.uint32)  # place, first token, tokens with end-of-text
        self._marks = np.empty((0, MARKS), np.uint8)
        self._count = 0
        self._kept: dict[int, Sample] = {}
        self._cached = lru_cache(_CACHED)(self._finer)
        self.examples: list[tuple[float, NDArray[np.uint16], NDArray[np.uint16]]] = []

    def new(self, batch: Batch, candidates: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of `candidates` are unlike all earlier kept documents: (documents,)."""
        looked = np.flatnonzero(candidates & batch.marks.any(axis=1))
        first, keys = self._count, batch.keys[looked]
        self._add(batch, looked)
        stayed = np.ones(len(looked), bool)
        # Nearly all documents share no key with any other and need no comparison.
        before = self._before(keys)
        for pairs in _batches(keys, first, before, stayed):
            rows, others, known = self._likely(pairs >> 32, pairs & _LOW)
            open_ = distinct(np.concatenate([rows[known == 0], others[known == 0]]))
            sets = self._sets(open_.tolist())
            lists = rows.tolist(), others.tolist(), known.tolist()
            for row, other, index in zip(*lists, strict=True):
                if stayed[row - first] and (other < first or stayed[other - first]):
                    index = index or self._jaccard(row, other, sets)
                    if index >= self._threshold:
                        stayed[row - first] = False
                        self._note(index, row, other)
        self._remember(keys[stayed], np.flatnonzero(stayed) + first)
        stays = candidates.copy()
        stays[looked] = stayed
        return stays

    def add_existing(self, batch: Batch) -> None:
        """Add documents that are kept in any case."""
        looked, first = np.flatnonzero(batch.marks.any(axis=1)), self._count
        self._add(batch, looked)
        self._remember(batch.keys[looked], np.arange(first, self._count))

    def _add(self, batch: Batch, looked: NDArray[np.int64]) -> None:
        """Number the `looked` documents, whether they will be kept or not."""
        start, self._count = self._count, self._count + len(looked)
        if self._count > len(self._where):
            room = self._count + self._count // 8
            for array in (self._where, self._marks):  # in place, to avoid a temporary second copy
                array.resize((room, array.shape[1]), refcheck=False)
        rows = self._where[start : self._count]
        starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        rows[:, 0], rows[:, 1] = len(self._places), starts[looked]
        rows[:, 2] = batch.lengths[looked]
        self._marks[start : self._count] = batch.marks[looked]
        self._places.append(batch.place)

    def _before(self, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Pairs of a document (numbered from 0) and an earlier one with a common key, packed into
        one number each, in order. If many share a key, as texts from a template do: the first and
        the last few of each run.
        """
        flat = keys.reshape(-1)
        at = np.flatnonzero(self._seen[flat >> np.uint32(KEY_BITS - _SEEN_BITS)])
        at = at[np.argsort(flat[at])]  # lookups of neighboring keys are close together
        key, rows = flat[at].astype(np.int64), at // BANDS << 32
        pairs = [np.empty(0, np.int64)]
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, key << 32), len(run) - 1)
            hits = np.flatnonzero(run[place] >> 32 == key)
            last = np.searchsorted(run, key[hits] + 1 << 32) - 1
            pairs.append(rows[hits] | run[place[hits]] & _LOW)
            for back in range(_LAST):
                more = last - back > place[hits]
                pairs.append(rows[hits[more]] | run[last[more] - back] & _LOW)
        return distinct(np.concatenate(pairs))

    def _likely(
        self, rows: NDArray[np.int64], others: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """The pairs that may be near-duplicates by their marks, likeliest first for each row, and
        their Jaccard index where the marks determine it well enough, else 0.

        The share of equal marks, among the `seen` bins in which either document has a 5-gram, is an
        estimate of the Jaccard index from a sample of the 5-grams, with a sampling error. For long
        documents it is as good as any other sample; short ones are always compared in full.
        """
        same, seen = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for at in range(0, len(rows), _ROWS):
            part = slice(at, at + _ROWS)
            a, b = self._marks[rows[part]], self._marks[others[part]]
            seen[part] = ((a | b) != 0).sum(axis=1, dtype=np.uint16)
            same[part] = (a == b).sum(axis=1, dtype=np.uint16)
        share = (same - (MARKS - seen)) / seen
        a, b = self._where[rows, 2].astype(np.int64), self._where[others, 2].astype(np.int64)
        union = (a + b - 2 * GRAM) / (1 + self._threshold)  # upper bound for near-duplicates
        error = tolerance(self._threshold, seen) * np.sqrt(np.maximum(1 - seen / union, 1 / 16))
        open_ = np.flatnonzero(share >= self._threshold - error)
        order = open_[np.lexsort((others[open_], -share[open_], rows[open_]))]
        sure = (share >= self._threshold + error) & (np.maximum(a, b) - GRAM > _FEW)
        return rows[order], others[order], np.where(sure, share, 0.0)[order]

    def _sets(self, numbers: list[int]) -> dict[int, Sample]:
        """What documents are first compared by; the most recently used stay in memory."""
        known = {n: self._kept.pop(n) for n in numbers if n in self._kept}
        missing = [n for n in numbers if n not in known]
        while missing:
            sizes = np.cumsum(self._where[missing, 2], dtype=np.int64)
            count = 1 + int(np.searchsorted(sizes, _AT_ONCE))
            known |= self._hashed(missing[:count])
            missing = missing[count:]
        self._kept |= known
        for n in list(self._kept)[: max(0, len(self._kept) - _KEPT)]:
            del self._kept[n]
        return known

    def _hashed(self, numbers: list[int]) -> dict[int, Sample]:
        """The same, computed for all together, which costs less for short documents."""
        texts, found, at = [self._ids(n) for n in numbers], dict[int, Sample](), 0
        order = gram_order(np.concatenate(texts), GRAM)
        for number, ids in zip(numbers, texts, strict=True):
            # After each document's own 5-grams come those that extend into the next document.
            count = max(0, len(ids) - GRAM + 1)
            share = 1 << (max(0, count - 1) // _FEW).bit_length()
            found[number] = _smallest(order[at : at + count], share), share
            at += len(ids)
        return found

    def _ids(self, number: int) -> NDArray[np.uint16]:
        """Read a document's tokens, without end-of-text."""
        place, start, count = self._where[number].tolist()
        known = self._places[place]
        file = os.open(known.path, os.O_RDONLY)
        try:
            data = os.pread(file, 2 * (count - 1), known.offset + 2 * start)
        finally:
            os.close(file)
        if len(data) != 2 * (count - 1):
            raise SotaError(f"{known.path} was truncated while in use; prepare again", BAD_DATA)
        return np.frombuffer(data, np.uint16)

    def _finer(self, number: int, share: int) -> NDArray[np.uint32]:
        """One in `share` of a long document's 5-grams. Among 8,192 distinct ones, two collide with
        probability 1/128.
        """
        return _smallest(gram_order(self._ids(number), GRAM), share)

    def _jaccard(self, a: int, b: int, sets: dict[int, Sample]) -> float:
        """The Jaccard index of two documents' 5-grams, as precisely as the decision needs."""
        (first, share), (second, other) = sets[a], sets[b]
        if share != other:  # the coarser sample is the beginning of the finer one
            share = max(share, other)
            first, second = (x[x <= _limit(share)] for x in (first, second))
        index, union = jaccard(first, second)
        while share > 1 and abs(index - self._threshold) < tolerance(self._threshold, union):
            share = max(1, share // _FINER)
            long = self._where[[a, b], 2].max() > _CACHED_TOKENS
            finer = self._finer if long else self._cached  # repeated requests are common
            index, union = jaccard(finer(a, share), finer(b, share))
        return index

    def _note(self, index: float, a: int, b: int) -> None:
        """Keep the first pairs as examples for the user."""
        if len(self.examples) < EXAMPLES:
            self.examples.append((index, self._ids(a), self._ids(b)))

    def _remember(self, keys: NDArray[np.uint32], numbers: NDArray[np.int64]) -> None:
        """Make kept documents, by their keys, candidates for later ones."""
        self._seen[keys >> np.uint32(KEY_BITS - _SEEN_BITS)] = True
        run = (keys.astype(np.int64) << 32 | numbers[:, None]).reshape(-1)
        run.sort()
        add_run(self._runs, run)


def _batches(
    keys: NDArray[np.uint32], first: int, before: NDArray[np.int64], stayed: NDArray[np.bool_]
) -> Iterator[NDArray[np.int64]]:
    """All pairs of a document and an earlier one to compare, packed into one number each, in
    document order and in batches: the pairs in `before`, and those that share a key in this unit.

    Documents that the caller marks as dropped in `stayed` are left out of later batches. `first`
    is the number of the unit's first document.
    """
    flat, done = keys.reshape(-1), 0
    at = np.argsort(flat, kind="stable")
    flat, rows = flat[at], at // BANDS
    while done < len(keys):
        # How many documents with the same key come before; the first and the last ones are used.
        new = np.ones(len(flat), bool)
        np.not_equal(flat[1:], flat[:-1], out=new[1:])
        place = np.arange(len(flat))
        group = np.maximum.accumulate(np.where(new, place, 0))
        count = np.minimum(place - group, _BESIDE)
        sums = np.cumsum(np.bincount(rows, count, len(keys))[done:])
        end = done + max(1, int(np.searchsorted(sums, _PAIRS, "right")))
        mine = place[(count > 0) & (rows >= done) & (rows < end)]
        count = count[mine]
        mine = np.repeat(mine, count)
        back = np.arange(len(mine)) - np.repeat(np.cumsum(count) - count, count) + 1
        other = np.where(back == _BESIDE, group[mine], mine - back)
        beside = rows[mine] << 32 | rows[other] + first
        part = slice(*np.searchsorted(before, [done << 32, end << 32]).tolist())
        pairs = np.concatenate([before[part], distinct(beside)])
        if len(pairs):
            yield pairs + (first << 32)
        there = stayed[rows]
        flat, rows, done = flat[there], rows[there], end


def _limit(share: int) -> np.uint32:
    """The largest number that belongs to a sample of one in `share`."""
    return np.uint32((1 << 32) // share - 1)


def _smallest(order: NDArray[np.uint32], share: int) -> NDArray[np.uint32]:
    """The sorted distinct numbers that belong to a sample of one in `share`."""
    return distinct(order if share == 1 else order[np.flatnonzero(order <= _limit(share))])


def jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> tuple[float, int]:
    """The Jaccard index of two sorted sets, and the size of their union."""
    both = np.concatenate([a, b])
    both.sort(kind="stable")  # merges the two sorted parts
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    union = max(1, len(both) - common)
    return common / union, union


def tolerance(threshold: float, seen: Any) -> Any:
    """Four standard deviations of a proportion measured on `seen` samples whose mean is
    `threshold`; near a mean of 1, where they would vanish, at least those for 31/32.
    """
    return _SIGMAS * np.sqrt(max(threshold * (1 - threshold), 1 / 32) / seen)
