"""A limit on processes and threads, such as `ulimit -u` or a container's: said, and survived."""

import errno
import hashlib
import multiprocessing.queues
import os
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sota_transformer import durable
from sota_transformer.cli import guarded
from sota_transformer.data import pool, units
from sota_transformer.data.pool import Job, Pool
from sota_transformer.data.sources import find
from sota_transformer.data.units import Unit
from sota_transformer.errors import TEMPORARY, SotaError
from sota_transformer.options import Prepare


def _no_thread(*_: Any) -> NoReturn:
    raise RuntimeError("can't start new thread")


def _a_pool(folder: Path) -> tuple[Pool, list[Unit]]:
    path = folder / "a.txt"
    path.write_text("some words")
    sources, _ = find((str(path),))
    todo = [Unit(i, cut, "key") for i, cut in enumerate(units.cut(sources, folder, print, list))]
    return Pool(Job(folder, Prepare(inputs=(str(path),), out=folder / "out")), 1), todo


@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't start new thread"), OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))],
)
def test_the_limit_is_said_in_one_line(capsys, error: Exception) -> None:
    """It was "unexpected RuntimeError", and "Resource temporarily unavailable" without more."""

    def work() -> NoReturn:
        raise error

    assert guarded(work) == TEMPORARY
    assert "limit (ulimit -u, or the container's)" in capsys.readouterr().err


def test_a_checkpoint_is_saved_without_a_thread_to_hash_it(tmp_path: Path, monkeypatch) -> None:
    """All steps since the last save were lost."""
    monkeypatch.setattr(threading.Thread, "start", _no_thread)
    data = os.urandom(70_000)
    file = durable.HashingFile(tmp_path / "x")
    file.write(data)
    file.close()
    assert (tmp_path / "x").read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_preparing_ends_where_the_executor_cannot_start_its_thread(
    tmp_path: Path, monkeypatch
) -> None:
    """Python lets its own thread die and its futures wait forever: `sota prepare` never ended."""
    monkeypatch.setattr(multiprocessing.queues.Queue, "_start_thread", _no_thread)
    before = threading.excepthook
    made, todo = _a_pool(tmp_path)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(made.run(todo))
    made.close(stop=True)
    assert threading.excepthook is before


def test_workers_that_cannot_start_blame_no_file(tmp_path: Path, monkeypatch) -> None:
    """A file was to be removed from the inputs."""
    made, todo = _a_pool(tmp_path)

    def dies(*_: Any) -> NoReturn:
        raise BrokenProcessPool

    monkeypatch.setattr(made, "_submit", dies)
    monkeypatch.setattr(pool.time, "sleep", lambda _: None)
    with pytest.raises(SotaError, match="worker processes cannot start") as caught:
        list(made.run(todo))
    made.close()
    assert caught.value.code == TEMPORARY
