"""Hashes of token n-grams: what near-duplicates, decontamination and the leakage report count."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BASE = 0xD6E8FEB86659FD93  # odd, with bits everywhere
_CHUNK = 1 << 16  # tokens at a time, so that the intermediate arrays stay in the cache


def gram_hashes(ids: NDArray[Any], size: int) -> NDArray[np.uint64]:
    """Hash of each run of `size` ids: (n - size + 1,); empty if there is none."""
    return _chunked(ids, size, np.uint64, mix=True)


def gram_order(ids: NDArray[Any], size: int) -> NDArray[np.uint32]:
    """A number for each run of `size` ids, different as a hash is but for its low bits; half the
    work: enough to tell runs apart and to choose those of small numbers. `mixed` makes hashes.
    """
    return _chunked(ids, size, np.uint32, mix=False)


def mixed(order: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Hashes of numbers of `gram_order`, different ones of different numbers."""
    return _mixed(order.copy(), np.uint32)


def _chunked(ids: NDArray[Any], size: int, dtype: type, *, mix: bool) -> NDArray[Any]:
    """A polynomial of the ids, built by doubling: the hash of a + b ids follows from those of a
    and b. The factor before it lets the last id, too, decide on the high bits.
    """
    count = max(0, len(ids) - size + 1)
    out = np.empty(count, dtype)
    factor = dtype(_BASE % (1 << (8 * np.dtype(dtype).itemsize)))
    for start in range(0, count, _CHUNK):
        piece = ids[start : start + _CHUNK + size - 1].astype(dtype)
        if mix:
            piece += dtype(1)
            out[start : start + _CHUNK] = _mixed(_polynomial(piece, size, dtype), dtype)
        else:
            piece *= factor
            out[start : start + _CHUNK] = _polynomial(piece, size, dtype)
    return out


def _polynomial(ids: NDArray[Any], size: int, dtype: type) -> NDArray[Any]:
    """The unmixed hash of each run: (len(ids) - size + 1,)."""
    if size == 1:
        return ids
    half = size // 2
    first = _polynomial(ids, half, dtype)
    modulus = 1 << (8 * np.dtype(dtype).itemsize)
    rest = size - half
    second = first
    if rest > half:
        second = first[:-1] * dtype(_BASE % modulus)
        second += ids[half:]
    count = len(ids) - size + 1
    out = first[:count] * dtype(pow(_BASE, rest, modulus))
    out += second[half : half + count]
    return out


def _mixed(x: NDArray[Any], dtype: type) -> NDArray[Any]:
    """Every bit of the result depends on every bit of x, in place."""
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


class GramSet:
    """A set of 64-bit gram hashes that answers for a million at a time."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        """`hashes` in any order, repeats allowed: (n,)."""
        self.sorted = np.unique(hashes)
        bits = max(10, min(24, len(self.sorted).bit_length() + 4))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)
        self._filter[self.sorted >> self._shift] = True

    def contains(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of these are in the set: (n,)."""
        found = self._filter[hashes >> self._shift]
        maybe = np.flatnonzero(found)
        if len(maybe):
            keys = hashes[maybe]
            at = np.minimum(np.searchsorted(self.sorted, keys), len(self.sorted) - 1)
            found[maybe] = self.sorted[at] == keys
        return found
