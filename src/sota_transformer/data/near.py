"""Near-duplicates: MinHash over token 5-grams to find candidates, their Jaccard index to decide.

1. `sketch.sketch`   a worker's part: keys and marks of every document of a unit
2. `Similar`         the merger's part: documents that share a key are candidates, most of which the
                     marks rule out; a document goes if its 5-grams overlap with those of an earlier
                     one that stayed by at least the threshold (size of intersection over size of
                     union)

Both are functions of the documents and their order, so the result is the same on every machine.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.grams import distinct, gram_order
from sota_transformer.data.sketch import BANDS, GRAM, KEY_BITS, MARKS
from sota_transformer.data.sources import EXAMPLES
from sota_transformer.errors import BAD_DATA, SotaError

_FEW = 2048  # 5-grams; of more a share is looked at first, then ...
_FINER = 4  # ... one so many times as large, if that leaves it open, and only then all of them
_SIGMAS = 4
_AT_ONCE = 1 << 20  # tokens hashed in one go
_KEPT = 1 << 12  # earlier documents whose 5-grams stay in memory, at most 8 kB each
_CACHED, _CACHED_TOKENS = 128, 1 << 16  # long ones of which more than a share stay, the longest
_SEEN_BITS = 24
_LOW = (1 << 32) - 1
_BESIDE = 256  # documents of its unit that one is compared with, of those with the same key
_LAST = 8  # of those before its unit, beside the first of each run
_PAIRS = 1 << 18  # pairs of documents of one unit looked at in one go
_ROWS = 1 << 12  # pairs of marks compared in one go, so that they stay in the cache


@dataclass(frozen=True)
class Place:
    """Where the tokens of a run of documents lie."""

    path: Path
    offset: int
    """Byte of the first token."""


@dataclass(frozen=True)
class Batch:
    """Documents one behind another, as `sketch` takes them, and what it gives."""

    tokens: NDArray[np.uint16]
    lengths: NDArray[np.uint32]
    keys: NDArray[np.uint32]
    marks: NDArray[np.uint8]
    place: Place


@dataclass(slots=True)
class Text:
    """A document as the sorted set of its 5-grams' numbers; of a long one, those of every
    `share`-th, which are the smallest.
    """

    number: int
    grams: NDArray[np.uint32]
    share: int

    def at(self, share: int) -> NDArray[np.uint32]:
        """The 5-grams of a multiple of its own share."""
        if share == self.share:
            return self.grams
        return self.grams[: int(np.searchsorted(self.grams, _limit(share), "right"))]


class Similar:
    """All documents so far, about 400 bytes each; found by their keys are those that stayed."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._runs: list[NDArray[np.int64]] = []  # key << 32 | document, in order
        self._seen = np.zeros(1 << _SEEN_BITS, bool)  # by the high bits of the keys in the runs
        self._places: list[Place] = []
        self._where = np.empty((0, 3), np.uint32)  # place, first token, tokens with end-of-text
        self._marks = np.empty((0, MARKS), np.uint8)
        self._count = 0
        self._tokens = np.empty(0, np.uint16)  # what lies at the last place
        self._kept: dict[int, Text] = {}
        self._cached = lru_cache(_CACHED)(self._finer)
        self.examples: list[tuple[float, NDArray[np.uint16], NDArray[np.uint16]]] = []

    def new(self, batch: Batch, candidates: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of `candidates` are like no earlier document that stayed: (documents,)."""
        looked = np.flatnonzero(candidates & batch.marks.any(axis=1))
        first, keys = self._count, batch.keys[looked]
        self._add(batch, looked)
        stayed = np.ones(len(looked), bool)
        # Nearly all documents share no key with any other: there is nothing to be done for them.
        before = self._before(keys)
        for pairs in _batches(keys, first, before, stayed):
            rows, others, known = self._likely(pairs >> 32, pairs & _LOW)
            open_ = distinct(np.concatenate([rows[known == 0], others[known == 0]]))
            sets = self._sets(open_.tolist())
            lists = rows.tolist(), others.tolist(), known.tolist()
            for row, other, index in zip(*lists, strict=True):
                if stayed[row - first] and (other < first or stayed[other - first]):
                    index = index or self._jaccard(sets[row], sets[other])
                    if index >= self._threshold:
                        stayed[row - first] = False
                        self._note(index, row, other)
        self._remember(keys[stayed], np.flatnonzero(stayed) + first)
        stays = candidates.copy()
        stays[looked] = stayed
        return stays

    def know(self, batch: Batch) -> None:
        """Documents that are there whatever they are like."""
        looked, first = np.flatnonzero(batch.marks.any(axis=1)), self._count
        self._add(batch, looked)
        self._remember(batch.keys[looked], np.arange(first, self._count))

    def _add(self, batch: Batch, looked: NDArray[np.int64]) -> None:
        """Those of the documents get the next numbers, whether they will stay or not."""
        start, self._count = self._count, self._count + len(looked)
        if self._count > len(self._where):
            room = self._count + self._count // 8
            for array in (self._where, self._marks):  # in place: no second copy for a while
                array.resize((room, array.shape[1]), refcheck=False)
        rows = self._where[start : self._count]
        starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        rows[:, 0], rows[:, 1] = len(self._places), starts[looked]
        rows[:, 2] = batch.lengths[looked]
        self._marks[start : self._count] = batch.marks[looked]
        self._places.append(batch.place)
        self._tokens = batch.tokens

    def _before(self, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Documents (numbered from 0) and earlier ones with a key of theirs, two numbers in one, in
        order. Of the many that a template has, those are the first and the last few of each run.
        """
        flat = keys.reshape(-1)
        at = np.flatnonzero(self._seen[flat >> np.uint32(KEY_BITS - _SEEN_BITS)])
        at = at[np.argsort(flat[at])]  # neighbours are found near each other
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
        """Those of the pairs that may be alike by their marks, the likeliest first for each row,
        and their Jaccard index where it need not be counted, else 0.

        Of the `seen` bins in which one of the two has a gram, a share is the same. Were those all
        of their 5-grams, that would be their Jaccard index; as a sample of them it leaves a doubt.
        For a long document it is as good as any other sample; short ones are always counted.
        """
        same, seen = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for at in range(0, len(rows), _ROWS):
            part = slice(at, at + _ROWS)
            a, b = self._marks[rows[part]], self._marks[others[part]]
            seen[part] = ((a | b) != 0).sum(axis=1, dtype=np.uint16)
            same[part] = (a == b).sum(axis=1, dtype=np.uint16)
        share = (same - (MARKS - seen)) / seen
        a, b = self._where[rows, 2].astype(np.int64), self._where[others, 2].astype(np.int64)
        union = (a + b - 2 * GRAM) / (1 + self._threshold)  # at most, if they are alike
        error = doubt(self._threshold, seen) * np.sqrt(np.maximum(1 - seen / union, 1 / 16))
        open_ = np.flatnonzero(share >= self._threshold - error)
        order = open_[np.lexsort((others[open_], -share[open_], rows[open_]))]
        sure = (share >= self._threshold + error) & (np.maximum(a, b) - GRAM > _FEW)
        return rows[order], others[order], np.where(sure, share, 0.0)[order]

    def _sets(self, numbers: list[int]) -> dict[int, Text]:
        """Documents as sets of 5-grams; those of the last that were asked for stay in memory."""
        known = {n: self._kept.pop(n) for n in numbers if n in self._kept}
        missing = [n for n in numbers if n not in known]
        known |= {text.number: text for text in texts((n, self._ids(n)) for n in missing)}
        self._kept |= known
        for n in list(self._kept)[: max(0, len(self._kept) - _KEPT)]:
            del self._kept[n]
        return known

    def _ids(self, number: int) -> NDArray[np.uint16]:
        """A document without its end-of-text, from where it lies."""
        place, start, count = self._where[number].tolist()
        if place == len(self._places) - 1:
            return self._tokens[start : start + count - 1]
        known = self._places[place]
        file = os.open(known.path, os.O_RDONLY)
        try:
            data = os.pread(file, 2 * (count - 1), known.offset + 2 * start)
        finally:
            os.close(file)
        if len(data) != 2 * (count - 1):
            raise SotaError(f"{known.path} is shorter than it was; prepare anew", BAD_DATA)
        return np.frombuffer(data, np.uint16)

    def _grams(self, text: Text, share: int) -> NDArray[np.uint32]:
        """Every `share`-th 5-gram of a long document; the same ones are asked for often."""
        small = self._where[text.number, 2] <= _CACHED_TOKENS
        return (self._cached if small else self._finer)(text.number, share)

    def _finer(self, number: int, share: int) -> NDArray[np.uint32]:
        """The same, counted; two of 8,192 different ones have one number once in 128 times."""
        return distinct(_every(gram_order(self._ids(number), GRAM), share))

    def _jaccard(self, a: Text, b: Text) -> float:
        """The Jaccard index of two documents' 5-grams, as far as it takes to decide."""
        share = max(a.share, b.share)
        sets = a.at(share), b.at(share)
        if share == 1 and min(map(len, sets)) < self._threshold * max(map(len, sets)):
            return 0.0
        index, union = jaccard(*sets)
        while share > 1 and abs(index - self._threshold) < doubt(self._threshold, union):
            share = max(1, share // _FINER)
            sets = self._grams(a, share), self._grams(b, share)
            index, union = jaccard(*sets)
        return index

    def _note(self, index: float, a: int, b: int) -> None:
        """The first pairs are told to the user."""
        if len(self.examples) < EXAMPLES:
            self.examples.append((index, self._ids(a).copy(), self._ids(b).copy()))

    def _remember(self, keys: NDArray[np.uint32], numbers: NDArray[np.int64]) -> None:
        """Documents that stayed, with their keys, become candidates for all that come."""
        if not len(numbers):
            return
        self._seen[keys >> np.uint32(KEY_BITS - _SEEN_BITS)] = True
        run = (keys.astype(np.int64) << 32 | numbers[:, None]).reshape(-1)
        run.sort()
        while self._runs and len(self._runs[-1]) <= 4 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # merges what is sorted already
        self._runs.append(run)


def _batches(
    keys: NDArray[np.uint32], first: int, before: NDArray[np.int64], stayed: NDArray[np.bool_]
) -> Iterator[NDArray[np.int64]]:
    """All pairs of a document and an earlier one to look at, two numbers in one, in the order of
    the documents and some of these at a time: those `before`, and those with a key in common here.

    Who did not stay, as the caller notes in `stayed`, is left out of what comes then. `first` is
    the number of the first document.
    """
    flat, done = keys.reshape(-1), 0
    short = flat >> np.uint32(16)
    at = np.flatnonzero(np.bincount(short)[short] > 1)  # hardly any other key comes twice
    at = at[np.argsort(flat[at], kind="stable")]
    flat, rows = flat[at], at // BANDS
    while done < len(keys):
        # Of those with the same key, how many came before; the first of them and the last count.
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


def texts(documents: Iterable[tuple[int, NDArray[np.uint16]]]) -> Iterator[Text]:
    """Documents, each with its number and without its end-of-text, hashed many at a time."""
    held: list[tuple[int, NDArray[np.uint16]]] = []
    size = 0
    for number, ids in documents:
        held.append((number, ids))
        size += len(ids)
        if size >= _AT_ONCE:
            yield from _texts(held)
            held, size = [], 0
    if held:
        yield from _texts(held)


def _texts(documents: list[tuple[int, NDArray[np.uint16]]]) -> Iterator[Text]:
    """See `texts`."""
    order, at = gram_order(np.concatenate([ids for _, ids in documents]), GRAM), 0
    for number, ids in documents:
        # Behind each document's own 5-grams come those that reach into the next.
        count = max(0, len(ids) - GRAM + 1)
        share = 1 << (max(0, count - 1) // _FEW).bit_length()
        yield Text(number, distinct(_every(order[at : at + count], share)), share)
        at += len(ids)


def _limit(share: int) -> np.uint32:
    """The largest number of every `share`-th 5-gram."""
    return np.uint32((1 << 32) // share - 1)


def _every(order: NDArray[np.uint32], share: int) -> NDArray[np.uint32]:
    return order if share == 1 else order[np.flatnonzero(order <= _limit(share))]


def jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> tuple[float, int]:
    """Size of the intersection over size of the union of two sorted sets, and the latter."""
    both = np.concatenate([a, b])
    both.sort(kind="stable")  # merges what is sorted already
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    union = max(1, len(both) - common)
    return common / union, union


def doubt(threshold: float, seen: Any) -> Any:
    """Four standard deviations of a share of `seen` that is `threshold` on average; near 1, where
    that would be nothing, at least those of 31 in 32.
    """
    return _SIGMAS * np.sqrt(max(threshold * (1 - threshold), 1 / 32) / seen)
