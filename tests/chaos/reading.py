"""Damaged runs and data, opened by their readers: `sota evaluate`, the trainer, the loader."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from sota_transformer.errors import BAD_DATA, NO_INPUT, SotaError

from .commands import STEPS, Bench, Zygote
from .damage import cases
from .fuzz import Result, fuzz
from .protocols import real_state

_FIGURES = re.compile(r"(loss|perplexity|bits per byte) +([\d.]+)")


def checkpoints_notice(run: Path) -> Callable[[Path, str], bool]:
    """An oracle: what `latest` and `load` do if the run's newest checkpoint is damaged."""
    from sota_transformer.training import checkpoint

    def notices(folder: Path, case: str) -> bool:
        warnings: list[str] = []
        step = checkpoint.latest(run, warnings.append)
        assert step is not None
        checkpoint.load(run, step)
        newest = int(folder.name.removeprefix("step-"))
        return step < newest and f"step {newest} rejected" in warnings[0]

    return notices


def small_run(run: Path) -> Path:
    """Three checkpoints of a few numbers each, written by the trainer's own code."""
    from sota_transformer.training import checkpoint

    run.mkdir(parents=True)
    for step in (1, 2, 3):
        checkpoint.save(run, real_state(step))
    return run


def fuzz_checkpoints(root: Path, count: int, seed: int = 0) -> Result:
    """Damage the newest checkpoint of a small run: the previous one is used, with a warning."""
    run = small_run(root / "small-run")
    newest, other = (run / "checkpoints" / f"step-{step:08d}" for step in (3, 2))
    result = fuzz(newest, other, checkpoints_notice(run), count=count, seed=seed)
    result.silent += swapped_steps(run)
    return result


def swapped_steps(run: Path) -> list[str]:
    """An intact checkpoint under another step's name is not accepted."""
    from sota_transformer.training import checkpoint

    folder = run / "checkpoints"
    shutil.rmtree(folder / "step-00000003")
    shutil.copytree(folder / "step-00000002", folder / "step-00000003")
    warnings: list[str] = []
    found = checkpoint.latest(run, warnings.append)
    return [] if found == 2 and "holds step 2" in warnings[0] else ["another step's folder"]


def fuzz_evaluate(bench: Bench, zygote: Zygote, count: int, seed: int = 0) -> Result:
    """Damage any file of a run and evaluate it: an error, a named fallback or the same figures."""
    source, result = random.Random(seed), Result()
    run = bench.root / "damaged"
    if not run.exists():
        shutil.copytree(bench.run, run)
    arguments = ["evaluate", str(run), "--device", "cpu"]
    before = zygote.run(arguments)
    expected = _FIGURES.findall(before.output)
    assert before.code == 0 and len(expected) == 3, before.output
    newest, other = (run / "checkpoints" / f"step-{step:08d}" for step in (STEPS, STEPS - 3))
    aside = bench.root / "aside"
    aside.mkdir(exist_ok=True)
    folders = [(newest, other, True)] * 3 + [(run / "config.json", aside, False)]
    pools = []
    for folder, donor, critical in folders:
        if folder.is_dir():
            pools.append((list(cases(folder, donor, source)), critical))
        else:
            pools.append(([c for c in _file_cases(folder, donor, source)], critical))
    while result.cases < count:
        pool, critical = source.choice(pools)
        name, damage = source.choice(pool)
        with damage():
            done = zygote.run(arguments)
        result.cases += 1
        if done.code is None:
            result.hangs.append(name)
        elif done.crashed:
            result.tracebacks.append(f"{name}: {done.output[-600:]}")
        elif done.code == 0:
            said = f"step {STEPS} rejected" in done.output
            same = _FIGURES.findall(done.output) == expected
            if (critical and not said) or (not critical and not same):
                result.silent.append(f"{name}: {done.output[-400:]}")
        elif done.code not in (BAD_DATA, NO_INPUT) or "/" not in done.output:
            result.silent.append(f"{name}: exit {done.code} {done.output[-400:]}")
    return result


def _file_cases(path: Path, donor: Path, source: random.Random) -> list:
    """The kinds of damage to one file among many in a folder."""
    alone = donor / "one"
    shutil.rmtree(alone, ignore_errors=True)
    alone.mkdir()
    shutil.copy(path, alone / path.name)
    names = [name for name, _ in cases(alone, donor, random.Random(0))]
    shutil.rmtree(alone)
    from .damage import _flips, _kinds, _lengths

    data = path.read_bytes()
    found = [*_flips(path, data, source, 0), *_lengths(path, data, source, 0), *_kinds(path)]
    assert len(found) >= len(names) // 2
    return found


def fuzz_data(data: Path, count: int, seed: int = 0) -> Result:
    """Damage prepared data: opening it for training names the wrong file."""
    from sota_transformer.data.shards import TokenWindows

    def notices(folder: Path, case: str) -> bool:
        damaged = case.split("[")[0].split(" ")[0]
        if "hashes" in damaged or damaged.startswith("."):
            return True  # not read by those who trains
        try:
            for split in ("train", "val"):
                TokenWindows(folder, split, 16)
        except SotaError as error:
            return error.code in (BAD_DATA, NO_INPUT) and (
                damaged in str(error) or "replaced" in case or "manifest" in case
            )
        return False

    return fuzz(data, data / "nothing", notices, count=count, seed=seed)
