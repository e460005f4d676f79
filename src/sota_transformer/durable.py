"""Durable, all-or-nothing writes: a file or a folder exists completely or not at all.

The order is: write aside, hash while writing, fsync every file, manifest last, fsync the folder,
rename, fsync the parent. Only then may a caller say that something is saved. Nothing here knows
what a shard or a checkpoint is, and a failed fsync is never tried again: after it the kernel may
have dropped the dirty pages, so the only safe answer is to write anew from memory.
`tests/chaos` enumerates what a power cut can leave of each function here.
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
_MANIFEST_BYTES = 256 << 20  # a hostile manifest must not fill the memory
_LOCK_SECONDS = 0.5
_BUFFER_BYTES = 16 << 20  # one thread to start for so many
# How file systems say that they know no such fsync; the last is a Mac's for SMB (restic#3720).
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY, errno.EBADF, errno.ENOENT)
# With a name a Mac deletes its `._NAME` on exFAT and SMB; what is open stays on NFS as `.nfs...`.
_IN_ORDER = (errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY)


def _aside(path: Path, kind: str) -> Path:
    """A fresh name beside `path` that `sweep` recognises."""
    return path.parent / f".{kind}-{path.name}-{secrets.token_hex(4)}"


def fsync(descriptor: int) -> None:
    """Flush to the platter: plain fsync on macOS stops at the drive's cache."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # network drives know only the plain one
                raise
    os.fsync(descriptor)


def fsync_folder(path: Path) -> None:
    """Make the names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # of folders, network drives know often none
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create `path` and its parents; each new name is synced into the folder above it.

    So is the deepest one that exists: whoever made it may have been killed before its sync.
    """
    chain = (path.absolute(), *path.absolute().parents)
    missing = sum(not folder.is_dir() for folder in chain)
    for folder in reversed(chain[: missing + 1]):
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):  # a parent that may be passed but not read
            fsync_folder(folder.parent)


@contextmanager
def naming(path: Path, size: int | None = None) -> Iterator[None]:
    """Add to an error of a descriptor what it lacks: the file, and how full its disk is."""
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

    What is large goes past the page cache where the system can do that: finding memory for the
    cache can cost more than the disk does, and a checkpoint is not read again soon.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))  # aligned, as O_DIRECT wants it
        self._descriptor = os.open(path, flags, 0o666)
        self._filled, self._hash = 0, hashlib.sha256()

    def write(self, data: Any) -> None:
        """Append any contiguous buffer of bytes."""
        view = memoryview(data)
        if not view.nbytes:  # an array without elements cannot be cast
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
        """Write what the buffer holds; another thread hashes it meanwhile."""
        data, self._filled = self._buffer[: self._filled], 0
        _past_cache(self._descriptor, len(data) == len(self._buffer))  # not the end of a file
        with ThreadPoolExecutor(1) as aside:
            hashed = aside.submit(self._hash.update, data)
            self._put(data)
        hashed.result()

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:  # a file system more particular than it said
                if error.errno != errno.EINVAL or not _past_cache(self._descriptor, False):
                    raise

    @property
    def sha256(self) -> str:
        """Hex digest of everything that has left the buffer."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Flush, fsync and close; an error of any of the three reaches the caller."""
        with naming(self.path, self.bytes):
            try:
                self._flush()
                fsync(self._descriptor)
            finally:
                os.close(self._descriptor)

    def abandon(self) -> None:
        """Close after a failure: what the buffer still holds is not worth another error."""
        with suppress(OSError):
            os.close(self._descriptor)


def _past_cache(descriptor: int, wanted: bool) -> bool:
    """Let writes go past the page cache, or not; whether that changed anything."""
    direct = getattr(os, "O_DIRECT", 0)  # macOS has none
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not direct or wanted == bool(flags & direct):
        return False
    with suppress(OSError):  # a file system without it
        return fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ direct) == 0
    return False


