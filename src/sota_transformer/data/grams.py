"""Hashes of token n-grams, for near-duplicates, decontamination and the leakage report."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BASE = 0xD6E8FEB86659FD93  # odd, with well-spread bits
_CHUNK = 1 << 18  # bytes of numbers at a time, so that intermediates stay in the CPU cache


def gram_hashes(ids: NDArray[Any], size: int) -> NDArray[np.uint64]:
    """Hash of each n-gram of `size` ids: (n - size + 1,); empty if there are too few ids."""
    out = np.empty(max(0, len(ids) - size + 1), np.uint64)
    for chunk, numbers in _chunks(ids, size, out, add=1):
        np.copyto(chunk, _mix(numbers))
    return out


def gram_order(ids: NDArray[Any], size: int) -> NDArray[np.uint32]:
    """A number for each n-gram of `size` ids, like a hash except for weak low bits, at half the
    cost: enough to tell n-grams apart and to select small numbers. `mixed` makes it a hash.
    """
    out = np.empty(max(0, len(ids) - size + 1), np.uint32)
    # The factor lets the last id, too, affect the high bits.
    for chunk, numbers in _chunks(ids, size, out):
        np.multiply(numbers, np.uint32(_BASE % (1 << 32)), out=chunk)
    return out


def mixed(numbers: NDArray[Any]) -> NDArray[Any]:
    """Hashes of uint32 or uint64, such as those of `gram_order`; distinct for distinct numbers."""
    return _mix(numbers.copy())


def _chunks(
    ids: NDArray[Any], size: int, out: NDArray[Any], *, add: int = 0
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Chunks of `out` with the polynomials of their n-grams, `add` added to each id. All chunks use
    the same few rows for intermediates: allocating anew would double the cost.
    """
    count = min(len(out), _CHUNK // out.itemsize)
    rows = np.empty((1 + size.bit_length(), count + size - 1), out.dtype)
    for start in range(0, len(out), max(1, count)):
        chunk = out[start : start + count]
        piece = rows[0, : len(chunk) + size - 1]
        np.add(ids[start : start + len(piece)], add, out=piece, dtype=out.dtype, casting="unsafe")
        yield chunk, _polynomial(piece, size, rows[1:])


def _polynomial(ids: NDArray[Any], size: int, rows: NDArray[Any]) -> NDArray[Any]:
    """The sum of id * _BASE ** (size - 1 - place) over each n-gram: (len(ids) - size + 1,), in
    `rows`. The sum of two adjacent n-grams follows from theirs.
    """
    if size == 1:
        return ids
    half, count = size // 2, len(ids) - size + 1
    parts = _polynomial(ids, half, rows[1:])
    modulus = 1 << 8 * ids.itemsize
    out = rows[0, : len(ids) - 2 * half + 1]
    np.multiply(parts[: len(out)], ids.dtype.type(pow(_BASE, half, modulus)), out=out)
    out += parts[half : half + len(out)]
    if size % 2:
        out = out[:count]
        out *= ids.dtype.type(_BASE % modulus)
        out += ids[size - 1 :]
    return out


def _mix(x: NDArray[Any]) -> NDArray[Any]:
    """Mix in place: every output bit depends on every bit of x. uint64 as in splitmix64."""
    dtype = x.dtype.type
    if dtype is np.uint32:
        steps, factors = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
    else:
        steps, factors = (30, 27, 31), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    shifted = np.empty_like(x)
    for step, factor in zip(steps, (*factors, 1), strict=True):
        np.right_shift(x, dtype(step), out=shifted)
        x ^= shifted
        if factor != 1:
            x *= dtype(factor)
    return x


def distinct(numbers: NDArray[Any]) -> NDArray[Any]:
    """The sorted distinct numbers. Sorts its argument in place; faster than np.unique."""
    numbers.sort()
    first = np.empty(len(numbers), bool)
    first[:1] = True
    np.not_equal(numbers[1:], numbers[:-1], out=first[1:])
    return numbers[first]


def add_run(runs: list[NDArray[Any]], run: NDArray[Any]) -> None:
    """Add a sorted array to other sorted ones, merging them as they grow, so that there are few."""
    while runs and len(runs[-1]) <= 4 * len(run):
        run = np.concatenate([runs.pop(), run])
        run.sort(kind="stable")  # merges the two sorted parts
    if len(run):
        runs.append(run)


class GramSet:
    """A set of 64-bit n-gram hashes with fast bulk lookups."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        """`hashes` in any order, duplicates allowed: (n,)."""
        self.sorted = distinct(hashes.copy())
        bits = max(10, min(24, len(self.sorted).bit_length() + 4))
        self._mask, self._shifts = np.uint64((1 << bits) - 1), (np.uint64(64 - bits), np.uint64(8))
        self._filters = [np.zeros(1 << bits, bool) for _ in self._shifts]
        for known, shift in zip(self._filters, self._shifts, strict=True):
            known[self._slots(self.sorted, shift)] = True

    def _slots(self, hashes: NDArray[np.uint64], shift: np.uint64) -> NDArray[np.int64]:
        """Indices into a filter, in numpy's index dtype, which needs no conversion."""
        return (hashes >> shift & self._mask).view(np.int64)

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Indices of the hashes that are in the set, in order."""
        first, second = self._filters
        maybe = np.flatnonzero(first.take(self._slots(hashes, self._shifts[0])))
        maybe = maybe[second.take(self._slots(hashes[maybe], self._shifts[1]))]
        keys = hashes[maybe]
        at = np.searchsorted(self.sorted, keys)
        return maybe[self.sorted.take(at, mode="clip") == keys]

    def find_runs(self, ids: NDArray[Any], size: int) -> NDArray[np.int64]:
        """Start positions in `ids` of the n-grams whose hash is in the set, in order."""
        found, step = [np.empty(0, np.int64)], _CHUNK // 8
        for start in range(0, len(ids), step):
            hashes = gram_hashes(ids[start : start + step + size - 1], size)
            found.append(self.find(hashes) + start)
        return np.concatenate(found)
