"""Fault-injection and randomized tests: `python -m tests.chaos VERB [--count N] [--folder DIR]`.

Each verb tests the installed code on this machine and, with --folder, on that disk. In brackets:
what --count counts.

model     every state that a power cut can leave, also during recovery; all mutants of durable.py
fuzz      all kinds of damage to a committed folder, checkpoints and prepared data    (damages)
kill      kill -9 of `sota train` at random moments                                   (kills)
prepare   kill -9 of `sota prepare`: the parent, a worker or all                      (kills)
stop      SIGTERM to `sota train`                                                     (signals)
twice     two runs started in one folder at once                                      (races)
cuts      power cuts on a real ext4 during `sota prepare` and `sota train`; needs root (cuts)
full      full disks of 4 to 64 MiB; needs root                                       (sizes)
faults    KILL, ENOSPC, EIO at system calls of `sota train`; needs strace             (points)
shards    the same for `sota prepare`; needs strace                                   (points)
elastic   1 -> 2 -> 1 -> 4 processes, half the micro-batch: samples, losses, bits
ranks     kill -9, SIGTERM and hanging ranks under torchrun                           (accidents)
documents malformed documents and files in `sota prepare`                             (documents)
inputs    random files, archives, streams, tables and folders in `sota prepare`, compared with
          plain readers                                                               (inputs)
policies  decisions of `sota prepare` (duplicates, splits, --exclude, --append, parts), compared
          with brute force                                                            (folders)
folders   random Hugging Face folders in `sota import`, `evaluate`, `export` and `train`, compared
          with transformers                                                           (folders)
evaluate  `sota evaluate` on damaged runs                                             (damages)
journeys  random sequences of all commands in one workspace, with interruptions and accidents,
          compared with a model of the workspace                                      (journeys)
launches  random sequences of `train_sota.py` in one folder, including its menu, with small
          presets                                                                     (folders)
servings  random events around a running `sota serve`: runs changed underneath it, exits during
          requests and with hanging clients; also `sota doctor`                       (scenes)
twin      runs with random options, compared with an independent trainer in float64   (runs)
judging   output of `sota evaluate`, `generate`, `report` and the server for random models,
          compared with float64                                                       (models)
windows   what a run reads from random data, and what `sota train`, `data`, `config` and `plan`
          report about it, compared with plain numpy                                  (folders)
broken    2,900 simulated devices with one silently wrong operation each; `sota doctor` has to
          reject those that would change a run                                        (breakages)
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sota_transformer import durable

from . import (
    broken,
    cuts,
    documents,
    faults,
    folders,
    fuzz,
    inputs,
    journeys,
    judging,
    launches,
    mutants,
    policies,
    ranks,
    reading,
    servings,
    soak,
    stops,
    twins,
    windows,
)
from .commands import Bench, Zygote, corpus, make_bench, prepare_arguments, sota
from .protocols import Explorer, configure, explore_twice, train, train_really

POINTS = 1000  # more than one commit has: the sweeps try every point


def _model(root: Path, count: int, seed: int) -> list[str]:
    """Exhaustive; `count` and `seed` are ignored."""
    wrong = []
    for driver in (train, configure):
        report = explore_twice(Explorer(durable, driver), 4)
        print(
            f"{driver.__name__}: {report.states:,} crash states, {report.problems or 'none wrong'}"
        )
        wrong += list(report.problems)
    report = explore_twice(Explorer(durable, train_really), 3)
    print(f"checkpoint.py: {report.states:,} crash states, {report.problems or 'none wrong'}")
    every = [(name, mutants.caught(mutant)) for name, mutant in mutants.mutants()]
    missed = [name for name, how in every if not how]
    print(f"mutants: {len(every) - len(missed)} of {len(every)} caught")
    return wrong + list(report.problems) + missed


def _fuzz(root: Path, count: int, seed: int) -> list[str]:
    """Half of the damage goes to a plain folder, the rest to checkpoints and prepared data."""
    result, seconds = fuzz.run(root, count // 2, seed)
    bad = result.bad
    print(f"verify: {result.cases:,} damages, {len(result.bad)} unnoticed, {seconds:.0f} s")
    checkpoints = reading.fuzz_checkpoints(root, count // 4, seed)
    print(f"checkpoints: {checkpoints.cases:,} damages, {len(checkpoints.bad)} unnoticed")
    small = corpus(root / "fuzz-corpus", 2, 60)
    done = sota(prepare_arguments(small, root / "fuzz-data"), root)
    assert done.code == 0, done.output
    data = reading.fuzz_data(root / "fuzz-data", count // 4, seed)
    print(f"data: {data.cases:,} damages, {len(data.bad)} unnoticed")
    return bad + checkpoints.bad + data.bad


def _prepare(root: Path, count: int, seed: int) -> list[str]:
    texts, reference = corpus(root / "texts", 3, 20_000), root / "prepared"
    done = sota(prepare_arguments(texts, reference, workers=1), root)
    assert done.code == 0, done.output
    result = soak.soak_prepare(texts, reference, root, count, seed)
    print(result)
    return result.wrong


def _documents(root: Path, count: int, seed: int) -> list[str]:
    result = documents.hostile(root, count, seed)
    print(
        f"{result.documents:,} documents and {result.files:,} files: {result.kept:,} documents "
        f"kept, {result.rejects.total():,} skipped"
    )
    for reason, number in result.rejects.most_common():
        print(f"{number:>8,}  {reason}")
    return result.wrong


def _told(work: Callable[[Path, int, int], Any]) -> Callable[[Path, int, int], list[str]]:
    """A tool whose result prints itself."""

    def tool(root: Path, count: int, seed: int) -> list[str]:
        result = work(root, count, seed)
        print(result)
        return result.wrong

    return tool


def _on_bench(
    work: Callable[[Bench, Zygote, int, int], Any],
) -> Callable[[Path, int, int], list[str]]:
    """A tool that needs a corpus, prepared data, a finished run and a zygote."""

    def tool(root: Path, count: int, seed: int) -> list[str]:
        with Zygote(root) as zygote:
            result = work(make_bench(root), zygote, count, seed)
        print(result)
        return getattr(result, "wrong", None) or getattr(result, "bad", [])

    return tool


def _twin(root: Path, count: int, seed: int) -> list[str]:
    with Zygote(root) as zygote:
        result = twins.pairs(root, zygote, count, seed)
    print(result)
    return result.wrong


TOOLS: dict[str, tuple[int, Callable[[Path, int, int], list[str]]]] = {
    "model": (0, _model),
    "fuzz": (50_000, _fuzz),
    "kill": (300, _on_bench(soak.soak_train)),
    "prepare": (300, _prepare),
    "stop": (50, _on_bench(stops.stop_train)),
    "twice": (
        20,
        _on_bench(lambda bench, zygote, count, _: stops.two_at_once(bench, zygote, count)),
    ),
    "full": (
        64,
        _on_bench(
            lambda bench, zygote, count, _: stops.full_disks(
                bench, zygote, list(range(4, 68, max(1, 64 // count)))
            )
        ),
    ),
    "cuts": (200, _on_bench(cuts.power_cuts)),
    "faults": (POINTS, _on_bench(faults.sweep_train)),
    "shards": (POINTS, _on_bench(faults.sweep_prepare)),
    "elastic": (0, _on_bench(lambda bench, *_: ranks.elastic(bench))),
    "ranks": (
        40,
        _on_bench(lambda bench, _, count, seed: ranks.accidents(bench, count, seed)),
    ),
    "documents": (100_000, _documents),
    "inputs": (1000, _told(inputs.inputs)),
    "policies": (1000, _told(policies.policies)),
    "folders": (500, _told(folders.folders)),
    "evaluate": (200, _on_bench(reading.fuzz_evaluate)),
    "journeys": (100, _told(journeys.journeys)),
    "launches": (50, _told(launches.launches)),
    "servings": (50, _told(servings.servings)),
    "twin": (200, _twin),
    "judging": (100, _told(judging.judging)),
    "windows": (300, _told(windows.windows)),
    "broken": (200, _told(broken.broken)),
}


def main() -> int:
    """Run one tool; 0 if everything held."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=TOOLS, metavar="VERB")
    parser.add_argument("--count", type=int, help="number of cases; default: that of a release")
    parser.add_argument("--folder", type=Path, help="on the disk to test; default: a new one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A script's background jobs ignore SIGINT, and everything a suite starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    count, tool = TOOLS[options.verb]
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=options.folder) as name:
        began = time.monotonic()
        wrong = tool(Path(name).resolve(), options.count or count, options.seed)
    print(f"{time.monotonic() - began:.0f} s, {len(wrong)} wrong")
    for line in wrong[:20]:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
