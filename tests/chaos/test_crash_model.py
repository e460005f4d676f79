"""A power cut after any system call loses nothing that was acknowledged, and tears nothing."""

from collections.abc import Callable

import pytest

from sota_transformer import durable

from . import mutants
from .crash_model import Disk, File, Folder
from .protocols import Explorer, configure, explore, explore_twice, train, train_really


@pytest.mark.parametrize(("driver", "least"), [(train, 400), (train_really, 600), (configure, 20)])
def test_no_power_cut_loses_or_tears(driver: Callable[..., None], least: int) -> None:
    report = explore(Explorer(durable, driver), 4)
    assert report.problems == {} and report.states >= least


def test_nor_does_one_inside_a_file_of_many_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_BUFFER_BYTES", 64)
    report = explore(Explorer(durable, train_really), 3)
    assert report.problems == {} and report.states >= 600


@pytest.mark.parametrize("driver", [train, train_really, configure])
def test_nor_does_one_during_the_recovery(driver: Callable[..., None]) -> None:
    report = explore_twice(Explorer(durable, driver), 3, stride=19)
    assert report.problems == {} and report.states >= 40


@pytest.mark.chaos
def test_nor_does_one_at_any_moment_of_any_recovery() -> None:
    report = explore_twice(Explorer(durable, train), 4)
    assert report.problems == {} and report.states >= 200_000


@pytest.mark.parametrize(("name", "mutant"), list(mutants.mutants()), ids=lambda value: str(value))
def test_the_model_catches_every_mutant(name: str, mutant: object) -> None:
    assert mutants.caught(mutant)  # type: ignore[arg-type]


def test_the_weak_disk() -> None:
    file = File(b"old")
    file.content = b"new, longer"
    assert len(file.states()) == 6
    file.synced = file.content
    assert file.states() == [b"new, longer"]
    folder = Folder()
    folder.change({"a": file})
    folder.change({"a": None, "b": file})
    assert set(folder.states()) == {(), (("a", file.content),), (("b", file.content),)}
    folder.sync()
    assert list(folder.states()) == [(("b", file.content),)]


def test_only_what_was_synced_survives() -> None:
    disk = Disk()
    log = [("mkdir", "a"), ("create", "a/x", 1), ("write", 1, b"1"), ("fsync", 1)]
    for operation in log:
        disk.apply(operation)
    assert set(disk.after_power_cut()) == {(), (("a", ()),), (("a", (("x", b"1"),)),)}
    disk.apply(("fsync_folder", "a"))
    disk.apply(("fsync_folder", "."))
    assert list(disk.after_power_cut()) == [disk.visible()]
