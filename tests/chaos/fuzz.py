"""Is all damage detected? The oracle is `durable.verify`, or any reader that calls it."""

import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sota_transformer import durable

from .damage import Case, cases

HANG_SECONDS = 10


@dataclass
class Result:
    """Results by outcome; everything but `cases` should stay empty."""

    cases: int = 0
    silent: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[str]:
        """Every case that went wrong."""
        return self.silent + self.tracebacks + self.hangs


def checkpoint_like(folder: Path, step: int, size: int) -> None:
    """Commit a folder with a checkpoint's files, without torch."""
    source = random.Random(step)
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    with durable.commit_folder(folder, {"format": 1, "step": step}) as writer:
        for name in ("model", "optim"):
            with writer.create(f"{name}.safetensors") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                file.write(source.randbytes(size))
        writer.write("trainer.json", durable.canonical_json({"step": step, "updates": step}))


def fuzz(
    folder: Path,
    other: Path,
    notices: Callable[[Path, str], bool],
    share: float = 1.0,
    count: int = 0,
    seed: int = 0,
) -> Result:
    """Damage `folder` in every way; `notices(folder, case)` tells whether a reader objected.

    `share` selects a random part of the cases; `count` repeats them with other positions until that
    many were tried.
    """
    source, result = random.Random(seed), Result()
    while True:
        for name, damage in _picked(cases(folder, other, source), source, share):
            with damage(), _alarm():
                result.cases += 1
                try:
                    if not notices(folder, name):
                        result.silent.append(name)
                except TimeoutError:
                    result.hangs.append(name)
                except Exception as error:
                    result.tracebacks.append(f"{name}: {error!r}")
            if count and result.cases >= count:
                break
        if result.cases >= count:
            assert not durable.verify(folder), "the damages were not undone"
            return result


def _picked(all_cases: Iterator[Case], source: random.Random, share: float) -> Iterator[Case]:
    return (case for case in all_cases if share >= 1 or source.random() < share)


def verify_notices(folder: Path, case: str) -> bool:
    """The plain oracle. A problem has to name the damaged file.

    Another step's manifest is intact in itself; in that case the files do not match it.
    """
    problems = durable.verify(folder)
    damaged = case.split("[")[0].split(" ")[0]
    foreign = damaged == durable.MANIFEST and "replaced" in case
    return any(damaged in problem or foreign for problem in problems)


@contextmanager
def _alarm() -> Iterator[None]:
    """TimeoutError after ten seconds, even inside a system call."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def run(root: Path, count: int, seed: int = 0) -> tuple[Result, float]:
    """The whole test, with counts and seconds; `root` is on the disk under test."""
    started = time.monotonic()
    for step in (1, 2):
        checkpoint_like(root / f"step-{step}", step, 20_000)
    result = fuzz(root / "step-2", root / "step-1", verify_notices, count=count, seed=seed)
    return result, time.monotonic() - started
