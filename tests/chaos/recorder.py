"""Records what durable.py really does to a folder: each system call, in order, as a list.

The functions of `os` are wrapped to log their effects; nothing is simulated, so the log always
reflects the code as shipped.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Operation = tuple[Any, ...]
_REPLACED = ("open", "close", "fdopen", "write", "fsync", "mkdir", "rename", "replace", "unlink")
_REPLACED += ("rmdir",)


class Recorder:
    """The log of one folder; `ack` inserts the caller's own promises at their place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Operation] = []
        self._paths: dict[int, str] = {}  # by open descriptor, below the root
        self._files: dict[int, str] = {}  # identity of each file being written
        self._real = {name: getattr(os, name) for name in _REPLACED}

    def ack(self, promise: Any) -> None:
        """The caller was told that `promise` is safe."""
        self.log.append(("ack", promise))

    def _name(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the root, or None if it is elsewhere."""
        if isinstance(path, int):
            return self._paths.get(path)
        base = Path(self._paths.get(dir_fd, "/outside")) if dir_fd is not None else None
        full = Path(os.fspath(path)) if base is None else base / os.fspath(path)
        if base is not None:
            return None if str(full).startswith("/outside") else str(full)
        try:
            return str(full.absolute().relative_to(self.root))
        except ValueError:
            return None

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        name = self._name(path, dir_fd)
        if name is not None:
            self._paths[descriptor] = name
            if flags & os.O_CREAT:
                assert flags & os.O_EXCL, f"{name} is opened for writing in place"
                self._files[descriptor] = f"{name}#{len(self.log)}"
                self.log.append(("create", name, self._files[descriptor]))
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        self._files.pop(descriptor, None)
        self._real["close"](descriptor)

    def _fdopen(self, descriptor: int, *args: Any, **more: Any) -> Any:
        assert descriptor not in self._files, "writes that bypass os.write"
        self._paths.pop(descriptor, None)  # a reader, whose close is not seen here
        return self._real["fdopen"](descriptor, *args, **more)

    def _write(self, descriptor: int, data: Any) -> int:
        count = self._real["write"](descriptor, data)
        if descriptor in self._files:
            self.log.append(("write", self._files[descriptor], bytes(data[:count])))
        return count

    def _fsync(self, descriptor: int) -> None:
        self._real["fsync"](descriptor)
        if descriptor in self._files:
            self.log.append(("fsync", self._files[descriptor]))
        elif descriptor in self._paths:
            self.log.append(("fsync_folder", self._paths[descriptor]))

    def _recorded(self, kind: str) -> Callable[..., None]:
        def call(path: Any, *args: Any, dir_fd: int | None = None, **more: Any) -> None:
            name = self._name(path, dir_fd)
            if dir_fd is not None:
                more["dir_fd"] = dir_fd
            self._real[kind](path, *args, **more)
            if name is not None:
                self.log.append((kind, name))

        return call

    def _rename(self, source: Any, target: Any) -> None:
        self._real["replace"](source, target)
        names = self._name(source), self._name(target)
        assert None not in names, f"{source} -> {target} crosses the root"
        self.log.append(("rename", *names))

    @contextmanager
    def watch(self) -> Iterator["Recorder"]:
        """Record until the block ends, also by an exception."""
        mine = {"open": self._open, "close": self._close, "fdopen": self._fdopen}
        mine |= {
            "write": self._write,
            "fsync": self._fsync,
            "rename": self._rename,
            "replace": self._rename,
        }
        mine |= {kind: self._recorded(kind) for kind in ("mkdir", "unlink", "rmdir")}
        for name, function in mine.items():
            setattr(os, name, function)
        try:
            yield self
        finally:
            for name, function in self._real.items():
                setattr(os, name, function)