class FolderWriter:
    """A folder being written aside; `create` opens its files, the manifest lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create(self, name: str) -> Iterator[HashingFile]:
        """One file of the folder, durable when the block ends."""
        file = HashingFile(self.path / name)
        try:
            yield file
        except BaseException:
            file.abandon()
            raise
        file.close()
        self.files[name] = {"bytes": file.bytes, "sha256": file.sha256}

    def write(self, name: str, data: bytes) -> None:
        """A whole small file at once."""
        with self.create(name) as file:
            file.write(data)


@contextmanager
def commit_folder(final: Path, manifest: dict[str, Any]) -> Iterator[FolderWriter]:
    """Write a folder that appears at `final`, with its manifest, completely or not at all.

    `manifest` gets the key "files" and the folder's self hash; the caller may still fill it inside
    the block. Raises OSError as it comes; a folder with content at `final` is one, before the block
    is entered. After an error nothing is at `final`, unless the last step failed, the fsync of the
    parent: then all of it is there, but a power cut may still take it away.
    """
    if os.path.lexists(final) and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists already and is not empty", os.fspath(final))
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
    """Replace `path` with `data`; a crash leaves the old content or the new, never a mixture."""
    temporary = _aside(path, "tmp")
    try:
        FolderWriter(path.parent).write(temporary.name, data)
        temporary.replace(path)
    except BaseException as error:
        if not isinstance(error, FileExistsError):  # somebody else's
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink()
        if isinstance(error, OSError):  # by the name that the caller knows
            error.filename = os.fspath(path)
        raise
    fsync_folder(path.parent)


def discard(path: Path) -> None:
    """Delete a folder so that no reader, not even after a power cut, sees half of it."""
    trash = _aside(path, "trash")
    path.rename(trash)
    fsync_folder(path.parent)
    remove(trash)


def remove(path: Path) -> None:
    """Delete whatever has this name, but nothing that it points to, nor what NFS keeps open."""

    def met(_call: object, _path: object, problem: tuple[Any, Any, Any]) -> None:
        if problem[1].errno not in _IN_ORDER:
            raise problem[1]

    with naming(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=met)
        else:
            path.unlink()


def sweep(folder: Path) -> None:
    """Remove what a killed process left in `folder`; call it under the lock, before anything.

    It may also have been killed between a rename and the fsync after it: what is visible now is
    relied on from now on, so it is made durable first.
    """
    if not folder.is_dir():
        return
    fsync_folder(folder)
    for path in sorted(folder.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no NaN, a final newline."""
    # Once there and back, since numbers as keys sort in another way than the strings they become.
    value = json.loads(json.dumps(value, allow_nan=False))
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with `self_sha256` over all its other keys."""
    body = {key: value for key, value in manifest.items() if key != "self_sha256"}
    return body | {"self_sha256": hashlib.sha256(canonical_json(body)).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """A sealed JSON file. Raises SotaError 65 if it is not one, or if any byte was changed."""
    try:
        with open_regular(path) as file:
            data = file.read(_MANIFEST_BYTES)
        value = json.loads(data)
        intact = isinstance(value, dict) and canonical_json(seal(value)) == data
    except (ValueError, RecursionError, OSError) as error:
        raise SotaError(f"{path}: not a readable manifest ({error})", BAD_DATA) from error
    if not intact:
        raise SotaError(f"{path}: the manifest's own hash does not match", BAD_DATA)
    return value


def open_regular(path: Path) -> io.BufferedReader:
    """A plain file for reading: never follows a link, never waits on a pipe."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def sha256_file(path: Path) -> str:
    """Hex digest of a plain file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> list[str]:
    """Every problem of a committed folder, in words; an empty list means each byte is as written.

    Files that the manifest does not list are not looked at: nothing of ours reads them.
    """
    try:
        files = read_manifest(folder / MANIFEST).get("files")
    except SotaError as error:
        return [str(error)]
    if not isinstance(files, dict):
        return [f"{folder / MANIFEST}: lists no files"]
    return [problem for name in sorted(files) if (problem := _check(folder, name, files[name]))]


def _check(folder: Path, name: str, expected: Any) -> str | None:
    """Why the file is not the one the manifest lists, or None."""
    path = folder / name
    if "/" in name or name in ("", ".", "..") or not isinstance(expected, dict):
        return f"{folder / MANIFEST}: bad entry {name!r}"
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.get("bytes"):
                return f"{path}: {size} bytes, not {expected.get('bytes')}"
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):
                return f"{path}: sha256 mismatch"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"{str(path)!r}: {getattr(error, 'strerror', None) or error}"
    return None


class DirectoryLock:
    """One process per folder, for as long as that process lives; the kernel lets go on kill -9.

    On network file systems flock may not exclude other hosts (`docs/guide.md`).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"

    def __enter__(self) -> Self:
        # A killed holder keeps the lock until the kernel has freed all its memory, and a new one
        # needs a moment to write its name: insist a little before saying who it is.
        deadline = time.monotonic() + _LOCK_SECONDS
        while (held := self._try()) is None:
            if time.monotonic() > deadline:
                holder = "which one cannot be read"  # as over SMB, where a lock locks that, too
                with suppress(OSError), open_regular(self.path) as file:
                    holder = file.read(4096).decode(errors="replace").strip()
                raise SotaError(
                    f"{self.path.parent} is in use by another process ({holder}); wait for it, "
                    "stop it, or choose another folder",
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
                    raise BlockingIOError(errno.EAGAIN, "the last holder removed the folder")
                owner = dict(pid=os.getpid(), host=socket.gethostname(), started=int(time.time()))
                size = os.pwrite(descriptor, json.dumps(owner).encode(), 0)
                os.ftruncate(descriptor, size)
            return descriptor
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError | PermissionError):  # the second is SMB's word
                return None
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
