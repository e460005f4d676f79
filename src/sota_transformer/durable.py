"""Durable, all-or-nothing writes: a file or a folder exists completely or not at all.

The order is: write under a temporary name, hash while writing, fsync every file, manifest last,
fsync the folder, rename, fsync the parent. Only then may a caller report something as saved.
Nothing here knows what a shard or a checkpoint is. A failed fsync is never retried: the kernel may
have dropped the dirty pages, so the only safe response is to rewrite everything from memory.
`tests/chaos` enumerates the states that a power cut can leave after each function here.
"""

import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from sota_transformer.errors import BAD_DATA, LOCKED, SotaError

MANIFEST = "manifest.json"
_LEFTOVER = re.compile(r"\.(tmp|trash)-.+-[0-9a-f]{8}", re.DOTALL)
_MANIFEST_BYTES = 256 << 20  # a hostile manifest must not exhaust memory
_LOCK_SECONDS = 0.5
_BUFFER_BYTES = 16 << 20  # large enough to be worth starting a thread for each
# Errors of file systems without this kind of fsync; the last is macOS on SMB (restic#3720).
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY, errno.EBADF, errno.ENOENT)
# macOS deletes `._NAME` along with NAME on exFAT and SMB; on NFS an open file stays as `.nfs...`.
_IN_ORDER = (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY)


def _aside(path: Path, kind: str) -> Path:
    """A fresh name next to `path` that `sweep` recognizes."""
    return path.parent / f".{kind}-{path.name}-{secrets.token_hex(4)}"


def fsync(descriptor: int) -> None:
    """Flush to stable storage: on macOS a plain fsync stops at the drive's cache."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # network drives support only plain fsync
                raise
    os.fsync(descriptor)


def fsync_folder(path: Path) -> None:
    """Make the names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # network drives often cannot sync folders
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create `path` and its parents; each new name is synced into its parent folder.

    So is the deepest existing folder: its creator may have been killed before the sync.
    """
    chain = (path.absolute(), *path.absolute().parents)
    missing = sum(not folder.is_dir() for folder in chain)
    for folder in reversed(chain[: missing + 1]):
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):  # a parent that is searchable but not readable
            fsync_folder(folder.parent)


@contextmanager
def naming(path: Path, size: int | None = None) -> Iterator[None]:
    """Add the file name and the free disk space to errors of calls on a descriptor."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        with suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            needed = "" if size is None else f"{size:,} bytes so far, "
            text += f" ({needed}{free:,} bytes free)"
        raise OSError(error.errno, text, os.fspath(path)) from error


class HashingFile:
    """A new file that is hashed while it is written and synced when it is closed.

    Large files bypass the page cache where the system supports it: finding memory for the cache
    can cost more than the disk write, and a checkpoint is not read again soon.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))  # page-aligned, as O_DIRECT needs
        self._descriptor = os.open(path, flags, 0o666)
        self._filled, self._hash = 0, hashlib.sha256()

    def write(self, data: Any) -> None:
        """Append any contiguous buffer of bytes."""
        view = memoryview(data)
        if not view.nbytes:  # an empty array cannot be cast
            return
        view = view.cast("B")
        self.bytes += len(view)
        with naming(self.path, self.bytes):
            while view:
                room = self._buffer[self._filled :]
                part, view = view[: len(room)], view[len(room) :]
                room[: len(part)] = part
                self._filled += len(part)
                if self._filled == len(self._buffer):
                    self._flush()

    def _flush(self) -> None:
        """Write the buffer while another thread hashes it."""
        data, self._filled = self._buffer[: self._filled], 0
        _past_cache(self._descriptor, len(data) == len(self._buffer))  # not for a partial buffer
        hashed = None
        with ThreadPoolExecutor(1) as aside:
            with suppress(RuntimeError):  # at the limit on threads a checkpoint is saved, too
                hashed = aside.submit(self._hash.update, data)
            self._put(data)
        hashed.result() if hashed else self._hash.update(data)

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:  # a file system with stricter rules for O_DIRECT
                if error.errno != errno.EINVAL or not _past_cache(self._descriptor, False):
                    raise

    @property
    def sha256(self) -> str:
        """Hex digest of everything flushed so far."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Flush, fsync and close; an error in any of them reaches the caller."""
        with naming(self.path, self.bytes):
            try:
                self._flush()
                fsync(self._descriptor)
            finally:
                os.close(self._descriptor)

    def abandon(self) -> None:
        """Close after a failure, discarding the buffer and any further error."""
        with suppress(OSError):
            os.close(self._descriptor)


def _past_cache(descriptor: int, wanted: bool) -> bool:
    """Turn bypassing the page cache on or off; True if that changed anything."""
    direct = getattr(os, "O_DIRECT", 0)  # macOS has none
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not direct or wanted == bool(flags & direct):
        return False
    with suppress(OSError):  # a file system without O_DIRECT
        return fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ direct) == 0
    return False


