"""Preparation that is stopped, killed, repeated or refused, or that loses a worker."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from sota_transformer.data import units
from sota_transformer.data.prepare import merge
from sota_transformer.data.shards import TokenWindows
from sota_transformer.durable import DirectoryLock, canonical_json, seal
from sota_transformer.errors import IO_FAILED, SotaError
from sota_transformer.options import Merge
from tests.preparing import bytes_of, documents, everything, jsonl, refused, run, texts

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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """About 400 units of work for COMMAND: enough to be seen in progress on a busy machine."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl(texts(5000)))
    return path


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
        65, "val split would be empty", "--val-fraction", out=out, inputs=(good,), val_fraction=1e-9
    )
    refused(73, "is not a folder", out=tmp_path / "file", inputs=(good,))
    refused(73, "no prepared data", out=tmp_path / "full", inputs=(good,))
    refused(
        73, "cannot create", "choose another --out", out=tmp_path / "file" / "below", inputs=(good,)
    )
    refused(66, "--append", out=out, inputs=(good,), append=True)
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
        path.write_bytes(data if i % 3 else data[: -(i % 50) - 1])
    run(tmp_path / "data", source)
    assert bytes_of(tmp_path / "data") == reference(source, tmp_path, monkeypatch)


def test_parts_then_together(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 16 << 10)
    out = tmp_path / "data"
    for part in ("3/3", "1/3"):
        assert run(out, source, part=part) == {}
    found = sorted(path.name for path in (tmp_path / ".data.preparing" / "units").iterdir())
    assert all(int(name[5:]) % 3 != 1 for name in found)
    run(out, source)
    run(tmp_path / "whole", source)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_merge_puts_parts_together(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 16 << 10)
    out = tmp_path / "data"
    monkeypatch.chdir(source.parent)
    with pytest.raises(SotaError, match="no parts of") as caught:
        merge(Merge(out=out))
    assert caught.value.code == 66
    for part in ("3/3", "1/3"):
        run(out, source.name, part=part)
    with pytest.raises(SotaError, match="parts with different or changed inputs,") as caught:
        run(out, source.name, part="2/3", near_dedup=0.8)
    assert caught.value.code == 73
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SotaError, match=r"unfinished parts .*--part 2/3") as caught:
        merge(Merge(out=out))
    assert caught.value.code == 66
    monkeypatch.chdir(source.parent)
    run(out, source.name, part="2/3")
    monkeypatch.chdir(tmp_path)
    begun = json.loads((tmp_path / ".data.preparing" / "asked.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", lambda _: begun | {"folder": str(tmp_path / "gone")})
        with pytest.raises(
            SotaError, match=r"gone, the working directory .* no longer exists"
        ) as caught:
            merge(Merge(out=Path("data"), workers=1))
        assert caught.value.code == 66
    merged = merge(Merge(out=Path("data"), workers=1))
    assert merge(Merge(out=out))["fingerprint"] == merged["fingerprint"]
    (tmp_path / ".data.preparing").mkdir()  # as NFS leaves it, with the lock open until the end
    assert merge(Merge(out=out))["fingerprint"] == merged["fingerprint"]
    run(tmp_path / "whole", source)
    assert bytes_of(out, manifest=False) == bytes_of(tmp_path / "whole", manifest=False)


def test_append_keeps_what_is_there(tmp_path: Path) -> None:
    out, old, new = tmp_path / "data", texts(300), texts(200, seed=4)
    (tmp_path / "a.jsonl").write_bytes(jsonl(old))
    (tmp_path / "b.jsonl").write_bytes(jsonl(old[:30] + new))
    run(out, tmp_path / "a.jsonl")
    shards = bytes_of(out, manifest=False)
    sides = {split: documents(out, split) for split in ("train", "val")}
    manifest = run(out, tmp_path / "b.jsonl", append=True, val_fraction=0.5)
    assert bytes_of(out, manifest=False).items() >= shards.items()
    assert manifest["rejects"]["exact duplicate"]["count"] == 30
    for split, before in sides.items():
        assert documents(out, split)[: len(before)] == before
    assert everything(out) == sorted(old + new)
    again = run(out, tmp_path / "b.jsonl", append=True, val_fraction=0.5)
    assert again["fingerprint"] == manifest["fingerprint"]
    # The splits are those that preparing both at once would have given.
    (tmp_path / "c.jsonl").write_bytes(jsonl(old + new))
    run(tmp_path / "both", tmp_path / "c.jsonl")
    assert documents(tmp_path / "both", "val") == documents(out, "val")
    assert json.loads((out / "manifest.json").read_text())["inputs"][1]["documents"] == 200
    damaged = next(out.glob("*.hashes.npy"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    refused(65, "hashes.npy: sha256 mism", out=out, inputs=(tmp_path / "c.jsonl",), append=True)


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


def test_append_to_data_hashed_by_another_version_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "data"
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(300)))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts(300, seed=1)))
    manifest = run(out, tmp_path / "a.jsonl")
    rule = manifest["split_rule"] | {"hash": "BLAKE2b-128 of the UTF-8 text, key sota-document-1"}
    (out / "manifest.json").write_bytes(canonical_json(seal(manifest | {"split_rule": rule})))
    before = bytes_of(out)
    refused(65, "BLAKE2b-128", out=out, inputs=(tmp_path / "b.jsonl",), append=True)
    assert bytes_of(out) == before
    assert len(TokenWindows(out, "train", 16))  # it can still be trained on


def test_a_link_to_a_folder_is_the_folder(tmp_path: Path) -> None:
    """Created, appended to and merged there, even on another disk than the link."""
    for i, name in enumerate(("a.jsonl", "b.jsonl")):
        (tmp_path / name).write_bytes(jsonl(texts(300, seed=i)))
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    out = tmp_path / "data"
    out.symlink_to(tmp_path / "disk" / "empty")
    run(out, tmp_path / "a.jsonl", part="1/1")
    assert [path.name for path in tmp_path.glob(".*")] == []
    merge(Merge(out=out))
    run(out, tmp_path / "b.jsonl", append=True)
    assert out.is_symlink() and len(everything(out)) == 600


def test_a_target_inside_its_input_gives_the_same_when_resumed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(300)))
    run(tmp_path / "data", tmp_path)
    whole = bytes_of(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    run(tmp_path / "data", tmp_path, part="1/1")
    run(tmp_path / "data", tmp_path)
    assert bytes_of(tmp_path / "data") == whole
