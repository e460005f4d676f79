"""kill -9 at random moments, repeated until the command finishes by itself.

The result then has to equal that of an undisturbed run, byte for byte. Nothing may be left over,
no step reported as saved may be lost, and no manual cleanup may be needed.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .commands import (
    ENVIRONMENT,
    SAVE_EVERY,
    Bench,
    Zygote,
    contents,
    fresh,
    leftovers,
    model_of,
    prepare_arguments,
    train_arguments,
)

HANG_SECONDS = 120.0


@dataclass
class Soak:
    """Counts, and a description of everything that went wrong."""

    kills: int = 0
    finished: int = 0
    redone: int = 0  # most steps lost to one kill
    wrong: list[str] = field(default_factory=list)

    def check(self, good: bool, what: str) -> None:
        """Record and print a broken promise."""
        if not good:
            self.wrong.append(f"after {self.kills} kills: {what}")
            print(f"WRONG: {self.wrong[-1]}", flush=True)

    def end(self, bench: Bench, out: Path) -> None:
        """After a chain of attempts in `out`: the reference's bytes, and nothing else."""
        self.finished += 1
        self.check(model_of(out) == bench.model, f"{out}: model differs")
        self.check(not leftovers(out), f"{out}: left over {leftovers(out)}")
        if not self.wrong:
            shutil.rmtree(out)


def numbers(pattern: str, text: str) -> list[int]:
    """All numbers matched by `pattern`."""
    return [int(number) for number in re.findall(pattern, text)]


def soak_train(bench: Bench, zygote: Zygote, kills: int, seed: int = 0) -> Soak:
    """Kill `sota train` `kills` times; each chain of attempts ends in the reference's bytes."""
    source, result, seconds = random.Random(seed), Soak(), 3.0
    while result.kills < kills:
        out = fresh(bench, bench.root / f"killed-{result.finished}")
        saved = reached = 0
        while True:
            pid = zygote.start(train_arguments(bench.data, out))
            done = zygote.wait(pid, source.uniform(0.0, seconds))
            if done is None:
                os.killpg(pid, signal.SIGKILL)
                result.kills += 1
                done = zygote.end(pid)
            resumed = numbers(r"resuming from step (\d+)", done.output)
            begun = "resuming" in done.output or "starting from scratch" in done.output
            if begun:  # a kill before that has printed nothing
                first = resumed[0] if resumed else 0
                result.check(first >= saved, f"saved step {saved}, resumed from {first}")
                result.redone = max(result.redone, reached - first)
                reached = max([first, *numbers(r"step +(\d+)/", done.output)])
            before, saved = saved, max([saved, *numbers(r"saved step (\d+)", done.output)])
            if saved == before:  # the machine is too busy to save in time
                seconds *= 1.1
            result.check(not done.crashed, done.output[-2000:])
            if done.code == 0:
                seconds = max(0.5, 0.8 * seconds)
                break
            if done.code != 137:
                result.check(False, f"exit {done.code}: {done.output[-1000:]}")
                break
        result.check(result.redone <= SAVE_EVERY, f"{result.redone} steps redone")
        result.end(bench, out)
    return result


def soak_prepare(corpus: Path, reference: Path, root: Path, kills: int, seed: int = 0) -> Soak:
    """The same for `sota prepare`: kill all of it, only the parent, or only one worker."""
    source, result, expected, seconds = random.Random(seed), Soak(), contents(reference), 4.0
    while result.kills < kills:
        out = root / f"prepared-{result.finished}"
        done = None
        while done != 0:
            began = time.monotonic()
            process = _start(prepare_arguments(corpus, out), root)
            with suppress(subprocess.TimeoutExpired):
                process.wait(source.uniform(0.1, seconds))
            if process.poll() is None:
                _kill(process, source.choice(["all", "parent", "worker"]), source)
                result.kills += 1
            try:
                done = process.wait(HANG_SECONDS)
            except subprocess.TimeoutExpired:
                result.check(False, "hangs after a kill")
                _kill(process, "all", source)
            finally:
                _reap(process)
            text = (root / "prepare-output").read_text(errors="replace")
            result.check("Traceback" not in text, text[-2000:])
            if done not in (0, -signal.SIGKILL):
                result.check(False, f"exit {done}: {text[-1000:]}")
            elif done == 0:
                seconds = max(1.0, 0.7 * seconds + 0.3 * 1.1 * (time.monotonic() - began))
        result.finished += 1
        result.check(contents(out) == expected, f"{out}: bytes differ")
        beside = [path.name for path in root.iterdir() if path.name.startswith(f".{out.name}")]
        result.check(not leftovers(out) and not beside, f"left over: {beside}")
        if not result.wrong:
            shutil.rmtree(out)
    return result


def _start(arguments: list[str], root: Path) -> "subprocess.Popen[bytes]":
    with open(root / "prepare-output", "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "sota_transformer", *arguments],
            cwd=root, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def _kill(process: "subprocess.Popen[bytes]", which: str, source: random.Random) -> None:
    """Kill the whole group, only the parent, or only one of its descendants."""
    with suppress(ProcessLookupError):
        if which == "all":
            os.killpg(process.pid, signal.SIGKILL)
        elif which == "parent":
            process.kill()
        elif others := [pid for pid in _alive(process.pid) if pid != process.pid]:
            os.kill(source.choice(others), signal.SIGKILL)


def _reap(process: "subprocess.Popen[bytes]") -> None:
    """Workers have to exit by themselves within ten seconds of their parent's death."""
    for _ in range(100):
        if not _alive(process.pid):
            return
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("workers outlived their parent by ten seconds")


def _alive(group: int) -> list[int]:
    """Running processes of a group, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            helper = b"resource_tracker" in (path.parent / "cmdline").read_bytes()  # Python's own
            if int(its_group) == group and state not in "ZX" and not helper:
                found.append(int(path.parent.name))
    return found
