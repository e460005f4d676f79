"""Workers that fit into memory, splits that are not empty, errors in one line, and progress."""

import errno
import io
import itertools
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sota_transformer.data import guards, progress
from sota_transformer.data.encode import Rejects
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
    rejects = {"not a JSON line": {"count": 5, "examples": ["a: byte 0", "a: byte 9"]}}
    found = {name: {"documents": n, "tokens": t} for name, (n, t) in kinds.items()}
    return {"splits": found, "rejects": rejects}


@pytest.mark.parametrize(
    ("train", "val", "fraction", "said"),
    [
        (0, 0, 0.1, "inputs: 5 x not a JSON line, e.g. a: byte 0; .* jq -c"),
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


def test_a_manifest_lists_few_examples_of_any_number_of_rejects() -> None:
    """The first five, over all units."""
    first, second = Rejects(), Rejects()
    for number in range(4):
        first.add("empty file", f"a{number}")
    for number in range(9):
        second.add("empty file", f"b{number}", count=2)
    second.add("hidden")
    first.merge(second.entries)
    assert first.entries == {
        "empty file": {"count": 22, "examples": ["a0", "a1", "a2", "a3", "b0"]},
        "hidden": {"count": 1, "examples": []},
    }
    assert len(second.entries["empty file"]["examples"]) == 5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that progress is measured by, which only passes by hand."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize("total", [1000, 700, None])
def test_a_preparation_tells_what_it_did_and_what_is_left(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], total: int | None
) -> None:
    """Every five seconds at most, on stderr. The inputs may turn out larger than they looked."""
    with progress.Progress(total) as meter:
        for _ in range(8):
            clock.now += 2
            meter.add_unit(10, 6_000_000, 700_000, 125)
        assert meter.close() == 16
    said = ["30 documents (5/s)  18 MB (3 MB/s)  2.1 M tokens"]
    said += ["60 documents (5/s)  36 MB (3 MB/s)  4.2 M tokens"]
    shares = {1000: [("37.5%", 10), ("75.0%", 4)], 700: [("53.6%", 5), ("100.0%", 0)]}
    if total:
        known = zip(shares[total], said, strict=True)
        said = [f"{share}  {one}  {left} s left" for (share, left), one in known]
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", [f"prepare: {one}" for one in said])


def test_a_bar_is_on_the_terminal_of_the_errors_and_goes(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, before = io.StringIO(), set(threading.enumerate())
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with progress.Meter("evaluate", 1000) as meter:
        clock.now += 1
        meter.add(250)
    assert "25.0%  250 tokens (250/s)  3 s left" in screen.getvalue()
    assert "evaluate:" not in screen.getvalue() and capsys.readouterr().out == ""
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_the_table_of_a_preparation(tmp_path: Path) -> None:
    """At most 20 inputs by name; what was skipped, then what was repaired, the most first."""

    def row(name: str, documents: int) -> dict[str, Any]:
        return {"input": name, "documents": documents, "text_bytes": 10**7, "tokens": 1234}

    kept = f"not valid UTF-8{progress.REPAIRED}"
    counts = {"hidden": 3, kept: 2000, "empty file": 40, "line\x1b[31m": 7}
    manifest = {
        "inputs": [row("d/" + "x" * 38, 5), *(row(f"{n}.txt", n) for n in range(1, 20))],
        "splits": {"train": row("", 10**6), "val": row("", 1)},
        "rejects": {
            reason: {"count": count, "examples": ["1st\x9b\udce9\r", "2nd"][: count % 2 * 2]}
            for reason, count in counts.items()
        },
        "fingerprint": "0123456789abcdef" * 4,
    }
    lines = progress.summary(manifest, tmp_path).splitlines()
    assert lines[1].split() == ["d/" + "x" * 38, "5", "10.00", "1,234"]
    assert [line.split()[:2] for line in lines[19:23]] == [
        ["18.txt", "18"], ["19.txt", "19"], ["->", "train"], ["->", "val"]
    ]  # fmt: skip
    assert lines[21].split()[2:] == ["1,000,000", "10.00", "1,234"]
    assert lines[23:-1] == [
        "skipped:", "         40  empty file", "          7  line?[31m  e.g. 1st???",
        "          3  hidden  e.g. 1st???", "repaired:", f"      2,000  {kept}",
    ]  # fmt: skip
    assert lines[-1] == f"fingerprint 0123456789abcdef  in {tmp_path}"
    manifest["inputs"] += [row("d/" + "x" * 36 + "end", 6)]
    lines = progress.summary(manifest, tmp_path).splitlines()
    assert lines[20].split()[:2] == ["19.txt", "19"]
    assert lines[21].split() == ["1", "more", "6", "10.00", "1,234"]
    manifest["inputs"][0] = manifest["inputs"][-1]
    shown = progress.summary(manifest, tmp_path).splitlines()[1].split()[0]
    assert shown == "..." + "x" * 34 + "end"
    for name, text in (
        ("書庫/小説", "書庫/小説" + " " * 31),  # each takes two columns, and a mark none
        ("e\u0301" * 4, "e\u0301" * 4 + " " * 36),
        ("x" + "説" * 30, "..." + "説" * 18 + " "),
    ):
        manifest["inputs"] = [row(name, 5)]
        shown = progress.summary(manifest, tmp_path).splitlines()[1]
        assert shown == f"{text} {5:>11} {10:>11.2f} {1234:>13,}"
