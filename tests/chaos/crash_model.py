"""A weak POSIX disk: what a folder may contain when the power fails after any system call.

Until its fsync a file may be unchanged, empty, half written, full of zeros, or complete; until its
folder's fsync any subset of the new, changed and removed names may have reached the disk. A killed
process loses nothing, but what it had not synced stays at risk under its successor.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from .recorder import Operation

Tree = tuple[tuple[str, "bytes | Tree"], ...]  # sorted (name, content or subtree)


class File:
    """Content, and which of it is certain to be on the disk."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content
        self.synced = content

    def states(self) -> list[bytes]:
        """Each content that a power cut may leave."""
        new, half = self.content, len(self.content) // 2
        if new == self.synced:
            return [new]
        torn = [self.synced, b"", new[:half], new[:half] + bytes(len(new) - half), bytes(len(new))]
        return sorted({*torn, new})


class Folder:
    """Names, and the changes to them that are not yet certain to be on the disk."""

    def __init__(self) -> None:
        self.names: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}
        self.pending: list[dict[str, File | Folder | None]] = []  # each is atomic; None: removed

    def change(self, names: "dict[str, File | Folder | None]") -> None:
        """One atomic change of names: visible at once, durable later."""
        self.pending.append(names)
        self.names = _changed(self.names, names)

    def sync(self) -> None:
        """fsync of the folder: its names, not the contents they refer to."""
        self.synced, self.pending = self.names, []

    def states(self) -> Iterator[Tree]:
        """Each tree that a power cut may leave, some more than once."""
        seen = set()
        for kept in itertools.product((True, False), repeat=len(self.pending)):
            names = self.synced
            for change in itertools.compress(self.pending, kept):
                names = _changed(names, change)
            identity = frozenset((name, id(node)) for name, node in names.items())
            if identity not in seen:
                seen.add(identity)
                order = sorted(names)
                for children in itertools.product(*(names[name].states() for name in order)):
                    yield tuple(zip(order, children, strict=True))


def _changed(
    names: "dict[str, File | Folder]", change: "dict[str, File | Folder | None]"
) -> "dict[str, File | Folder]":
    both = names | change
    return {name: node for name, node in both.items() if node is not None}


class Disk:
    """The folder that results from a log of operations."""

    def __init__(self, tree: Tree = ()) -> None:
        self.root = _folder(tree)
        self._files: dict[str, File] = {}

    def copy(self) -> "Disk":
        """An independent disk in the same state."""
        return copy.deepcopy(self)

    def _find(self, path: str) -> tuple[Folder, str]:
        """The parent folder of `path`, and its last name."""
        folder, parts = self.root, Path(path).parts
        for part in parts[:-1]:
            below = folder.names[part]
            assert isinstance(below, Folder)
            folder = below
        return folder, parts[-1] if parts else ""

    def apply(self, operation: Operation) -> None:
        """Apply one operation of the log."""
        match operation:
            case ("create", path, key):
                self._files[key] = File()
                folder, name = self._find(path)
                folder.change({name: self._files[key]})
            case ("write", key, data):
                self._files[key].content += data
            case ("fsync", key):
                self._files[key].synced = self._files[key].content
            case ("fsync_folder", path):
                folder, name = self._find(path)
                target = folder.names[name] if name else folder
                assert isinstance(target, Folder)
                target.sync()
            case ("mkdir", path):
                folder, name = self._find(path)
                folder.change({name: Folder()})
            case ("rename", source, target):
                (old, old_name), (new, new_name) = self._find(source), self._find(target)
                node = old.names[old_name]
                if old is new:
                    old.change({old_name: None, new_name: node})
                else:  # two folders: the two changes are independent
                    old.change({old_name: None})
                    new.change({new_name: node})
            case ("unlink" | "rmdir", path):
                folder, name = self._find(path)
                folder.change({name: None})
            case ("ack", _):
                pass
            case _:
                raise AssertionError(operation)

    def visible(self) -> Tree:
        """What every process sees while the power stays on."""
        return _tree(self.root)

    def after_power_cut(self) -> Iterator[Tree]:
        """Each distinct tree that a power cut may leave now."""
        seen: set[Tree] = set()
        for tree in self.root.states():
            if tree not in seen:
                seen.add(tree)
                yield tree


def _tree(folder: Folder) -> Tree:
    return tuple(
        (name, node.content if isinstance(node, File) else _tree(node))
        for name, node in sorted(folder.names.items())
    )


def _folder(tree: Tree) -> Folder:
    folder = Folder()
    for name, node in tree:
        folder.names[name] = File(node) if isinstance(node, bytes) else _folder(node)
    folder.sync()
    return folder


def lay_out(tree: Tree, root: Path) -> None:
    """Write a tree to a real folder, for the real readers."""
    root.mkdir()
    for name, node in tree:
        if isinstance(node, bytes):
            (root / name).write_bytes(node)
        else:
            lay_out(node, root / name)


def prefixes(disk: Disk, log: Iterable[Operation]) -> Iterator[tuple[Disk, list[Operation]]]:
    """The disk after each operation (always the same object) and the log up to there."""
    done: list[Operation] = []
    yield disk, done
    for operation in log:
        disk.apply(operation)
        done.append(operation)
        yield disk, done
