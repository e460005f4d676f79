"""Documents as sets of token 5-grams, and the Jaccard index of two of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.grams import gram_hashes

GRAM = 5
FEW = 2048  # 5-grams; of more a share is looked at first, then ...
FINER = 4  # ... one so many times as large, if that leaves it open, and only then all of them
_SIGMAS = 4
_AT_ONCE = 1 << 20  # tokens hashed in one go


@dataclass(slots=True)
class Text:
    """A document as the sorted set of its 5-grams' hashes; of a long one, those of every
    `share`-th.
    """

    grams: NDArray[np.uint32]
    share: int
    ids: NDArray[np.uint16] | None
    """The document without its end-of-text, where it is at hand ..."""
    number: int = -1
    """... and else which of the earlier documents it is."""
    fine: tuple[int, NDArray[np.uint32]] | None = None
    """A smaller share and its 5-grams, where they were asked for."""

    def at(self, share: int) -> NDArray[np.uint32]:
        """The 5-grams of a multiple of its own share."""
        return self.grams if share == self.share else _every(self.grams, share)

    def bare(self, number: int) -> "Text":
        """As one of the earlier documents: its 5-grams alone."""
        return Text(self.grams, self.share, None, number)


def texts(documents: Iterable[NDArray[np.uint16]]) -> Iterator[Text]:
    """Documents without their end-of-text, hashed many at a time."""
    held: list[NDArray[np.uint16]] = []
    size = 0
    for ids in documents:
        held.append(ids)
        size += len(ids)
        if size >= _AT_ONCE:
            yield from _texts(held)
            held, size = [], 0
    if held:
        yield from _texts(held)


def _texts(documents: list[NDArray[np.uint16]]) -> Iterator[Text]:
    """See `texts`."""
    hashes, at = gram_hashes(np.concatenate(documents), GRAM, np.uint32), 0
    for ids in documents:
        # Behind each document's own 5-grams come those that reach into the next.
        count = max(0, len(ids) - GRAM + 1)
        share = 1 << (max(0, count - 1) // FEW).bit_length()
        yield Text(_set(_every(hashes[at : at + count], share)), share, ids)
        at += len(ids)


def grams_of(ids: NDArray[np.uint16], share: int) -> NDArray[np.uint32]:
    """The set of every `share`-th 5-gram of a document, by its hash."""
    return _set(_every(gram_hashes(ids, GRAM, np.uint32), share))


def _every(hashes: NDArray[np.uint32], share: int) -> NDArray[np.uint32]:
    return hashes if share == 1 else hashes[hashes & np.uint32(share - 1) == 0]


def _set(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Sorted, in place, and once each; two of 8,192 are equal by chance once in 128 times."""
    hashes.sort()
    first = np.ones(len(hashes), bool)
    np.not_equal(hashes[1:], hashes[:-1], out=first[1:])
    return hashes[first]


def jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32], threshold: float) -> tuple[float, float]:
    """Size of the intersection over size of the union of two sorted sets, and four standard
    deviations of that if they are samples of sets that are `threshold` alike.
    """
    both = np.concatenate([a, b])
    both.sort(kind="stable")  # merges what is sorted already
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    union = max(1, len(both) - common)
    return common / union, _SIGMAS * (threshold * (1 - threshold) / union) ** 0.5
