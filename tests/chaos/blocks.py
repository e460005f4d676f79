"""A disk that records every block written and every flush: one file served through /dev/fuse.

A loop device on that file holds a real ext4. Cutting the power means to build the disk from the
record: everything up to a flush, and any part of what was written after it.
"""

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096
_RECORD = struct.Struct("<dQQ")  # time.monotonic, offset, size; a size of 0 is a flush
# linux/fuse.h: struct fuse_in_header, fuse_out_header, fuse_attr, fuse_entry_out without attr
_IN, _OUT = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
_ATTR, _ENTRY = struct.Struct("<6Q10I"), struct.Struct("<4Q2I")
_MOST = 1 << 20  # bytes of a write
_FOREVER, _DIRECT, _BIG = 3600, 1, 1 << 5 | 1 << 22
_LOOKUP, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS, _FSYNC = 1, 3, 4, 14, 15, 16, 17, 20
_INIT, _OPENDIR, _DESTROY, _SILENT, _NOTHING = 26, 27, 38, (2, 36, 42), (18, 25, 28, 29)


@dataclass(frozen=True)
class Write:
    """A recorded write, or a flush if there is no data."""

    time: float
    offset: int
    data: bytes


class _Server:
    """The file `disk` in a folder, of a fixed size."""

    def __init__(self, size: int, image: Path, record: Path) -> None:
        self._size = size
        self._image = os.open(image, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._image, size)
        self._record = record.open("wb", buffering=_MOST)

    def serve(self, mount: Path) -> None:
        """Answer until the folder is unmounted."""
        fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"blocks", os.fsencode(mount), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount of /dev/fuse")
        print("mounted", flush=True)
        while True:
            try:
                message = os.read(fuse, _MOST + 2 * BLOCK)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return self._record.close()
                continue
            _, code, unique, node, *_ = _IN.unpack_from(message)
            if code in _SILENT:
                continue
            reply = self._answer(code, node, message[_IN.size :])
            failed, data = (-reply, b"") if isinstance(reply, int) else (0, reply)
            os.write(fuse, _OUT.pack(_OUT.size + len(data), failed, unique) + data)

    def _answer(self, code: int, node: int, body: bytes) -> bytes | int:
        """The data of a reply, or an error number."""
        if code == _INIT:
            ahead, flags = struct.unpack_from("<2I", body, 8)
            known = 7, 31, ahead, flags & _BIG, 16, 12, _MOST, 1, 256, 0, 0
            return struct.pack("<4I2H2I2HI", *known).ljust(64, b"\0")
        if code == _LOOKUP:
            found = _ENTRY.pack(2, 0, _FOREVER, _FOREVER, 0, 0) + self._attributes(2)
            return found if body.rstrip(b"\0") == b"disk" else errno.ENOENT
        if code in (_GETATTR, _SETATTR):
            return struct.pack("<Q2I", _FOREVER, 0, 0) + self._attributes(node)
        if code in (_OPEN, _OPENDIR):
            return struct.pack("<Q2I", 1, _DIRECT, 0)
        if code == _READ:
            return os.pread(self._image, *struct.unpack_from("<QI", body, 8)[::-1])
        if code == _WRITE:
            offset, size = struct.unpack_from("<QI", body, 8)
            data = body[40 : 40 + size]
            os.pwrite(self._image, data, offset)
            self._record.write(_RECORD.pack(time.monotonic(), offset, size) + data)
            return struct.pack("<2I", size, 0)
        if code == _FSYNC:
            self._record.write(_RECORD.pack(time.monotonic(), 0, 0))
            return b""
        if code == _STATFS:
            return struct.pack("<5Q10I", 1, 1, 1, 2, 1, BLOCK, 255, BLOCK, *[0] * 7)
        return b"" if code in (*_NOTHING, _DESTROY) else errno.ENOSYS

    def _attributes(self, node: int) -> bytes:
        size, mode = (0, stat.S_IFDIR | 0o700) if node == 1 else (self._size, stat.S_IFREG | 0o600)
        times = [0] * 6
        return _ATTR.pack(node, size, size // 512, *times, mode, 1, 0, 0, 0, BLOCK, 0)


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


@contextmanager
def mounted(image: Path, folder: Path, options: str) -> Iterator[Path]:
    """The ext4 in `image` at `folder`."""
    folder.mkdir(exist_ok=True)
    device = _run("losetup", "--find", "--show", image)
    try:
        _run("mount", "-o", options, device, folder)
        try:
            yield folder
        finally:
            _run("umount", folder)
    finally:
        _run("losetup", "--detach", device)


@contextmanager
def recorded(root: Path, size: int, options: str) -> Iterator[tuple[Path, Path]]:
    """A new ext4 of `size` bytes at the first path; all it ever wrote is in the second one."""
    served, image, record = root / "served", root / "image", root / "record"
    served.mkdir()
    command = [sys.executable, "-m", "tests.chaos.blocks", served, str(size), image, record]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdout.readline() == "mounted\n", "needs root and /dev/fuse"
    try:
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", served / "disk")
        with mounted(served / "disk", root / "disk", options) as folder:
            yield folder, record
    finally:
        _run("umount", served)
        server.wait(20)
        image.unlink()


def read_record(path: Path) -> list[Write]:
    """All writes and flushes in order."""
    found, data, at = list[Write](), path.read_bytes(), 0
    while at < len(data):
        when, offset, size = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        found.append(Write(when, offset, data[at : at + size]))
        at += size
    return found


if __name__ == "__main__":
    _Server(int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])).serve(Path(sys.argv[1]))
