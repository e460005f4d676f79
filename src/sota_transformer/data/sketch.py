"""MinHash sketches of documents, which tell whether two of them may be near-duplicates.

The 5-grams of a document are hashed into bins, and each bin keeps the smallest. The probability
that two documents agree in a bin is their Jaccard index. Groups of bins form `keys`, which find
candidates; `marks` then estimate how similar two documents are.
"""

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.grams import gram_order, mixed

GRAM = 5  # consecutive tokens
_MARK_BITS, _BIN_BITS = 8, 6
MARKS, BINS = 1 << _MARK_BITS, 1 << _BIN_BITS
BANDS = 16
KEY_BITS = 31  # a key and a 32-bit document number fit into one signed 64-bit integer
_PER_MARK = 8  # 5-grams sampled per mark: its bin is wrongly empty with probability exp(-8)
_MORE = 4  # factor for a larger sample if too many bins stay empty
_EMPTY = np.uint32(0xFFFFFFFF)
_STEP = 0x9E3779B9
_MIX = np.uint64(0xD6E8FEB86659FD93)
_AT_ONCE = 1 << 18  # tokens at a time, so that intermediate results stay in the CPU cache ...
_DOCUMENTS = 1 << 12  # ... and documents at a time, if they are short


def sketch(
    tokens: NDArray[np.uint16], lengths: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Keys and marks of each document: (documents, BANDS), (documents, MARKS); a mark of 0 means
    that its bin is empty.

    `tokens` holds the documents one after another, with `lengths` that include end-of-text.
    """
    keys = np.empty((len(lengths), BANDS), np.uint32)
    marks = np.empty((len(lengths), MARKS), np.uint8)
    ends = np.cumsum(lengths, dtype=np.int64)
    first = begin = 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, begin + _AT_ONCE)))
        last = min(last, first + _DOCUMENTS)
        end = int(ends[last - 1])
        smallest = _smallest(tokens[begin:end], lengths[first:last])
        own = mixed(smallest).astype(np.uint8)
        marks[first:last] = np.where(smallest == _EMPTY, 0, np.maximum(own, 1))
        quarters = (smallest[:, i :: MARKS // BINS] for i in range(MARKS // BINS))
        signature = np.minimum.reduce([*quarters])
        keys[first:last] = _bands(_dense(signature))
        first, begin = last, end
    return keys, marks


def _smallest(tokens: NDArray[np.uint16], lengths: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The smallest number of a 5-gram in each bin of each document: (documents, MARKS)."""
    smallest = np.full((len(lengths), MARKS), _EMPTY, np.uint32)
    order = gram_order(tokens, GRAM)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    grams = np.maximum(0, lengths.astype(np.int64) - GRAM)  # none includes end-of-text
    ends = starts + grams
    # Only the smallest number of each bin matters, so a long document needs only its small ones.
    share = np.minimum(1, _PER_MARK * MARKS / np.maximum(1, grams))
    left = np.flatnonzero(grams)
    while len(left):
        small = np.zeros(len(order), bool)
        limits = (share[left] * _EMPTY).astype(np.uint32)
        for start, end, limit in zip(
            starts[left].tolist(), ends[left].tolist(), limits, strict=True
        ):
            np.less_equal(order[start:end], limit, out=small[start:end])
        chosen = np.flatnonzero(small)
        kept = order[chosen]
        cell = np.repeat(left * MARKS, np.diff(np.searchsorted(chosen, ends[left]), prepend=0))
        cell += kept * np.uint32(_STEP) >> np.uint32(32 - _MARK_BITS)  # the bin of each
        np.minimum.at(smallest.reshape(-1), cell, kept)
        # A repetitive text has fewer distinct 5-grams than its length suggests.
        empty = np.count_nonzero(smallest[left] == _EMPTY, axis=1)
        left = left[(empty > _PER_MARK) & (share[left] < 1)]
        share[left] = np.minimum(1, _MORE * share[left])
    return smallest


def _dense(smallest: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Hashes of the bins; an empty bin borrows from the next filled one, altered by the distance.

    Short documents leave many bins empty, and without this they would all agree there.
    """
    signature = mixed(smallest)
    rows = np.flatnonzero((smallest == _EMPTY).any(axis=1))
    bins = np.arange(2 * BINS)
    filled = np.tile(smallest[rows] != _EMPTY, 2)
    source = np.where(filled, bins, 2 * BINS - 1)[:, ::-1]
    source = np.minimum.accumulate(source, axis=1)[:, : BINS - 1 : -1]
    borrowed = np.take_along_axis(signature[rows], source % BINS, axis=1)
    borrowed += (source - bins[:BINS]).astype(np.uint32) * np.uint32(_STEP)
    signature[rows] = borrowed
    return signature


def _bands(signature: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """One key per band of each signature: (documents, BANDS)."""
    keys = np.zeros((len(signature), BANDS), np.uint64)
    parts = signature.reshape(len(signature), BANDS, BINS // BANDS).astype(np.uint64)
    for row in range(BINS // BANDS):
        keys = (keys ^ parts[:, :, row]) * _MIX
        keys ^= keys >> np.uint64(29)
    keys += np.arange(BANDS, dtype=np.uint64) * _MIX
    return (keys >> np.uint64(64 - KEY_BITS)).astype(np.uint32)
