"""Preparation that is stopped, killed, repeated or refused, or that loses a worker."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from sota_transformer.data import units
from sota_transformer.durable import DirectoryLock
from sota_transformer.errors import IO_FAILED, SotaError
from tests.preparing import bytes_of, jsonl, refused, run, texts

COMMAND = """
import sys
from pathlib import Path
from sota_transformer.options import Prepare
from sota_transformer.data import units
from sota_transformer.data.prepare import prepare
from sota_transformer.errors import IO_FAILED, SotaError
if __name__ == "__main__":
    units.UNIT_BYTES = 4 << 10
    options = Prepare(inputs=(sys.argv[1],), out=Path(sys.argv[2]), val_fraction=0.1, workers=2)
    try:
        prepare(options)
    except SotaError as error:
        sys.exit(f"{error} {error.code}")
"""


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    script = out.parent / "command.py"
    script.write_text(COMMAND)
    return subprocess.Popen(
        [sys.executable, str(script), str(source), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children_of(parent: int) -> dict[int, str]:
    """Command lines of a process's children."""
    lines = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,command="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [line.split(None, 2) for line in lines]
    return {int(row[0]): row[2] for row in rows if len(row) == 3 and int(row[1]) == parent}


def workers_of(parent: int) -> list[int]:
    """The two encoding workers: children of the fork server if there is one."""
    children = children_of(parent)
    servers = [pid for pid, command in children.items() if "forkserver" in command]
    if servers:
        return list(children_of(servers[0]))
    return [pid for pid, command in children.items() if "spawn_main" in command]


