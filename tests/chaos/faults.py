"""Kills and errors at every system call that writes, injected by strace into the real commands.

First an undisturbed run is watched: each call that writes below its folder is a point, identified
by the call, the file and its ordinal among such calls of one thread. Then, in one run per point and
fault, only that call fails or kills the process. After each fault the plain command has to finish
with the bytes of an undisturbed run, and a command that failed has to exit with code 74.
"""

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sota_transformer.errors import BAD_DATA, IO_FAILED

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
    train_arguments,
)

CALLS = ("write", "pwrite64", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")
CALLS += ("ftruncate", "openat")
FAULTS = ("signal=KILL", "error=ENOSPC", "error=EIO")
START = STEPS - 2  # leaves two steps and two saves
TRIES = 3  # in case other processes took all the ids expected for the workers
_LINE = re.compile(r'^(\d+) +(\w+)\((?:\d+<([^>]*)>|(?:AT_FDCWD<[^>]*>, )?"([^"]*)")(.*)', re.M)
_WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT")


@dataclass(frozen=True)
class Point:
    """One system call of an undisturbed run."""

    call: str
    path: str
    """With {output} for standard output and {pid} for a worker's process id."""
    number: int
    """Among such calls of one thread."""

    def where(self, output: Path, pid: int) -> list[str]:
        """strace options for this path; workers get the process ids after `pid`."""
        last = pid + 50 if "{pid}" in self.path else pid + 1
        paths = (self.path.format(output=output, pid=n) for n in range(pid + 1, last + 1))
        return [option for path in dict.fromkeys(paths) for option in ("-P", path)]


@dataclass
class Sweep:
    """Counts by call and fault, and a description of everything that went wrong."""

    points: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, good: bool, what: str) -> None:
        """Record and print a broken promise."""
        if not good:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)


