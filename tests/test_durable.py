"""durable.py: old or new and nothing in between, errors that name the file, a lock that ends."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sota_transformer import durable
from sota_transformer.errors import BAD_DATA, LOCKED, SotaError


def make(final: Path, **files: bytes) -> None:
    with durable.commit_folder(final, {"step": 1}) as writer:
        for name, data in files.items():
            writer.write(name, data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_commit_and_verify(tmp_path: Path) -> None:
    final = tmp_path / "not" / "yet" / "step-1"
    manifest = {"step": 1}
    with durable.commit_folder(final, manifest) as writer:
        writer.write("small.json", b"{}")
        with writer.create("big.bin") as file:
            file.write(np.arange(70000, dtype=np.uint16).reshape(7, -1))
            file.write(np.empty((0, 3)))
        assert not final.exists()
        manifest["late"] = 2
    assert names(final) == ["big.bin", "manifest.json", "small.json"]
    assert names(final.parent) == ["step-1"]
    assert durable.verify(final) == []
    read = durable.read_manifest(final / durable.MANIFEST)
    assert read["step"] == 1 and read["late"] == 2
    assert read["files"]["big.bin"]["bytes"] == 140000
    assert read["files"]["big.bin"]["sha256"] == durable.sha256_file(final / "big.bin")
    assert (final / "big.bin").read_bytes() == np.arange(70000, dtype=np.uint16).tobytes()


@pytest.mark.parametrize("more", [-1, 0, 1, (32 << 20) + 5])
def test_large_files_in_any_pieces(tmp_path: Path, more: int) -> None:
    data = np.random.default_rng(more + 1).bytes(durable._BUFFER_BYTES + more)
    cuts = [0, 1, 4096, 70_001, len(data) // 2, len(data)]
    with durable.commit_folder(tmp_path / "a", {}) as writer, writer.create("big.bin") as file:
        for begin, end in itertools.pairwise(cuts):
            file.write(data[begin:end])
    assert (tmp_path / "a" / "big.bin").read_bytes() == data and durable.verify(
        tmp_path / "a"
    ) == []


def test_a_file_system_that_refuses_our_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.write, []

    def write(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            refused.append(len(data))
            raise OSError(errno.EINVAL, "not my size")
        return real(descriptor, data[:1_000_001])  # partial writes

    monkeypatch.setattr(os, "write", write)
    data = bytes(range(256)) * 140_000
    make(tmp_path / "a", x=data)
    assert (tmp_path / "a" / "x").read_bytes() == data and durable.verify(tmp_path / "a") == []
    assert refused in ([], [durable._BUFFER_BYTES] * 2)  # none where the flag does not exist


def test_an_error_inside_a_large_file_has_path_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"full .20,000,000 bytes so far, .* bytes free") as caught:
        make(tmp_path / "a", x=bytes(20_000_000))
    assert caught.value.errno == errno.ENOSPC and str(caught.value.filename).endswith("/x")
    assert names(tmp_path) == []


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        durable.commit_folder(tmp_path / "a", {}) as writer,
        writer.create("half") as file,
    ):
        file.write(b"x" * 3_000_000)
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_folder_with_content_is_never_replaced(tmp_path: Path) -> None:
    make(tmp_path / "a", x=b"1")
    commit = durable.commit_folder(tmp_path / "a", {})
    with pytest.raises(FileExistsError, match="not empty"):  # before anything large is written
        commit.__enter__()
    assert names(tmp_path) == ["a"] and durable.verify(tmp_path / "a") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        make(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", x=b"1")
    assert durable.verify(tmp_path / "empty") == []


def test_write_file_replaces_and_follows_umask(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    old = os.umask(0o027)
    try:
        durable.write_file(path, b"old")
        durable.write_file(path, b"new")
    finally:
        os.umask(old)
    assert path.read_bytes() == b"new" and names(tmp_path) == ["report.html"]
    assert path.stat().st_mode & 0o777 == 0o640
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        durable.write_file(tmp_path / "folder", b"")
    assert names(tmp_path) == ["folder", "report.html"]


def limit_file_size(size: int) -> str:
    return f"""
