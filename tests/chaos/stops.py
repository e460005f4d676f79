"""SIGTERM at random moments, two runs in one folder, and disks that are really full."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sota_transformer import durable
from sota_transformer.errors import IO_FAILED, LOCKED, TERMINATED

from .commands import (
    Bench,
    Finished,
    Zygote,
    contents,
    fresh,
    leftovers,
    model_of,
    prepare_arguments,
    sota,
    train_arguments,
)
from .soak import Soak

LEAVE_SECONDS, SECOND_SECONDS, LOSE_SECONDS = 10.0, 1.0, 2.0


class Stops(Soak):
    """A soak with SIGTERM instead of kills; `slowest` is the longest time one took to exit."""

    slowest = 0.0


def stop_train(bench: Bench, zygote: Zygote, count: int, seed: int = 0) -> Stops:
    """Send SIGTERM `count` times, every fourth twice; all chains end in the reference's bytes."""
    source, result, seconds = random.Random(seed), Stops(), 3.0
    while result.kills < count:
        out = fresh(bench, bench.root / f"stopped-{result.finished}")
        saved = 0
        while True:
            pid = zygote.start(train_arguments(bench.data, out))
            done = zygote.wait(pid, source.uniform(0.0, seconds))
            asked = done is None
            if done is None:
                done, took = _stop(zygote, pid, source.random() < 0.25, result)
                result.slowest = max(result.slowest, took)
                result.kills += 1
            found = re.findall(r"resuming from step (\d+)", done.output)
            resumed = int(found[0]) if found else 0
            if found or "starting from scratch" in done.output:
                result.check(resumed >= saved, f"saved step {saved}, resumed from {resumed}")
            said = [int(n) for n in re.findall(r"saved step (\d+)", done.output)]
            saved = max([saved, *said])
            result.check(not done.crashed, done.output[-2000:])
            if done.code == 0:
                break
            if done.code != TERMINATED or not asked:
                result.check(False, f"exit {done.code}: {done.output[-1000:]}")
                break
        result.end(bench, out)
    return result


def _stop(zygote: Zygote, pid: int, twice: bool, result: Soak) -> tuple[Finished, float]:
    """Send one or two signals and time how long the command takes to exit."""
    began, limit = time.monotonic(), LEAVE_SECONDS
    os.kill(pid, signal.SIGTERM)
    if twice:
        time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        began, limit = time.monotonic(), SECOND_SECONDS
    done = zygote.wait(pid, LEAVE_SECONDS)
    took = time.monotonic() - began
    result.check(done is not None and took <= limit, f"{took:.1f} s after SIGTERM ({twice=})")
    if done is None:
        os.killpg(pid, signal.SIGKILL)
        done = zygote.end(pid)
    began_training = "starting from scratch" in done.output or "resuming" in done.output
    if began_training and done.code == TERMINATED and not twice:
        last = done.output.strip().splitlines()[-1]
        result.check("stopped by SIGTERM" in last or "saved step" in last, f"last words: {last}")
    return done, 0.0 if twice else took


def two_at_once(bench: Bench, zygote: Zygote, count: int) -> Soak:
    """Race for one folder: one trains, the other names it and exits; a kill releases the lock."""
    result = Soak()
    for number in range(count):
        out = fresh(bench, bench.root / f"raced-{number}")
        first = zygote.start(train_arguments(bench.data, out))
        while not (out / ".lock").exists() or not (out / ".lock").read_text():
            time.sleep(0.01)
        began = time.monotonic()
        second = zygote.run(train_arguments(bench.data, out))
        took = time.monotonic() - began
        result.check(second.code == LOCKED, f"loser: exit {second.code}: {second.output[-500:]}")
        result.check(f'"pid": {first}' in second.output, f"winner not named: {second.output}")
        result.check(took <= LOSE_SECONDS, f"loser took {took:.1f} s")
        os.killpg(first, signal.SIGKILL)
        result.kills += 1
        zygote.end(first)
        third = zygote.run(train_arguments(bench.data, out))
        result.check(third.code == 0, f"after the kill: {third.code}: {third.output[-500:]}")
        result.check(model_of(out) == bench.model, f"{out}: model differs")
        result.finished += 1
        shutil.rmtree(out)
    return result


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """An in-memory file system of that size; needs root, otherwise PermissionError."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "small", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        folder.rmdir()
        raise PermissionError("cannot mount a tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def full_disks(bench: Bench, zygote: Zygote, sizes: list[int]) -> Soak:
    """Train on disks that are too small, enlarge them, and resume."""
    result = Soak()
    for size in sizes:
        with small_disk(bench.root / "small", size) as disk:
            run = fresh(bench, disk / "run")
            done = zygote.run(train_arguments(bench.data, run))
            result.check(done.code in (0, IO_FAILED), f"{size}M: {done.code} {done.output[-800:]}")
            result.check(not done.crashed, f"{size}M: {done.output[-2000:]}")
            result.kills += done.code == IO_FAILED
            for path in (run / "checkpoints").glob("step-*"):
                result.check(not durable.verify(path), f"{size}M: torn {path.name}")
            _enlarge(disk)
            again = zygote.run(train_arguments(bench.data, run))
            result.check(again.code == 0, f"{size}M, then: {again.code} {again.output[-800:]}")
            if again.code == 0:
                result.check(model_of(run) == bench.model, f"{size}M, then: model differs")
            result.check(not leftovers(run), f"{size}M: left over {leftovers(run)}")
            result.finished += 1
    return result


def full_disks_prepare(bench: Bench, kibibytes: list[int]) -> Soak:
    """The same for `sota prepare`."""
    result, expected = Soak(), contents(bench.data)
    for size in kibibytes:
        with small_disk(bench.root / "small", 1) as disk:
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            done = sota(prepare_arguments(bench.corpus, disk / "data"), bench.root)
            result.check(done.code in (0, IO_FAILED), f"{size}K: {done.code} {done.output[-800:]}")
            result.check(not done.crashed, f"{size}K: {done.output[-2000:]}")
            result.check(
                done.code == 0 or not (disk / "data").exists(), f"{size}K: torn at its final name"
            )
            result.kills += done.code == IO_FAILED
            _enlarge(disk)
            again = sota(prepare_arguments(bench.corpus, disk / "data"), bench.root)
            result.check(again.code == 0, f"{size}K, then: {again.code} {again.output[-800:]}")
            result.check(contents(disk / "data") == expected, f"{size}K, then: bytes differ")
            result.check([p.name for p in disk.iterdir()] == ["data"], f"{size}K: left over")
            result.finished += 1
    return result


def _enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
