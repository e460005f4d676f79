"""Kills and errors at every system call that writes, through strace, in the real commands.

First one run is watched and its calls are counted; then the k-th call of each kind is made to
fail, or to kill, for every k. After each fault the plain command has to finish with the bytes of
an undisturbed run, and a command that failed has to have said so with exit code 74.
"""

import math
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sota_transformer.errors import BAD_DATA, IO_FAILED, LOCKED

from .commands import (
    SAVE_EVERY,
    STEPS,
    Bench,
    Finished,
    Zygote,
    contents,
    leftovers,
    model_of,
    prepare_arguments,
    run_at,
    sota,
    train_arguments,
)

CALLS = ("write", "pwrite64", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")
CALLS += ("ftruncate", "openat")
FAULTS = ("signal=KILL", "error=ENOSPC", "error=EIO")
START = STEPS - 2  # two steps and two saves before the end


@dataclass
class Sweep:
    """Counts by call and fault, and in words whatever was wrong."""

    calls: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, good: bool, what: str) -> None:
        """Remember and say what is not as promised."""
        if not good:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)


@contextmanager
def traced(pid: int, options: list[str], log: Path) -> Iterator[None]:
    """strace attached to a command that waits for it."""
    command = ["strace", "-f", "-qq", "-y", "-o", str(log), *options, "-p", str(pid)]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        tracer.wait(20)


def faulted(
    zygote: Zygote, arguments: list[str], call: str, fault: str, number: int, where: list[str]
) -> Finished:
    """One command whose `number`-th such call under the paths `where` meets the fault."""
    log = zygote.folder / "strace"
    options = ["-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}"]
    options += [option for path in where for option in ("-P", path)]
    pid = zygote.start(arguments, traced=True)
    with traced(pid, options, log):
        return zygote.end(pid)


def count_calls(zygote: Zygote, arguments: list[str], where: list[str]) -> Counter[str]:
    """How often an undisturbed command makes each call under the paths `where`."""
    log = zygote.folder / "strace"
    options = ["-e", f"trace={','.join(CALLS)}"]
    options += [option for path in where for option in ("-P", path)]
    pid = zygote.start(arguments, traced=True)
    with traced(pid, options, log):
        done = zygote.end(pid)
    assert done.code == 0, done.output
    return Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE))


def sweep_train(
    bench: Bench,
    zygote: Zygote,
    stride: int = 1,
    offset: int = 0,
    calls: tuple[str, ...] = CALLS,
    seconds: float = math.inf,
) -> Sweep:
    """Resume, save twice, prune, judge: a fault at each (or each `stride`-th) call of it.

    No new point is begun after so many `seconds`.
    """
    deadline = time.monotonic() + seconds
    result = Sweep()
    out = bench.root / "faulted"
    arguments = train_arguments(bench.data, out, save_every=1)
    run_at(bench, out, START - START % SAVE_EVERY)
    first = zygote.run([*arguments, "--train.keep-checkpoints", "9"])  # up to every step
    assert first.code == 0, first.output
    base = bench.root / "base"
    out.rename(base)
    for path in (base / "checkpoints").iterdir():
        if path.name not in (f"step-{START - 1:08d}", f"step-{START:08d}"):
            shutil.rmtree(path)
    where: list[str] = []
    shutil.copytree(base, out)
    result.calls = count_calls(zygote, arguments, where)
    points = [
        (call, fault, number)
        for call in calls
        for fault in FAULTS
        for number in range(1, result.calls[call] + 1)
    ]
    for call, fault, number in points[offset::stride]:
        if time.monotonic() > deadline:
            break
        shutil.rmtree(out)
        shutil.copytree(base, out)
        done = faulted(zygote, arguments, call, fault, number, where)
        _judge(bench, zygote, arguments, out, done, f"{call}:{fault}:{number}", result)
    return result


