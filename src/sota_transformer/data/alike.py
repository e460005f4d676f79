"""Documents as sets of token 5-grams, and the Jaccard index of two of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.grams import distinct, gram_order

GRAM = 5
FEW = 2048  # 5-grams; of more a share is looked at first, then ...
FINER = 4  # ... one so many times as large, if that leaves it open, and only then all of them
_SIGMAS = 4
_AT_ONCE = 1 << 20  # tokens hashed in one go


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
        share = 1 << (max(0, count - 1) // FEW).bit_length()
        yield Text(number, distinct(_every(order[at : at + count], share)), share)
        at += len(ids)


def grams_of(ids: NDArray[np.uint16], share: int) -> NDArray[np.uint32]:
    """The set of every `share`-th 5-gram of a document, by its number; of 8,192 two different ones
    have the same by chance once in 128 times.
    """
    return distinct(_every(gram_order(ids, GRAM), share))


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
