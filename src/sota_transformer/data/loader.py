"""The batch of a step, as a pure function of (data, seed, step).

`rows(step)` gives the global rows of a step; `permute` maps each row to a window, and each rank
takes its slice of the rows. So no rank, worker or interruption can change what a step sees, and
there is no state to save: any step can be requested directly, and the next one is prefetched.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.grams import mixed

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_U64 = (1 << 64) - 1


class Windows(Protocol):
    """The source of a loader: `shards.TokenWindows`, or any sequence of equally long rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> NDArray[np.uint16]: ...


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The window at each position of an epoch of `size` windows: a stateless permutation.

    A Feistel network permutes the next power of four; results outside `size` are permuted again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    key = mixed(np.array([(seed * _GOLDEN + epoch) & _U64], np.uint64))
    keys = mixed(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mixed(right + round_key) & mask)
        values[outside] = (left << shift) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


class BatchLoader:
    """Batches by step for one rank, with the next one prefetched in the background."""

    def __init__(
        self,
        windows: Windows,
        seed: int,
        rows: Callable[[int], range],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`rows(step)` gives the step's global rows; their number must be divisible by `world`."""
        self._windows, self._seed, self._rows = windows, seed, rows
        self._rank, self._world = rank, world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[NDArray[np.int64]]] | None = None

    def row_numbers(self, step: int) -> NDArray[np.int64]:
        """Global rows of this rank at `step`: (B,)."""
        rows = self._rows(step)
        if len(rows) % self._world:
            raise ValueError(f"{len(rows)} rows do not divide among {self._world} ranks")
        size = len(rows) // self._world
        return np.array(rows[self._rank * size : (self._rank + 1) * size], np.int64)

    def window_ids(self, step: int) -> NDArray[np.int64]:
        """Windows of this rank at `step`, each window once per epoch over all ranks: (B,)."""
        rows, size = self.row_numbers(step), len(self._windows)
        ids = np.empty(len(rows), np.int64)
        for epoch in np.unique(rows // size).tolist():
            of_epoch = rows // size == epoch
            ids[of_epoch] = permute(rows[of_epoch] % size, size, self._seed, epoch)
        return ids

    def dropout_keys(self, step: int) -> NDArray[np.int32]:
        """A hash of the run's seed, the step and each row's global number: (B,)."""
        words = self.row_numbers(step).astype(np.uint64)
        for value in (step, self._seed):
            words = (words + np.uint64(value + 1)) * np.uint64(_GOLDEN)
            words ^= words >> np.uint64(29)
        return (words >> np.uint64(32)).astype(np.uint32).view(np.int32)

    def batch(self, step: int) -> NDArray[np.int64]:
        """This rank's windows at `step`: (B, T + 1). Raises errors of the background read."""
        if self._ahead is not None and self._ahead[0] == step:
            result = self._ahead[1].result()
        else:
            result = self._read(step)
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return result

    def _read(self, step: int) -> NDArray[np.int64]:
        ids = self.window_ids(step).tolist()
        return np.stack([self._windows[i] for i in ids]).astype(np.int64)

    def close(self) -> None:
        """Stop the background read."""
        self._thread.shutdown(cancel_futures=True)
