"""Any order of training, saving, dying, damage and pruning, checked against a model.

The state machine works on a run folder with small checkpoints of the trainer's own. Kills are real:
a forked process dies by SIGKILL in the middle of its n-th system call that writes.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sota_transformer import durable
from sota_transformer.errors import SotaError
from sota_transformer.training import checkpoint

from .protocols import real_payload, real_state, scratch

_WRITING = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


@contextmanager
def _deadly(number: int) -> Iterator[None]:
    """SIGKILL this process just before its `number`-th call that writes."""
    left = number
    real = {name: getattr(os, name) for name in _WRITING}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)

        return call

    for name, function in real.items():
        setattr(os, name, counted(function))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def killed(work: Callable[[], None], number: int) -> bool:
    """Do `work` in a process that is killed at its `number`-th call; False if it finished."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with _deadly(number):
                work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child ended with {status}"
    return status != 0


class RunMachine(RuleBasedStateMachine):
    """`good` holds the steps that are promised and undamaged."""

    @initialize()
    def begin(self) -> None:
        """An empty run."""
        self._scratch = scratch()
        self.run = Path(self._scratch.name) / "run"
        self.run.mkdir()
        self.step = 0
        self.good: set[int] = set()

    def teardown(self) -> None:
        """Remove the run."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()

    def _save(self) -> None:
        checkpoint.save(self.run, real_state(self.step))

    def _saved(self) -> None:
        self.good.add(self.step)

    @rule(count=st.integers(1, 3))
    def train(self, count: int) -> None:
        """Train on, in memory only."""
        self.step += count

    @precondition(lambda self: self.step and self.step not in self.good)
    @rule()
    def save(self) -> None:
        """An undisturbed save."""
        self._save()
        self._saved()

    @precondition(lambda self: self.step and self.step not in self.good)
    @rule(number=st.integers(0, 36))
    def save_and_die(self, number: int) -> None:
        """A save killed somewhere or just after it, and the start that follows."""
        if not killed(self._save, number) or not durable.verify(
            checkpoint.path_of(self.run, self.step)
        ):
            self._saved()
        self.resume()

    @rule(number=st.integers(0, 20), keep=st.integers(1, 4))
    def prune_and_die(self, number: int, keep: int) -> None:
        """Prune old checkpoints, perhaps killing the process."""
        kept = sorted(self.good)[-max(2, keep) :]
        died = killed(lambda: checkpoint.prune(self.run, keep), number)
        durable.sweep(self.run / "checkpoints")
        left = set(checkpoint.steps(self.run))
        assert left >= set(kept), f"expected {kept}, found {left}"
        if not died and len(kept) == max(2, keep):
            assert not [step for step in left if step < kept[0]]
        self.good &= left

    @precondition(lambda self: self.good)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """Flip, cut or delete a file of the newest good checkpoint, if another good one is left."""
        if len(self.good) < 2:
            return
        step = max(self.good)
        folder = checkpoint.path_of(self.run, step)
        path = folder / data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
        content = bytearray(path.read_bytes())
        how = data.draw(st.sampled_from(["flip", "cut", "delete", "folder"]))
        if how == "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
            path.write_bytes(content)
        elif how == "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        elif how == "delete":
            path.unlink()
        else:
            shutil.rmtree(folder)
            folder.mkdir()
        self.good.remove(step)

    @rule()
    def resume(self) -> None:
        """Start as `sota train` does: sweep, find the newest good checkpoint, load it."""
        durable.sweep(self.run)
        durable.sweep(self.run / "checkpoints")
        warnings: list[str] = []
        try:
            found = checkpoint.latest(self.run, warnings.append)
        except SotaError:
            assert not self.good
            return
        assert found == max(self.good, default=None)
        newer = [step for step in checkpoint.steps(self.run) if step > (found or 0)]
        assert len(newer) == len(warnings)
        for step, line in zip(newer[::-1], warnings, strict=True):
            assert f"step {step} rejected" in line
        if found is not None:
            state = checkpoint.load(self.run, found)
            assert state.trainer["updates"] == found
            assert state.model["w"].tolist() == real_state(found).model["w"].tolist()
        self.step = found or 0

    @invariant()
    def nothing_promised_is_lost(self) -> None:
        """Every good step is there as written, and nothing else passes as good."""
        if not hasattr(self, "run"):
            return
        for step in checkpoint.steps(self.run):
            folder = checkpoint.path_of(self.run, step)
            whole = not durable.verify(folder)
            assert whole == (step in self.good), f"step {step}: {whole=}"
            if whole:
                content = {path.name: path.read_bytes() for path in folder.iterdir()}
                assert content == real_payload(step)
        assert self.good <= set(checkpoint.steps(self.run))
