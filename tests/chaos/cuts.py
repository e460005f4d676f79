"""Power cuts on a real ext4 while the real commands prepare and train; needs root.

`model` tries all states that POSIX allows; this tries those that a Linux file system makes.
"""

import os
import random
import re
import shutil
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

from sota_transformer.training.runlog import read_metrics

from .blocks import BLOCK, Write, mounted, read_record, recorded
from .commands import (
    STEPS,
    Bench,
    Finished,
    Zygote,
    contents,
    fresh,
    model_of,
    prepare_arguments,
    train_arguments,
)

SIZE = 256 << 20
OPTIONS = "commit=1", "commit=1,data=writeback"
PARTS = 0.0, 0.1, 0.5, 0.9, 1.0  # of the blocks written since the last flush that reach the disk


@dataclass
class Cuts:
    """Counts, and a description of everything that went wrong."""

    cuts: int = 0
    blocks: int = 0  # that were lost
    wrong: list[str] = field(default_factory=list)


def power_cuts(bench: Bench, zygote: Zygote, count: int, seed: int) -> Cuts:
    """Half of the cuts with each of `OPTIONS`."""
    source, result = random.Random(seed), Cuts()
    for options, share in zip(OPTIONS, (count - count // 2, count // 2), strict=True):
        root = bench.root / options
        root.mkdir()
        with recorded(root, SIZE, options) as (disk, record):
            begun = time.monotonic()
            fresh(bench, disk / "run")
            prepared, _ = _watched(zygote, prepare_arguments(bench.corpus, disk / "data"))
            ready = time.monotonic()
            trained, saved = _watched(zygote, train_arguments(bench.data, disk / "run"))
            assert prepared.code == trained.code == 0, prepared.output + trained.output
        cuts = _Cutter(root / "cut", read_record(record), begun, source)
        record.unlink()
        for _ in range(share):
            when, lost = cuts.cut()
            promised = max((step for at, step in saved if at < when), default=0)
            with mounted(cuts.image, root / "disk", options) as disk:
                lacking = when > ready and contents(disk / "data") != contents(bench.data)
                problems = ["a finished preparation was lost"] * lacking
                problems += _problems(bench, zygote, disk, promised)
            result.cuts, result.blocks = result.cuts + 1, result.blocks + lost
            for problem in problems:
                result.wrong.append(f"{options}, cut {result.cuts}, {lost} blocks: {problem}")
                print(f"WRONG: {result.wrong[-1]}", flush=True)
        shutil.rmtree(root)
    return result


def _watched(zygote: Zygote, arguments: list[str]) -> tuple[Finished, list[tuple[float, int]]]:
    """How the command ended, and when it announced which step to be saved."""
    pid, saved = zygote.start(arguments), list[tuple[float, int]]()
    while (done := zygote.wait(pid, 0.01)) is None:
        now, shown = time.monotonic(), zygote.output
        text = shown.read_text(errors="replace") if shown.exists() else ""
        steps = re.findall(r"^saved step (\d+)", text, re.M)
        saved += [(now, int(step)) for step in steps[len(saved) :]]
    return done, saved


class _Cutter:
    """Builds the disk as a power cut at a random moment after `begun` may leave it."""

    def __init__(
        self, image: Path, record: list[Write], begun: float, source: random.Random
    ) -> None:
        self.image = image
        self._record, self._source = record, source
        self._first = bisect_left(record, begun, key=lambda write: write.time)

    def cut(self) -> tuple[float, int]:
        """Write the image; when the power went, and how many blocks were lost."""
        end = self._source.randrange(self._first, len(self._record))
        flush = next(at for at in range(end, -1, -1) if not self._record[at].data)
        part, lost = self._source.choice(PARTS), 0
        self.image.unlink(missing_ok=True)
        image = os.open(self.image, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(image, SIZE)
        for at, write in enumerate(self._record[: end + 1]):
            for start in range(0, len(write.data), BLOCK):
                if at <= flush or self._source.random() < part:
                    os.pwrite(image, write.data[start : start + BLOCK], write.offset + start)
                else:
                    lost += 1
        os.close(image)
        return self._record[end].time, lost


def _problems(bench: Bench, zygote: Zygote, disk: Path, promised: int) -> list[str]:
    """What is wrong after the same commands have run again on the disk."""
    wrong = list[str]()
    if not (disk / "run").exists():
        fresh(bench, disk / "run")
    done = zygote.run(prepare_arguments(bench.corpus, disk / "data"))
    if done.code != 0 or done.crashed:
        wrong.append(f"prepare {done.code}: {done.output[-500:]}")
    elif contents(disk / "data") != contents(bench.data):
        wrong.append("the prepared data differ")
    done = zygote.run(train_arguments(bench.data, disk / "run"))
    if done.code != 0 or done.crashed:
        return [*wrong, f"train {done.code}: {done.output[-500:]}"]
    resumed = re.search(r"resuming from step (\d+)", done.output)
    reached = STEPS if "nothing to do" in done.output else int(resumed[1]) if resumed else 0
    if reached < promised:
        wrong.append(f"step {promised} was saved, but the run resumed at {reached}")
    if model_of(disk / "run") != bench.model:
        wrong.append("the model differs")
    logged = [line["step"] for line in read_metrics(disk / "run") if "loss" in line]
    if logged != [*range(1, STEPS + 1)]:
        wrong.append(f"the log has steps {logged}")
    return wrong