import resource, signal, sys
from pathlib import Path
from sota_transformer import durable
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""


@pytest.mark.parametrize(
    "action",
    [
        "durable.write_file(Path(sys.argv[1]) / 'x', b'n' * 100_000)",
        "with durable.commit_folder(Path(sys.argv[1]) / 'x', {}) as w:\n"
        " w.write('f', b'n' * 100_000)",
    ],
)
def test_a_write_that_fails_names_file_and_bytes(tmp_path: Path, action: str) -> None:
    program = limit_file_size(50_000) + action
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and f"Errno {errno.EFBIG}" in last
    assert str(tmp_path) in last and "100,000 bytes so far" in last and "bytes free" in last
    assert names(tmp_path) == []


def test_make_folder(tmp_path: Path) -> None:
    durable.make_folder(tmp_path / "a" / "b")
    durable.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        durable.make_folder(tmp_path / "file")
    with pytest.raises(OSError):
        durable.make_folder(tmp_path / "file" / "below")


def test_discard_and_sweep(tmp_path: Path) -> None:
    make(tmp_path / "a", x=b"1")
    durable.discard(tmp_path / "a")
    assert names(tmp_path) == []
    (tmp_path / ".tmp-step-1-0123abcd").mkdir()
    (tmp_path / ".tmp-step-1-0123abcd" / "half").write_bytes(b"x")
    (tmp_path / ".trash-step-2-00000000").mkdir()
    (tmp_path / ".tmp-config.json-deadbeef").write_bytes(b"")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / ".tmp-link-deadbeef").symlink_to(outside)
    kept = [".tmp-mine", ".trash", "outside", "step-3", "x.tmp-step-1-0123abcd"]
    for name in kept:
        (tmp_path / name).mkdir(exist_ok=True)
    durable.sweep(tmp_path)
    assert names(tmp_path) == kept
    durable.sweep(tmp_path / "missing")


def test_file_systems_with_unusual_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.unlink

    def like_a_mac_on_exfat(name: str, **where: int) -> None:
        if name.startswith("._"):  # `rmtree` handles it since Python 3.13
            raise FileNotFoundError(errno.ENOENT, "gone with what it belongs to", name)
        real(name, **where)
        with contextlib.suppress(FileNotFoundError):
            real(f"._{name}", **where)

    def like_nfs(name: str, **where: int) -> None:
        if name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "somebody reads it", name)
        os.rename(name, f".nfs-{name}", src_dir_fd=where["dir_fd"], dst_dir_fd=where["dir_fd"])

    make(tmp_path / "a", x=b"1", **{"._x": b"2"})
    monkeypatch.setattr(os, "unlink", like_a_mac_on_exfat)
    durable.discard(tmp_path / "a")
    assert names(tmp_path) == []
    make(tmp_path / "b", x=b"1")
    monkeypatch.setattr(os, "unlink", like_nfs)
    durable.discard(tmp_path / "b")
    assert len(names(tmp_path)) == 1  # trash, which the next start sweeps
    durable.sweep(tmp_path)
    monkeypatch.setattr(os, "unlink", real)
    durable.sweep(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOENT, errno.EIO]
)
def test_network_drives_without_fsync_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(durable, "fsync", fsync)
    with pytest.raises(OSError) if code == errno.EIO else contextlib.nullcontext():
        make(tmp_path / "a", x=b"1")
        assert durable.verify(tmp_path / "a") == []


def test_canonical_json_and_seal() -> None:
    assert durable.canonical_json({"b": 1, "a": [True, "ä"]}) == (
        b'{\n "a": [\n  true,\n  "\\u00e4"\n ],\n "b": 1\n}\n'
    )
    sealed = durable.seal({2: "two", 10: "ten"})  # type: ignore[dict-item]
    assert durable.seal(json.loads(durable.canonical_json(sealed))) == json.loads(
        durable.canonical_json(sealed)
    )
    with pytest.raises(ValueError):
        durable.canonical_json({"loss": float("nan")})


