"""The same run on varying numbers of processes, and failures of one, some or all of them.

Run as a program (`python -m tests.chaos.ranks train ...`) it is `sota`, but also records which
windows each process reads and can be told to exit after a given step.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from sota_transformer import cli, runtime
from sota_transformer.data.loader import BatchLoader
from sota_transformer.training.runlog import read_metrics
from sota_transformer.training.signals import Stopped
from sota_transformer.training.trainer import Trainer

from .commands import ENVIRONMENT, ROOT, Bench, fresh, leftovers, train_arguments
from .soak import Soak

STEPS, SAVE_EVERY, SILENCE = 200, 20, 8.0
# Accident -> (signal, recipient, seconds within which everything has to end).
ACCIDENTS: dict[str, tuple[int, str, float]] = {
    "kill -9 of a rank": (signal.SIGKILL, "one", 30),
    "kill -9 of all ranks": (signal.SIGKILL, "ranks", 30),
    "kill -9 of torchrun": (signal.SIGKILL, "launcher", 60),
    "kill -9 of everything": (signal.SIGKILL, "group", 30),
    "SIGTERM to torchrun": (signal.SIGTERM, "launcher", 10),
    "SIGTERM to a rank": (signal.SIGTERM, "one", 30),
    "Ctrl-C in the terminal": (signal.SIGINT, "group", 10),
    "a rank that hangs": (signal.SIGSTOP, "one", 60),
}


def main() -> int:
    """`sota`, logging each batch to $SOTA_IDS and exiting after step $SOTA_LEAVE."""
    runtime._SILENCE = timedelta(seconds=SILENCE)
    note, leave = os.environ.get("SOTA_IDS"), int(os.environ.get("SOTA_LEAVE", "0"))
    rank = os.environ.get("RANK", "0")
    batch, update = BatchLoader.batch, Trainer._update

    def noted(self: BatchLoader, step: int):
        if note:
            with open(f"{note}.{rank}", "a") as file:
                file.write(json.dumps([step, self.window_ids(step).tolist()]) + "\n")
        return batch(self, step)

    def ended(self: Trainer, sums) -> None:
        update(self, sums)
        if self.step == leave:
            raise Stopped(signal.SIGTERM)

    BatchLoader.batch, Trainer._update = noted, ended
    return cli.main()


def command(bench: Bench, out: Path, ranks: int, micro: int) -> list[str]:
    """200 steps of four rows on `ranks` processes."""
    program = [sys.executable, "-m"]
    if ranks > 1:
        program += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    options = f"--steps {STEPS} --train.eval-every 50 --train.micro-rows {micro}".split()
    return [*program, "tests.chaos.ranks", *train_arguments(bench.data, out, SAVE_EVERY), *options]


def start(words: list[str], output: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """Start the command in its own session, writing to `output`."""
    with output.open("wb") as file:
        return subprocess.Popen(
            words, cwd=ROOT, env=ENVIRONMENT | environment,
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def _model(run: Path) -> bytes:
    return (run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors").read_bytes()


def _read(note: Path) -> dict[int, list[int]]:
    """Step -> windows in global order, for any number of processes."""
    found = dict[int, dict[str, list[int]]]()
    for path in sorted(note.parent.glob(f"{note.name}.*")):
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            found.setdefault(step, {})[path.suffix] = ids
    return {step: [i for key in sorted(of) for i in of[key]] for step, of in found.items()}


def _train(bench: Bench, name: str, parts: list[tuple[int, int, int]]) -> Path:
    """Train one run in parts of (processes, micro-batch, last step); return its folder."""
    out = fresh(bench, bench.root / name)
    for number, (ranks, micro, last) in enumerate(parts):
        note = {"SOTA_IDS": str(out / f"ids-{number}"), "SOTA_LEAVE": str(last)}
        log = out / f"output-{number}"
        start(command(bench, out, ranks, micro), log, **note).wait(600)
        said = f"saved step {last}"
        assert said in (text := log.read_text(errors="replace")), text[-3000:]
    return out


def elastic(bench: Bench) -> Soak:
    """1 -> 2 -> 1 processes, then half the micro-batch and 4: samples, losses, bits."""
    result = Soak()
    for micro, parts in {
        2: [(1, 2, 60), (2, 2, 120), (1, 2, STEPS)],
        4: [(1, 4, 40), (2, 2, 80), (1, 2, 120), (1, 1, 160), (4, 1, STEPS)],
    }.items():
        whole = _train(bench, f"whole-{micro}", [(1, micro, STEPS)])
        changed = _train(bench, f"elastic-{micro}", parts)
        expected, seen = _read(whole / "ids-0"), dict[int, list[int]]()
        for number in range(len(parts)):
            seen |= _read(changed / f"ids-{number}")
        same = sum(seen[step] == expected[step] for step in range(STEPS))
        result.check(same == STEPS, f"{STEPS - same} of {STEPS} steps read different windows")
        one, other = (
            {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}
            for run in (whole, changed)
        )
        common = one.keys() & other.keys()  # the last step of a part is saved, but not logged
        worst = max(abs(one[step] - other[step]) / one[step] for step in common)
        result.check(len(common) >= STEPS - len(parts), f"{len(common)} losses")
        result.check(worst <= 1e-5, f"losses differ by {worst:.1e}")
        equal = _model(changed) == _model(whole)
        result.check(equal or micro != 2, "two ranks are not bit-identical to two micro-batches")
        print(
            f"{parts}: {same} of {STEPS} steps the same windows in the same order, losses within "
            f"{worst:.1e}, model {'bit-identical' if equal else 'not bit-identical'}"
        )
        result.finished += 1
    return result


def accidents(bench: Bench, count: int, seed: int = 0) -> Soak:
    """Two processes and `count` accidents in turn; all chains end in a single process's bytes."""
    source, result, slowest = random.Random(seed), Soak(), dict[str, float]()
    reference = _model(_train(bench, "ranks", [(1, 2, STEPS)]))
    names = sorted(ACCIDENTS)
    while result.kills < count:
        out, saved = fresh(bench, bench.root / f"ranks-{result.finished}"), 0
        while True:
            log = bench.root / "ranks-output"
            process = start(command(bench, out, 2, 2), log)
            goal = saved + SAVE_EVERY * source.randint(0, 4)
            while process.poll() is None and (not goal or _said(log, goal) < goal):
                time.sleep(0.05)
                goal = goal or (saved + SAVE_EVERY if source.random() < 0.01 else 0)
            time.sleep(source.uniform(0, 0.3))
            name, undisturbed = names[result.kills % len(names)], True
            # At the very end nobody but torchrun still waits for a stopped rank.
            if process.poll() is None and result.kills < count and not _said(log, STEPS):
                undisturbed = False
                took = _accident(process, name, source, result, log)
                slowest[name] = max(took, slowest.get(name, 0.0))
                result.kills += 1
            process.wait(600)
            text = log.read_text(errors="replace")
            resumed = re.findall(r"resuming from step (\d+)|is complete: (\d+)", text)
            if resumed:
                at = int("".join(resumed[0]))
                result.check(at >= saved, f"saved step {saved}, resumed from {at}")
            saved = max(saved, _said(log, 0))
            ours = re.findall(r'File "[^"]*sota_transformer/(?!cli)', text)
            result.check(not ours, f"{name}: {text[:1500]}")
            complete = (out / "checkpoints" / f"step-{STEPS:08d}").exists()
            result.check(complete or not undisturbed, f"ended by itself: {text[:3000]}")
            if complete or result.wrong:
                break
        result.finished += 1
        again = start(command(bench, out, 1, 2), bench.root / "ranks-again")
        result.check(again.wait(120) == 0 and _model(out) == reference, f"{out}: model differs")
        result.check(not leftovers(out), f"{out}: left over {leftovers(out)}")
        if result.wrong:
            break
        shutil.rmtree(out)
    for name in sorted(slowest):
        print(f"{name}: all ended within {slowest[name]:.1f} s")
    return result


