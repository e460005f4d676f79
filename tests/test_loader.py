"""Every window once per epoch, direct access to any step, the same union for any world size."""

import numpy as np
import pytest

from sota_transformer.data.loader import BatchLoader, permute

SEED = 7


class Numbered:
    """Window i is filled with i."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> np.ndarray:
        assert 0 <= index < self.size
        self.reads += 1
        return np.full(5, index, np.uint16)


def loader(size: int = 37, batch: int = 8, rank: int = 0, world: int = 1, seed: int = SEED):
    def rows(step: int) -> range:
        return range(step * batch, (step + 1) * batch)

    return BatchLoader(Numbered(size), seed, rows, rank, world)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 65_537])
def test_permutation_of_every_size(size: int) -> None:
    for epoch in range(3):
        order = permute(np.arange(size), size, SEED, epoch)
        assert np.array_equal(np.sort(order), np.arange(size))


def test_orders_differ_by_seed_and_epoch_and_look_random() -> None:
    size = 10_000
    orders = [permute(np.arange(size), size, s, e) for s, e in ((0, 0), (0, 1), (1, 0), (2**63, 0))]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.01
        assert abs(np.corrcoef(a, np.arange(size))[0, 1]) < 0.05
        assert (np.abs(np.diff(a)) == 1).mean() < 0.01


def test_the_order_is_the_one_existing_runs_resume_in() -> None:
    """A run resumed by a later version must not repeat or miss windows."""
    order = [1, 13, 2, 0, 8, 5, 4, 6, 14, 12, 3, 15, 9, 11, 10, 7]
    assert permute(np.arange(16), 16, SEED, 1).tolist() == order


def test_permutation_is_a_function_of_each_position_alone() -> None:
    whole = permute(np.arange(1000), 1000, SEED, 4)
    assert all(permute(np.array([i]), 1000, SEED, 4)[0] == whole[i] for i in range(0, 1000, 37))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_window_once_per_epoch_over_all_ranks(world: int) -> None:
    size, batch = 32, 8
    loaders = [loader(size, batch, rank, world) for rank in range(world)]
    for epoch in range(3):
        steps = range(epoch * size // batch, (epoch + 1) * size // batch)
        seen = np.concatenate([part.window_ids(s) for s in steps for part in loaders])
        assert np.array_equal(np.sort(seen), np.arange(size))


def test_batch_that_spans_epochs() -> None:
    one = loader(size=5, batch=12)
    ids = one.window_ids(0)
    assert sorted(ids[:5]) == sorted(ids[5:10]) == list(range(5))
    assert not np.array_equal(ids[:5], ids[5:10])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch_in_order(world: int) -> None:
    whole = loader()
    for step in (0, 3, 100):
        parts = [loader(rank=rank, world=world).batch(step) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole.batch(step))


def test_any_step_directly_and_prefetch_changes_nothing() -> None:
    forward, jumping = loader(), loader()
    batches = [forward.batch(step) for step in range(20)]
    for step in (19, 3, 4, 5, 0, 19, 18):
        assert np.array_equal(jumping.batch(step), batches[step])
    assert batches[0].shape == (8, 5) and batches[0].dtype == np.int64
    assert np.array_equal(batches[7][:, 0], forward.window_ids(7))
    forward.close()
    jumping.close()


def test_the_next_step_is_fetched_ahead() -> None:
    one = loader()
    one.batch(0)
    one.close()
    assert one._windows.reads == 16  # type: ignore[attr-defined]


def test_row_numbers_are_this_ranks_slice() -> None:
    assert loader(rank=1, world=4).row_numbers(2).tolist() == [18, 19]


def test_rows_must_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        loader(world=3).batch(0)


def test_a_read_error_is_raised() -> None:
    class Broken(Numbered):
        def __getitem__(self, index: int) -> np.ndarray:
            raise OSError("gone")

    broken = BatchLoader(Broken(10), SEED, lambda step: range(2))
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            broken.batch(0)
    broken.close()