def ended(processes: list[int], seconds: float) -> bool:
    """Whether all of them exit in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = subprocess.run(
            ["ps", "-o", "stat=", "-p", ",".join(map(str, processes))],
            capture_output=True,
            text=True,
        ).stdout.split()
        if all(state.startswith("Z") for state in alive):
            return True
        time.sleep(0.1)
    return False


def wait_for_units(work: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if work.exists() and len(list((work / "units").glob("unit-??????"))) >= count:
            return
        time.sleep(0.002)
    raise AssertionError("no units appeared")


def reference(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(units, "UNIT_BYTES", 4 << 10)
    run(tmp_path / "reference", source)
    return bytes_of(tmp_path / "reference")


@pytest.mark.parametrize(
    "kills", [(1, 40, 90), pytest.param(range(1, 101, 10), marks=pytest.mark.slow)]
)
def test_repeated_kills_end_in_the_same_bytes(
    kills: Iterable[int], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "data", tmp_path / ".data.preparing"
    for count in kills:
        process = start(source, out)
        wait_for_units(work, count)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not out.exists()
    before = {path.name: path.stat().st_mtime_ns for path in (work / "units").glob("unit-??????")}
    process = start(source, out)
    wait_for_units(work, len(before) + 1)
    kept = sum(
        path.stat().st_mtime_ns == before.get(path.name)
        for path in (work / "units").glob("unit-??????")
    )
    assert kept >= 60, "finished units must not be made again"
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert bytes_of(out) == reference(source, tmp_path, monkeypatch)
    assert not work.exists()


def test_a_killed_worker_is_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    process = start(source, out)
    wait_for_units(tmp_path / ".data.preparing", 1)
    process.send_signal(signal.SIGSTOP)  # so that it cannot finish before the kill
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert bytes_of(out) == reference(source, tmp_path, monkeypatch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_visible_and_no_process(
    source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(source, tmp_path / "data")
    wait_for_units(tmp_path / ".data.preparing", 5)
    process.send_signal(signal.SIGSTOP)  # or it may end before `ps` has run
    children = [*children_of(process.pid), *workers_of(process.pid)]
    assert len(children) >= 3
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=20)
    assert errors.strip().endswith(str(128 + number)) and "to resume from" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "data").exists()
    assert ended(children, seconds=5)


def test_workers_of_a_killed_parent_exit(source: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path / "data")
    wait_for_units(tmp_path / ".data.preparing", 5)
    children = [*children_of(process.pid), *workers_of(process.pid)]
    assert len(children) >= 3
    process.kill()
    process.communicate()
    assert ended(children, seconds=10)


def test_prepared_again_says_so_and_other_inputs_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my data"  # unquoted, `rm -r my data` would delete two others
    first = run(out, source)
    before = bytes_of(out)
    capsys.readouterr()
    assert run(out, source)["fingerprint"] == first["fingerprint"]
    assert "already" in capsys.readouterr().out
    refused(73, "--append", f"rm -r '{out}'", out=out, inputs=(source,), val_fraction=0.2)
    source.write_bytes(jsonl(texts(10)))
    refused(73, "different or changed inputs", out=out, inputs=(source,))
    assert bytes_of(out) == before


def test_bad_inputs_and_targets(tmp_path: Path) -> None:
    out, good = tmp_path / "data", tmp_path / "good.jsonl"
    good.write_bytes(jsonl(texts(50)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_bytes(b"\x89PNG")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    one = tmp_path / "one.txt"
    one.write_text("Only one document.")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n" * 5)
    refused(66, "does not exist", out=out, inputs=(tmp_path / "nothing.txt",))
    refused(66, "matches nothing", out=out, inputs=(tmp_path / "*.zzz",))
    refused(66, "no text found", out=out, inputs=(tmp_path / "empty",))
    refused(66, "no text found", ".png", out=out, inputs=(tmp_path / "pictures",))
    refused(65, "1 document is too few", "several files", out=out, inputs=(one,))
    refused(65, "too few", "skipped: 5 x not a JSON line", out=out, inputs=(one, bad))
    refused(65, "no usable text", "5 x not a JSON line", out=out, inputs=(bad,))
    refused(
        65,
        *("val split would be empty", "run `sota prepare` with --val-fraction"),  # also to `merge`
        out=out,
        inputs=(good,),
        val_fraction=1e-9,
    )
    refused(73, "is not a folder", out=tmp_path / "file", inputs=(good,))
    refused(73, "no prepared data", out=tmp_path / "full", inputs=(good,))
    refused(
        73, "cannot create", "choose another --out", out=tmp_path / "file" / "below", inputs=(good,)
    )
    for without in (out, tmp_path / "full", tmp_path / "file"):  # another --out would not help
        refused(66, "--append: there is no", out=without, inputs=(good,), append=True)
    for wrong in ({"val_fraction": 1.5}, {"workers": -1}, {"near_dedup": 0.1}, {"part": "3/2"}):
        refused(2, *wrong, out=out, inputs=(good,), **wrong)
    refused(2, "INPUT", out=out, inputs=())
    refused(2, "standard input", out=out, inputs=("-",), part="1/2")
    refused(2, "too small", out=out, inputs=(good,), memory_mb=10)
    assert not out.exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_validation_fraction_of_zero_makes_no_validation_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(30)))
    manifest = run(tmp_path / "data", tmp_path / "a.jsonl", val_fraction=0.0)
    assert manifest["splits"]["val"] == {"shards": [], "tokens": 0, "documents": 0, "text_bytes": 0}


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(texts(50)))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("sota_transformer.data.merge._seal", full)
    (tmp_path / "none").mkdir()
    inputs = (tmp_path / "none", source)
    refused(74, "No space left", "MB free", out=tmp_path / "data", inputs=inputs)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()  # then without the failed input: another one gets its number
    assert run(tmp_path / "data", source)["inputs"][0]["documents"] == 50


def test_two_preparations_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".data.preparing").mkdir()
    with DirectoryLock(tmp_path / ".data.preparing"):
        refused(73, "in use", out=tmp_path / "data", inputs=(source,))


def test_damaged_results_are_remade(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 4 << 10)
    run(tmp_path / "data", source, part="1/1")
    assert not (tmp_path / "data").exists()
    for i, path in enumerate(sorted((tmp_path / ".data.preparing" / "units").iterdir())):
        data = bytearray(path.read_bytes())
        if i % 3 == 0:
            data[len(data) // 3] ^= 1
        path.write_bytes(data if i % 3 != 1 else data[: -(i % 50) - 1])
    run(tmp_path / "data", source)
    assert bytes_of(tmp_path / "data") == reference(source, tmp_path, monkeypatch)


def test_a_work_folder_that_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rmdir

    def rmdir(path: str, *, dir_fd: int | None = None) -> None:
        if path == "spool" and not os.path.lexists(tmp_path / ".data.preparing" / "shards"):
            raise OSError(errno.EIO, "broken", path)  # relative to `dir_fd`, like the real one
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(300)))
    with pytest.raises(SotaError, match=r"/\.data\.preparing: .*broken .* bytes free") as caught:
        run(tmp_path / "data", tmp_path / "a.jsonl")
    assert caught.value.code == IO_FAILED
    monkeypatch.undo()
    run(tmp_path / "data", tmp_path / "a.jsonl")
    assert not list(tmp_path.glob(".data*"))