HOSTILE = {
    "empty": b"",
    "list": b"[]",
    "nan": b'{"a": NaN}',
    "infinite": b'{"a": 1e999}',
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "surrogate": b'{"a": "\\ud800"}',
    "latin": b'{"a": "\xe4"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf" + durable.canonical_json(durable.seal({"files": {}})),
    "twice": durable.canonical_json(durable.seal({"a": 1})).replace(b'"a": 1', b'"a": 1, "a": 1'),
    "spaces": durable.canonical_json(durable.seal({"files": {}})) + b" ",
    "no hash": b'{\n "files": {}\n}\n',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifest_is_an_error_in_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / durable.MANIFEST).write_bytes(HOSTILE[kind])
    with pytest.raises(SotaError) as caught:
        durable.read_manifest(tmp_path / durable.MANIFEST)
    assert caught.value.code == BAD_DATA and "manifest.json" in str(caught.value)
    assert len(durable.verify(tmp_path)) == 1


@pytest.mark.parametrize(
    "files",
    [
        [],
        None,
        {"../x": {"bytes": 0}},
        {"/etc/passwd": {}},
        {"": {}},
        {"..": {}},
        {"nul\0": {}},
        {"\ud800": {}},
        {"n" * 5000: {}},
        {"x": []},
        {"x": {"bytes": True, "sha256": None}},
        {"x": {"bytes": 1, "sha256": ["a"]}},
    ],
)
def test_sealed_but_hostile_entries_are_problems(tmp_path: Path, files: object) -> None:
    (tmp_path / "x").write_bytes(b"1")
    body = durable.canonical_json(durable.seal({"files": files}))
    (tmp_path / durable.MANIFEST).write_bytes(body)
    assert len(durable.verify(tmp_path)) == 1


HOLD = """
import sys, time
from pathlib import Path
from sota_transformer.durable import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_names_the_holder_and_ends_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            started = time.monotonic()
            with pytest.raises(SotaError, match=f'"pid": {holder.pid}') as caught:
                durable.DirectoryLock(tmp_path).__enter__()
            assert caught.value.code == LOCKED and time.monotonic() - started < 2
        finally:
            holder.send_signal(signal.SIGKILL)
    with durable.DirectoryLock(tmp_path), pytest.raises(SotaError):
        durable.DirectoryLock(tmp_path).__enter__()
    with durable.DirectoryLock(tmp_path):
        owner = json.loads((tmp_path / ".lock").read_text())
    assert owner["pid"] == os.getpid()


def test_locks_of_network_drives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, code = os.open, errno.EACCES

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    def locked(path: Path, flags: int, *mode: int) -> int:
        if not flags & os.O_RDWR:  # over SMB nobody else can read a locked file
            raise PermissionError(errno.EACCES, "locked", path)
        return real(path, flags, *mode)

    monkeypatch.setattr(durable, "_LOCK_SECONDS", 0.05)
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "open", locked)
    with pytest.raises(SotaError, match="in use by another process") as caught:
        durable.DirectoryLock(tmp_path).__enter__()
    assert caught.value.code == LOCKED
    code = errno.ENOSYS  # Lustre, mounted without it
    with pytest.raises(OSError) as unknown:
        durable.DirectoryLock(tmp_path).__enter__()
    assert unknown.value.filename == str(tmp_path / ".lock")


def test_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), durable.DirectoryLock(tmp_path):
        pass
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_planted_names_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    monkeypatch.setattr(durable.secrets, "token_hex", lambda _: "00000000")
    (tmp_path / ".tmp-x-00000000").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        durable.write_file(tmp_path / "x", b"new")
    with pytest.raises(FileExistsError):
        make(tmp_path / "x")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_a_lock_in_a_recreated_folder_is_a_new_lock(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with durable.DirectoryLock(folder):
        shutil.rmtree(folder)  # as a finished preparation does with its work folder
        folder.mkdir()
        with durable.DirectoryLock(folder):  # the old one locks a deleted file
            pass


def test_a_loser_waits_for_a_winner_that_is_exiting(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=-1) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        threading.Timer(0.2, holder.kill).start()
        with durable.DirectoryLock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
