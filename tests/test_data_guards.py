"""Workers that fit into memory, splits that are not empty, and errors in one line."""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sota_transformer.data import guards
from sota_transformer.errors import BAD_DATA, IO_FAILED, LOCKED, SotaError
from sota_transformer.options import Prepare


def workers(count: int, memory_mb: int = 0) -> int:
    return guards.workers(Prepare(inputs=("a",), out=Path("b"), workers=count, memory_mb=memory_mb))


def test_as_many_workers_as_wanted_and_as_fit(monkeypatch) -> None:
    """A main process of 110 MB and workers of 130 MB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8}, raising=False)
    assert (workers(0), workers(1), workers(7), workers(5000)) == (3, 1, 7, 1024)
    for most in range(1, 6):
        assert workers(5, 110 + 130 * most) == most == workers(5, 110 + 130 * (most + 1) - 1)
    assert workers(2, 10_000) == 2 and workers(0, 10_000) == 3
    with pytest.raises(SotaError, match="use at least 240"):
        workers(1, 239)


def splits(train: int, val: int, tokens: int = 10_000) -> dict[str, Any]:
    kinds = {"train": (train, 10**6), "val": (val, tokens)}
    rejects = {"not a JSON line": {"count": 5}}
    found = {name: {"documents": n, "tokens": t} for name, (n, t) in kinds.items()}
    return {"splits": found, "rejects": rejects}


@pytest.mark.parametrize(
    ("train", "val", "fraction", "said"),
    [
        (0, 0, 0.1, "no usable text in the inputs: 5 x not a JSON line"),
        (0, 1, 0.1, "1 document is too few: the train split"),
        (1, 0, 0.1, "1 document is too few: the val split"),
        (2, 0, 0.1, "2 documents are too few: the val split"),
        (0, 2, 0.0, "2 documents are too few: the train split"),
    ],
)
def test_an_empty_split_is_an_error(
    tmp_path: Path, train: int, val: int, fraction: float, said: str
) -> None:
    np.save(tmp_path / "a.hashes.npy", np.array([[1 << 60, 0], [1 << 61, 0]], np.uint64))
    with pytest.raises(SotaError, match=said) as caught:
        guards.check_splits(splits(train, val), fraction, tmp_path)
    assert caught.value.code == BAD_DATA


def test_few_validation_tokens_are_noted(tmp_path: Path, capsys) -> None:
    def note(train: int, val: int, tokens: int, fraction: float) -> str:
        guards.check_splits(splits(train, val, tokens), fraction, tmp_path)
        return capsys.readouterr().out

    assert not note(90, 10, 4096, 0.1) and not note(10, 0, 0, 0.0)
    said = "note: validation has only 4,095 tokens; add text"
    for documents, fraction, more in [
        (100, 0.1, "0.2"),
        (1000, 0.0001, "0.008"),  # eight documents
        (100, 0.4, "0.5"),
        (100, 0.5, ""),
        (16, 0.1, "0.5"),
        (15, 0.1, ""),
    ]:
        end = f", or start over with --val-fraction {more}\n" if more else "\n"
        assert note(documents - 1, 1, 4095, fraction) == said + end


def test_the_advised_fraction_is_the_shortest_that_works(tmp_path: Path) -> None:
    """Against a search of all numbers of one digit, of two, and so on."""
    random = np.random.default_rng(0)
    for count in (2, 3, 5, 15, 16, 17, 60):
        places = random.integers(0, 1 << 64, (count, 2), np.uint64)
        for number, part in enumerate(np.array_split(places, 2)):
            np.save(tmp_path / f"{number}.hashes.npy", part)
        advised = guards._workable_fraction(tmp_path)

        def chosen(fraction: float, places=places) -> int:
            return int((places[:, 0] < int(fraction * 2**64)).sum())

        wanted = min(8, count // 2)
        digits = next(
            n for n in itertools.count(1)
            if any(chosen(k / 10**n) == wanted for k in range(1, 10**n))
        )  # fmt: skip
        assert chosen(float(advised)) == wanted and len(advised) == len("0.") + digits


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    for number, name, code, said in [
        (errno.EROFS, "shard", LOCKED, "cannot create shard: Read-only file system; choose"),
        (errno.EACCES, None, LOCKED, f"cannot create {tmp_path / 'out'}: Permission denied;"),
        (errno.ENOSPC, "shard", IO_FAILED, r"shard: writing failed \(No space left.*MB free"),
        (errno.EIO, None, IO_FAILED, rf"{tmp_path / 'out'}: writing failed \(Input/output"),
    ]:
        with (
            pytest.raises(SotaError, match=said) as caught,
            guards.one_line_errors(tmp_path / "out"),
        ):
            raise OSError(number, os.strerror(number), name)
        assert caught.value.code == code
