"""How training and preparation use durable.py, and what they may find after a crash.

`explore` runs the real code under the recorder, cuts the power after every system call and reads
what is left with the real `verify`. `explore_twice` does the same to the process that follows a
kill or a power cut, including crashes during recovery.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .crash_model import Disk, Tree, lay_out, prefixes
from .recorder import Operation, Recorder

FOLDER = "runs/a/checkpoints"
KEPT = 2
Promises = frozenset[int]  # steps reported as saved
Driver = Callable[[ModuleType, Path, int, Callable[[int], None]], None]


def scratch() -> "tempfile.TemporaryDirectory[str]":
    """A folder in memory if possible: the model needs a file system, not a disk."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


def payload(step: int) -> dict[str, bytes]:
    """The files of a checkpoint; they differ between steps, and none is zero or blank."""
    return {
        "model.safetensors": f"weights of step {step}, ".encode() * 3,
        "trainer.json": f'{{"step": {step}}}'.encode(),
    }


def train(durable: ModuleType, root: Path, commits: int, ack: Callable[[int], None]) -> None:
    """Start as a trainer does, resume from the newest checkpoint, commit and prune."""
    folder = root / FOLDER
    durable.make_folder(folder)
    durable.sweep(folder)
    assert not hidden(folder), "sweep left something behind"
    valid = sorted(path for path in folder.iterdir() if not durable.verify(path))
    newest = int(valid[-1].name.removeprefix("step-")) if valid else 0
    if newest:
        ack(newest)  # the process builds on it, so it must not disappear
    for step in range(newest + 1, newest + 1 + commits):
        with durable.commit_folder(folder / f"step-{step}", {"step": step}) as writer:
            for name, data in payload(step).items():
                writer.write(name, data)
        ack(step)
        for path in sorted(folder.iterdir())[:-KEPT]:
            durable.discard(path)
    assert not hidden(folder), "left something behind"


def train_really(durable: ModuleType, root: Path, commits: int, ack: Callable[[int], None]) -> None:
    """The same with the trainer's own code to write, find and prune checkpoints."""
    from sota_transformer.training import checkpoint

    run = root / "runs" / "a"
    durable.make_folder(run)
    durable.sweep(run)
    durable.sweep(run / "checkpoints")
    newest = checkpoint.latest(run, lambda problem: None) or 0
    if newest:
        assert checkpoint.load(run, newest).trainer["updates"] == newest
        ack(newest)
    for step in range(newest + 1, newest + 1 + commits):
        checkpoint.save(run, real_state(step))
        ack(step)
        checkpoint.prune(run, KEPT)


def real_state(step: int) -> Any:
    """The smallest state that `checkpoint.save` accepts."""
    import torch

    from sota_transformer.training.checkpoint import State

    tensors = {"w": torch.arange(1, 4) + 1000.0 * step}
    return State(step=step, model=tensors, optim=tensors, trainer={"updates": step})