class FolderWriter:
    """A folder under its temporary name; `create` opens its files, the manifest lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create(self, name: str) -> Iterator[HashingFile]:
        """A file of the folder, durable when the block ends."""
        file = HashingFile(self.path / name)
        try:
            yield file
        except BaseException:
            file.abandon()
            raise
        file.close()
        self.files[name] = {"bytes": file.bytes, "sha256": file.sha256}

    def write(self, name: str, data: bytes) -> None:
        """Write a small file in one call."""
        with self.create(name) as file:
            file.write(data)


@contextmanager
def commit_folder(final: Path, manifest: dict[str, Any]) -> Iterator[FolderWriter]:
    """Write a folder that appears at `final`, with its manifest, completely or not at all.

    `manifest` gets the key "files" and its own hash; the caller may still fill it inside the block.
    OSErrors pass through; a non-empty `final` raises one before the block is entered. After an
    error there is nothing at `final`, unless the last step, the fsync of the parent, failed: then
    the folder is complete, but a power cut may still remove it.
    """
    if os.path.lexists(final) and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(errno.EEXIST, "already exists and is not empty", os.fspath(final))
    make_folder(final.parent)
    temporary = _aside(final, "tmp")
    temporary.mkdir()
    try:
        writer = FolderWriter(temporary)
        yield writer
        writer.write(MANIFEST, canonical_json(seal(manifest | {"files": writer.files})))
        fsync_folder(temporary)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(final.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` with `data`; a crash leaves the old content or the new, never a mix."""
    temporary = _aside(path, "tmp")
    try:
        FolderWriter(path.parent).write(temporary.name, data)
        temporary.replace(path)
    except BaseException as error:
        if not isinstance(error, FileExistsError):  # then the temporary file is not ours
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink()
        if isinstance(error, OSError):  # report the name that the caller knows
            error.filename = os.fspath(path)
        raise
    fsync_folder(path.parent)


def discard(path: Path) -> None:
    """Delete a folder so that no reader ever sees a part of it, even after a power cut."""
    trash = _aside(path, "trash")
    path.rename(trash)
    fsync_folder(path.parent)
    remove(trash)


def remove(path: Path) -> None:
    """Delete a file or folder, but not what a link points to, nor what NFS keeps open."""

    def met(_call: object, _path: object, problem: tuple[Any, Any, Any]) -> None:
        if problem[1].errno not in _IN_ORDER:
            raise problem[1]

    with naming(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=met)
        else:
            path.unlink()


def sweep(folder: Path) -> None:
    """Remove what a killed process left in `folder`; call it first, under the lock.

    The process may also have been killed between a rename and the fsync after it. From now on we
    rely on what is visible, so it is made durable first.
    """
    if not folder.is_dir():
        return
    fsync_folder(folder)
    for path in sorted(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)


def canonical_json(value: Any) -> bytes:
    """The canonical JSON text of a value: sorted keys, no NaN, a final newline."""
    # The round trip turns numeric keys into strings, which sort differently, before sorting.
    value = json.loads(json.dumps(value, allow_nan=False))
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with `self_sha256` over all its other keys."""
    body = {key: value for key, value in manifest.items() if key != "self_sha256"}
    return body | {"self_sha256": hashlib.sha256(canonical_json(body)).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file. SotaError 65 if it is not one, or if any byte was changed."""
    try:
        with open_regular(path) as file:
            data = file.read(_MANIFEST_BYTES)
        value = json.loads(data)
        intact = isinstance(value, dict) and canonical_json(seal(value)) == data
    except (ValueError, RecursionError, OSError) as error:
        raise SotaError(f"{path}: not a readable manifest ({error})", BAD_DATA) from error
    if not intact:
        raise SotaError(f"{path}: the manifest does not match its own hash", BAD_DATA)
    return value


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; never follows a link, never blocks on a pipe."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def sha256_file(path: Path) -> str:
    """Hex digest of a regular file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> list[str]:
    """All problems of a committed folder, as messages; empty if every byte is as written.

    Files that the manifest does not list are ignored: we never read them.
    """
    try:
        files = read_manifest(folder / MANIFEST).get("files")
    except SotaError as error:
        return [str(error)]
    if not isinstance(files, dict):
        return [f"{folder / MANIFEST}: lists no files"]
    return [problem for name in sorted(files) if (problem := _check(folder, name, files[name]))]


def _check(folder: Path, name: str, expected: Any) -> str | None:
    """How the file differs from its manifest entry, or None."""
    path = folder / name
    if "/" in name or name in ("", ".", "..") or not isinstance(expected, dict):
        return f"{folder / MANIFEST}: invalid entry {name!r}"
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.get("bytes"):
                return f"{path}: has {size} bytes, expected {expected.get('bytes')}"
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):
                return f"{path}: sha256 mismatch"
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        return f"{str(path)!r}: {getattr(error, 'strerror', None) or error}"
    return None


class DirectoryLock:
    """Exclusive use of a folder while the process lives; the kernel releases it on kill -9.

    On network file systems flock may not exclude other hosts (`docs/guide.md`).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"

    def __enter__(self) -> Self:
        # A killed holder keeps the lock until the kernel has freed its memory, and a new holder
        # needs a moment to write its name: retry briefly before reporting who holds it.
        deadline = time.monotonic() + _LOCK_SECONDS
        while (held := self._try()) is None:
            if time.monotonic() > deadline:
                holder = "holder unknown"  # over SMB the lock also blocks reading
                with suppress(OSError), open_regular(self.path) as file:
                    holder = file.read(4096).decode(errors="replace").strip()
                raise SotaError(
                    f"{self.path.parent} is in use by another process ({holder}); wait for it to "
                    "finish, stop it, or choose another folder",
                    LOCKED,
                )
            time.sleep(0.02)
        self._descriptor = held
        return self

    def _try(self) -> int | None:
        """A descriptor that holds the lock, or None."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o666)
        try:
            with naming(self.path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    raise BlockingIOError(errno.EAGAIN, "the previous holder removed the folder")
                owner = dict(pid=os.getpid(), host=socket.gethostname(), started=int(time.time()))
                os.ftruncate(descriptor, os.pwrite(descriptor, json.dumps(owner).encode(), 0))
            return descriptor
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError | PermissionError):  # SMB raises the latter
                return None
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
