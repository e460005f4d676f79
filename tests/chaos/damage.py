"""Every kind of damage to the files of a committed folder, one at a time, each undone again.

A case is a name and a context manager: the folder is damaged inside it and restored after it.
Exhaustive where possible: each byte of a JSON file with several values, each length of it, each
byte of a tensor file's header; random positions and lengths in the data.
"""

import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

Case = tuple[str, Callable[[], AbstractContextManager[None]]]
_TAIL = 4096


def cases(folder: Path, other: Path, source: random.Random, positions: int = 64) -> Iterator[Case]:
    """All kinds of damage to `folder`; `other` is a good folder of the same kind to swap with."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        path = folder / name
        data = path.read_bytes()
        yield from _flips(path, data, source, positions)
        yield from _lengths(path, data, source, positions)
        yield from _kinds(path)
        for donor in [other / name, *(folder / second for second in names if second != name)]:
            if donor.is_file() and donor.read_bytes() != data:
                yield f"{name} replaced by {donor}", lambda p=path, d=donor: _replaced(p, d)


def _flips(path: Path, data: bytes, source: random.Random, positions: int) -> Iterator[Case]:
    if path.suffix == ".json":
        chosen = range(len(data))
    else:
        header = 8 + struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
        chosen = sorted(
            {*range(min(header, len(data), 4096))}
            | {source.randrange(len(data)) for _ in range(positions if data else 0)}
        )
    for offset in chosen:
        old = data[offset]
        for new in {old ^ 1 << source.randrange(8), 0, 0xFF, 0x20, (old + 1) % 256} - {old}:
            yield f"{path.name}[{offset}] {old} -> {new}", lambda o=offset, n=new: _byte(path, o, n)


def _lengths(path: Path, data: bytes, source: random.Random, positions: int) -> Iterator[Case]:
    size = len(data)
    lengths = {0, 1, size // 2, size - 1, size + 1, size + _TAIL}
    lengths |= set(range(size)) if path.suffix == ".json" else set()
    lengths |= {source.randrange(size) for _ in range(positions if size else 0)}
    for length in sorted(lengths - {size}):
        if length >= 0:
            yield f"{path.name} cut to {length}", lambda n=length: _content(path, _resized(data, n))
    tail = min(_TAIL, size)
    if data[size - tail :].strip(b"\0"):
        zeroed = data[: size - tail] + bytes(tail)
        yield f"{path.name} ends in zeros", lambda: _content(path, zeroed)


def _resized(data: bytes, size: int) -> bytes:
    return data[:size] + bytes(max(0, size - len(data)))


def _kinds(path: Path) -> Iterator[Case]:
    """Other kinds of entries in the file's place."""
    yield f"{path.name} deleted", lambda: _instead(path, lambda: None)
    yield f"{path.name} a folder", lambda: _instead(path, path.mkdir)
    yield f"{path.name} a pipe", lambda: _instead(path, lambda: os.mkfifo(path))
    aside = path.with_name(f"aside-{path.name}")
    for target in (aside, Path("/dev/zero"), Path("/nowhere"), path):
        yield (
            f"{path.name} a link to {target}",
            lambda t=target: _instead(path, lambda: path.symlink_to(t)),
        )


@contextmanager
def _byte(path: Path, offset: int, value: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        old = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([value]), offset)
        yield
        os.pwrite(descriptor, old, offset)
    finally:
        os.close(descriptor)


@contextmanager
def _content(path: Path, data: bytes) -> Iterator[None]:
    old = path.read_bytes()
    path.write_bytes(data)
    yield
    path.write_bytes(old)


@contextmanager
def _replaced(path: Path, donor: Path) -> Iterator[None]:
    with _content(path, donor.read_bytes()):
        yield


@contextmanager
def _instead(path: Path, make: Callable[[], None]) -> Iterator[None]:
    aside = path.with_name(f"aside-{path.name}")
    path.rename(aside)
    make()
    yield
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
    aside.rename(path)