def _judge(
    bench: Bench,
    zygote: Zygote,
    arguments: list[str],
    out: Path,
    done: Finished,
    point: str,
    result: Sweep,
) -> None:
    """What was said has to be true, and the same command again has to finish the work."""
    call, fault, _ = point.split(":")
    result.faults[f"{call} {fault}"] += 1
    result.codes[f"{fault} -> {done.code}"] += 1
    allowed = (0, 137) if "KILL" in fault else (0, IO_FAILED)
    if "cannot make" in done.output:  # the run's folder itself
        allowed += (LOCKED,)
    if call == "openat":  # what cannot be read is treated, and named, as what is damaged
        allowed += (BAD_DATA,)
    hit = [line for line in (zygote.folder / "strace").read_text().splitlines() if "INJ" in line]
    spoken = any("/output-" in line for line in hit)  # its own standard output has no name
    result.check(done.code in allowed, f"{point}: exit {done.code}: {done.output[-800:]}")
    result.check(not done.crashed, f"{point}: traceback: {done.output[-800:]}")
    said = max([0, *(int(n) for n in re.findall(r"saved step (\d+)", done.output))])
    if done.code == 0:
        result.check(model_of(out) == bench.model, f"{point}: silent, and another model")
    if done.code == IO_FAILED:
        line = done.output.strip().splitlines()[-1]
        result.check(
            spoken or "/" in line.partition("sota: ")[2], f"{point}: names no file: {line}"
        )
    again = zygote.run(arguments)
    result.check(again.code == 0, f"{point}: then exit {again.code}: {again.output[-800:]}")
    if again.code == 0:
        result.check(model_of(out) == bench.model, f"{point}: then another model")
        resumed = [int(n) for n in re.findall(r"resuming from step (\d+)", again.output)]
        result.check(not resumed or resumed[0] >= said, f"{point}: lost step {said}")
        result.check("rejected" not in again.output, f"{point}: torn: {again.output[:800]}")
    result.check(not leftovers(out), f"{point}: left over {leftovers(out)}")


def sweep_prepare(bench: Bench, stride: int = 1, offset: int = 0) -> Sweep:
    """The same for `sota prepare`, with all its processes: units, merge, manifest, final rename.

    strace counts in each process by itself, so one run may meet several faults.
    """
    result, expected = Sweep(), contents(bench.data)
    out, log = bench.root / "prepared", bench.root / "strace"
    arguments = prepare_arguments(bench.corpus, out, workers=1)
    assert _prepare_traced(bench, arguments, log, [",".join(CALLS[:-1])]).code == 0
    for (_, call), number in Counter(_calls(log)).items():
        result.calls[call] = max(result.calls[call], number)
    points = [
        (call, fault, number)
        for call in CALLS[:-1]
        for fault in FAULTS
        for number in range(1, result.calls[call] + 1)
    ]
    for call, fault, number in points[offset::stride]:
        _remove(out)
        done = _prepare_traced(bench, arguments, log, [call, f"{call}:{fault}:when={number}"])
        point = f"{call}:{fault}:{number}"
        result.faults[f"{call} {fault}"] += 1
        result.codes[f"{fault} -> {done.code}"] += 1
        allowed = (0, 137, -9) if "KILL" in fault else (0, IO_FAILED)
        result.check(done.code in allowed, f"{point}: exit {done.code}: {done.output[-1500:]}")
        hit = [line for line in log.read_text().splitlines() if "INJ" in line]
        # Pipes and semaphores of Python's own process pool are no files of ours.
        own = ("<pipe:", "<socket:", "/dev/shm/sem.")
        on_disk = not any(mark in line for mark in own for line in hit)
        crashed = done.crashed and on_disk and "KILL" not in fault  # its helpers may wonder aloud
        result.check(not crashed, f"{point}: {hit} {done.output[-1500:]}")
        if out.exists():
            result.check(contents(out) == expected, f"{point}: torn at its final name")
        again = sota(arguments, bench.root)
        result.check(again.code == 0, f"{point}: then exit {again.code}: {again.output[-800:]}")
        result.check(contents(out) == expected, f"{point}: then other bytes")
        beside = [path.name for path in bench.root.iterdir() if path.name.startswith(".")]
        result.check(not beside, f"{point}: left over {beside}")
    return result


def _prepare_traced(bench: Bench, arguments: list[str], log: Path, options: list[str]) -> Finished:
    """The command under strace from its first instruction; options: calls, injection."""
    more = ["-e", f"trace={options[0]}"]
    more += ["-e", f"inject={options[1]}"] if options[1:] else []
    return sota(arguments, bench.root, before=["strace", "-f", "-qq", "-y", "-o", str(log), *more])


def _calls(log: Path) -> list[tuple[str, str]]:
    """(process, call) of each line."""
    return re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE)


def _remove(out: Path) -> None:
    """Prepared data and what lies beside it."""
    for path in [out, *out.parent.glob(".*")]:
        if path.exists():
            shutil.rmtree(path)