def _said(log: Path, least: int) -> int:
    """The newest step reported as saved, if it is at least `least`."""
    steps = map(int, re.findall(r"saved step (\d+)", log.read_text(errors="replace")))
    return max((step for step in steps if step >= least), default=0)


def _accident(
    process: "subprocess.Popen[bytes]", name: str, source: random.Random, result: Soak, log: Path
) -> float:
    """Cause the accident; return the seconds until no process of the command is left."""
    number, whom, limit = ACCIDENTS[name]
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    ranks = [int(pid) for pid in Path(children).read_text().split()]
    said = _said(log, 0)
    chosen = {"launcher": [process.pid], "ranks": ranks, "group": [process.pid, *ranks]}
    victims = chosen.get(whom) or ([source.choice(ranks)] if ranks else [process.pid])
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    began = time.monotonic()
    while left := [pid for pid in (process.pid, *ranks) if _runs(pid)]:
        if time.monotonic() - began > limit:
            result.check(False, f"{name}: {left} still running after {limit} s; {log.read_text()}")
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            break
        process.poll()
        time.sleep(0.02)
    text = log.read_text(errors="replace")
    if said and name in ("SIGTERM to torchrun", "Ctrl-C in the terminal"):
        word = signal.Signals(number).name
        result.check(f"; stopped by {word}" in text or "is in" in text, f"{name}: {text[-2000:]}")
    return time.monotonic() - began


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