@contextmanager
def _traced(zygote: Zygote, pid: int, options: list[str]) -> Iterator[None]:
    """Attach strace to a command that waits for it."""
    command = ["strace", "-f", "-qq", "-y", "-o", str(zygote.folder / "strace"), *options]
    quiet = subprocess.DEVNULL
    tracer = subprocess.Popen([*command, "-p", str(pid)], stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        tracer.wait(60)  # it exits after the command's last process


def watch(zygote: Zygote, arguments: list[str]) -> list[Point]:
    """All calls of an undisturbed command that write below the zygote's folder, in order."""
    pid = zygote.start(arguments, traced=True)
    with _traced(zygote, pid, ["-e", f"trace={','.join(CALLS)}"]):
        done = zygote.end(pid)
    assert done.code == 0, done.output
    counts: Counter[tuple[str, str, str]] = Counter()
    points: dict[Point, None] = {}
    for thread, call, descriptor, name, rest in _LINE.findall(_log(zygote)):
        path = descriptor or name
        if Path(path).is_relative_to(zygote.folder):
            path = path.replace(str(zygote.output), "{output}")
            path = re.sub(r"(/unit-\d+)\.\d+$", r"\1.{pid}", path)
            counts[thread, call, path] += 1
            if call != "openat" or (_WRITES.search(rest) and path != "{output}"):
                points[Point(call, path, counts[thread, call, path])] = None
    return list(points)


def _log(zygote: Zygote) -> str:
    return (zygote.folder / "strace").read_text(errors="replace")


def _faulted(zygote: Zygote, arguments: list[str], point: Point, fault: str) -> Finished:
    """Run one command that hits the fault at the point."""
    pid = zygote.start(arguments, traced=True)
    options = ["-e", f"trace={point.call}", *point.where(zygote.output, pid)]
    options += ["-e", f"inject={point.call}:{fault}:when={point.number}"]
    with _traced(zygote, pid, options):
        return zygote.end(pid)


def _sweep(
    zygote: Zygote,
    arguments: list[str],
    begin: Callable[[], None],
    judge: Callable[[Sweep, str, Finished], None],
    part: tuple[int, int],
) -> Sweep:
    """All points and faults, or about `part[0]` of them; `part[1]` selects which."""
    result = Sweep()
    begin()
    points = watch(zygote, arguments)
    result.points.update(point.call for point in points)
    every = [(point, fault) for fault in FAULTS for point in points]
    count, seed = part
    stride = max(1, math.ceil(len(every) / count))
    for point, fault in every[seed % stride :: stride]:
        what = f"{point.call} {point.path} {point.number} {fault}"
        for _ in range(TRIES):
            begin()
            done = _faulted(zygote, arguments, point, fault)
            hit = [line for line in _log(zygote).splitlines() if "INJECTED" in line]
            if hit or "killed by SIGKILL" in _log(zygote):
                break
        else:
            result.missed.append(what)
            continue
        result.faults[f"{point.call} {fault}"] += 1
        result.codes[f"{fault} -> {done.code}"] += 1
        crashed = done.crashed and fault != FAULTS[0]  # Python's own helpers may complain
        result.check(not crashed, f"{what}: traceback: {done.output[-1500:]}")
        if done.code == IO_FAILED:
            line = done.output.strip().splitlines()[-1]
            named = "/" in line.partition("sota: ")[2] or "{output}" in point.path  # has no name
            result.check(named, f"{what}: names no file: {line}")
        judge(result, what, done)
    return result


def _allowed(fault: str) -> tuple[int, ...]:
    return (0, 137) if "KILL" in fault else (0, IO_FAILED)


def sweep_train(bench: Bench, zygote: Zygote, count: int, seed: int = 0) -> Sweep:
    """Resume, save twice, prune, validate."""
    out, base = bench.root / "faulted", bench.root / "base"
    arguments = train_arguments(bench.data, out, save_every=1)
    run_at(bench, out, START - START % SAVE_EVERY)
    first = zygote.run([*arguments, "--train.keep-checkpoints", "9"])  # keeps every step
    assert first.code == 0, first.output
    out.rename(base)
    for path in (base / "checkpoints").iterdir():
        if path.name not in (f"step-{START - 1:08d}", f"step-{START:08d}"):
            shutil.rmtree(path)

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out)

    def judge(result: Sweep, what: str, done: Finished) -> None:
        """What was reported has to be true, and the same command has to finish the work."""
        result.check(done.code in _allowed(what), f"{what}: exit {done.code}: {done.output[-800:]}")
        said = max([0, *(int(n) for n in re.findall(r"saved step (\d+)", done.output))])
        if done.code == 0:
            result.check(model_of(out) == bench.model, f"{what}: exit 0, but the model differs")
        again = zygote.run(arguments)
        result.check(again.code == 0, f"{what}: then exit {again.code}: {again.output[-800:]}")
        if again.code == 0:
            result.check(model_of(out) == bench.model, f"{what}: then the model differs")
            resumed = [int(n) for n in re.findall(r"resuming from step (\d+)", again.output)]
            result.check(not resumed or resumed[0] >= said, f"{what}: lost step {said}")
            result.check("rejected" not in again.output, f"{what}: torn: {again.output[:800]}")
        result.check(not leftovers(out), f"{what}: left over {leftovers(out)}")

    return _sweep(zygote, arguments, begin, judge, (count, seed))


def sweep_prepare(bench: Bench, zygote: Zygote, count: int, seed: int = 0) -> Sweep:
    """Units, merge, manifest and final rename, in all processes and threads."""
    expected, out = contents(bench.data), bench.root / "swept" / "prepared"
    arguments = prepare_arguments(bench.corpus, out, workers=1)

    def begin() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)

    def judge(result: Sweep, what: str, done: Finished) -> None:
        twice = "died twice" in done.output and "{pid}" in what  # every worker hits that point
        good = done.code in _allowed(what) or (done.code == BAD_DATA and twice)
        result.check(good, f"{what}: exit {done.code}: {done.output[-1500:]}")
        if out.exists():
            result.check(contents(out) == expected, f"{what}: torn at its final name")
        again = zygote.run(arguments)
        result.check(again.code == 0, f"{what}: then exit {again.code}: {again.output[-800:]}")
        result.check(contents(out) == expected, f"{what}: then bytes differ")
        beside = [path.name for path in out.parent.iterdir() if path != out]
        result.check(not beside, f"{what}: left over {beside}")

    return _sweep(zygote, arguments, begin, judge, (count, seed))