@cache
def real_payload(step: int) -> dict[str, bytes]:
    """The files of that state."""
    from sota_transformer.training import checkpoint

    with scratch() as name:
        folder = checkpoint.save(Path(name), real_state(step))
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden(folder: Path) -> list[str]:
    """Names of entries that readers do not see."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def configure(durable: ModuleType, root: Path, commits: int, ack: Callable[[int], None]) -> None:
    """Replace one file repeatedly."""
    durable.make_folder(root / "runs")
    durable.sweep(root / "runs")
    assert not hidden(root / "runs"), "sweep left something behind"
    path = root / "runs" / "config.json"
    newest = int(path.read_bytes().split()[1]) if path.exists() else 0
    if newest:
        ack(newest)
    for version in range(newest + 1, newest + 1 + commits):
        durable.write_file(path, b"version %d of the file" % version)
        ack(version)


class CaughtError(Exception):
    """The first wrong state, if one is enough."""


@dataclass
class Report:
    """How many crash states were checked, and what was wrong."""

    states: int = 0
    problems: dict[str, int] = field(default_factory=dict)

    def add(self, kinds: set[str]) -> None:
        """Count one state."""
        self.states += 1
        for kind in kinds:
            self.problems[kind] = self.problems.get(kind, 0) + 1


class Explorer:
    """One version of durable.py, original or mutated, and one protocol that uses it."""

    def __init__(self, durable: ModuleType, driver: Driver, impatient: bool = False) -> None:
        self.durable, self.driver, self.impatient = durable, driver, impatient
        self.payload = real_payload if driver is train_really else payload
        self.report = Report()
        self._read: dict[Tree, bool] = {}
        self._judged: set[tuple[Tree, int, int]] = set()

    def record(self, visible: Tree, commits: int) -> list[Operation]:
        """Run the protocol for real on a folder with this content."""
        with scratch() as name:
            root = Path(name).resolve() / "disk"
            lay_out(visible, root)
            recorder = Recorder(root)
            with recorder.watch():
                self.driver(self.durable, root, commits, recorder.ack)
        return recorder.log

    def explore(
        self, disk: Disk, commits: int, before: Promises = frozenset()
    ) -> Iterator[tuple[Disk, Promises]]:
        """Check each state after each operation; yield the disk and the promises so far."""
        log = self.record(disk.visible(), commits)
        for now, done in prefixes(disk, log):
            promises = before | {operation[1] for operation in done if operation[0] == "ack"}
            for tree in now.after_power_cut():
                self.judge(tree, max(promises, default=0), len(promises))
            yield now, promises

    def judge(self, tree: Tree, newest: int, promised: int) -> None:
        """Read what is left and compare it with the promises."""
        if (tree, newest, promised) in self._judged:
            return
        self._judged.add((tree, newest, promised))
        check = self._config if self.driver is configure else self._checkpoints
        kinds = check(tree, newest, promised)
        self.report.add(kinds)
        if kinds and self.impatient:
            raise CaughtError(f"state {self.report.states:,}: {', '.join(sorted(kinds))}")

    def _checkpoints(self, tree: Tree, newest: int, promised: int) -> set[str]:
        folder = _below(tree, FOLDER)
        kinds, valid = set(), []
        for name, content in folder:
            if not name.startswith("step-"):
                continue
            assert isinstance(content, tuple)
            step = int(name.removeprefix("step-"))
            if not self._verifies(content):
                kinds.add("torn at its final name")
            elif dict(content).items() >= self.payload(step).items():
                valid.append(step)
            else:
                kinds.add("wrong data accepted")
        if max(valid, default=0) < newest:
            kinds.add("acknowledged step lost")
        if len(valid) < min(KEPT, promised):
            kinds.add("fewer good checkpoints than promised")
        return kinds

    def _config(self, tree: Tree, newest: int, promised: int) -> set[str]:
        content = dict(_below(tree, "runs")).get("config.json")
        if content is None:
            return {"acknowledged file lost"} if newest else set()
        good = {b"version %d of the file" % version: version for version in range(1, 20)}
        if content not in good:
            return {"torn at its final name"}
        return {"acknowledged file lost"} if good[content] < newest else set()

    def _verifies(self, content: Tree) -> bool:
        if content not in self._read:
            with scratch() as name:
                lay_out(content, Path(name) / "step")
                self._read[content] = not self.durable.verify(Path(name) / "step")
        return self._read[content]


def _below(tree: Any, path: str) -> Tree:
    for part in path.split("/"):
        tree = dict(tree).get(part, ())
    return tree


def explore(explorer: Explorer, commits: int) -> Report:
    """Every state that a power cut can leave of a first run."""
    for _ in explorer.explore(Disk(), commits):
        pass
    return explorer.report


def explore_twice(explorer: Explorer, commits: int, stride: int = 1) -> Report:
    """The same for the run that follows it, after a kill and after a power cut at every moment.

    With a stride only every so many-th kill and cut is followed.
    """
    killed: list[tuple[Disk, Promises]] = []
    cut: dict[Tree, Promises] = {}
    for disk, promises in explorer.explore(Disk(), commits):
        killed.append((disk.copy(), promises))
        cut |= dict.fromkeys(disk.after_power_cut(), promises)  # the latest has the most promises
    seconds = killed + [(Disk(tree), promises) for tree, promises in cut.items()]
    for second, promises in seconds[::stride]:
        for _ in explorer.explore(second, 1, promises):
            pass
    return explorer.report
