#!/usr/bin/env python3
"""From text to a trained model and a text sample, by menu or by flags.

    python train_sota.py            shows a menu: quick test, full training, 250M, resume
    python train_sota.py --quick    16M, 1,000 steps, in about five minutes on this machine
    python train_sota.py --full --data PATH

It checks the configuration, prepares the data if that is not done yet, prints what it will do and
how long it will take, trains, evaluates and shows a sample. Run again, it resumes.
"""

import contextlib
import dataclasses
import shlex
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Literal

try:
    from sota_transformer import cli, config
    from sota_transformer import options as verbs
    from sota_transformer.errors import LOCKED, interruptible
    from sota_transformer.presets import recipe_of
except ImportError:
    advice = "`source .venv/bin/activate` after `make quick`, or `pip install -e .`"
    print(f"sota: the package is not installed; {advice}", file=sys.stderr)
    raise SystemExit(2) from None

MENU = """What do you want to do?
  1  quick test     16M parameters, 1,000 steps, about five minutes
  2  full training  125M parameters, 100,000 steps
  3  large          250M parameters, 100,000 steps
  4  resume a run"""
QUICK_SEQ_LEN = 256  # half the preset's, so that a small machine can size its batch more finely
QUICK_EVAL_TOKENS = 1 << 15  # four times a run; double took over two minutes on a slow machine
QUICK_MINUTES = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train a model from text, or resume a run."""

    quick: bool = False
    """16M parameters, 1,000 steps, fitted to --minutes."""
    full: bool = False
    """125M parameters, 100,000 steps."""
    large: bool = False
    """250M parameters, 100,000 steps."""
    resume: Path | None = None
    """Folder of a run to resume."""
    data: str = "python:"
    """Text file, folder or glob, a prepared folder, or python: (the source on this machine)."""
    out: Path | None = None
    """Folder of the run; runs/NAME by default."""
    recipe: Literal["seed", "fast"] | None = None
    """seed, the classic recipe, or fast, which the quick test uses."""
    minutes: float | None = None
    """Time budget of --quick, by default five; a resumed run keeps its original plan."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on."""


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""

    def work() -> int:
        with interruptible(signal.SIGTERM, signal.SIGHUP):  # until training takes them over
            return run(cli.parse(Options, "train_sota.py", arguments))

    return cli.guarded(work)


def run(options: Options) -> int:
    """Resolve what to do, then do it."""
    asked = [bool(x) for x in (options.quick, options.full, options.large, options.resume)]
    if sum(asked) > 1:
        raise cli.SotaError("give only one of --quick, --full, --large and --resume RUN")
    if options.minutes is not None and not 0 < options.minutes < 1e6:
        raise cli.SotaError(f"--minutes {options.minutes} must be above 0 and finite")
    if not any(asked):
        options = ask(options)
    if options.minutes is not None and (options.full or options.large):
        raise cli.SotaError("--minutes applies only to --quick; leave it out")
    if options.resume and options.out not in (None, options.resume):
        raise cli.SotaError(f"--resume {options.resume} continues in that folder; leave out --out")
    if options.resume is None:
        return cli.train_and_show(configure(options, prepared(options.data)))
    given = options.data != Options.data  # the run's own data may have moved
    return cli.train_and_show(
        resumed(options.resume, options, prepared(options.data) if given else None)
    )


def ask(options: Options) -> Options:
    """The options chosen from the menu; SotaError 2 without a terminal."""
    if not sys.stdin.isatty():
        raise cli.SotaError("no terminal for a menu: give --quick, --full, --large or --resume RUN")
    print(MENU)
    try:
        choice = input("1, 2, 3 or 4: ").strip()
        if choice not in ("1", "2", "3", "4"):
            raise cli.SotaError(f"{choice!r} is not on the menu")
        what = f"text to train on [{options.data}]: " if choice != "4" else "folder of the run: "
        answer = input(what).strip()
    except EOFError:  # Ctrl-D
        raise KeyboardInterrupt from None
    if choice == "4":
        return dataclasses.replace(options, resume=Path(named(answer)))
    text = named(answer) if answer else options.data
    return dataclasses.replace(
        options, data=text, quick=choice == "1", full=choice == "2", large=choice == "3"
    )


def named(answer: str) -> str:
    """The path of an answer; a file dragged onto the terminal arrives quoted for a shell."""
    path = Path(answer)
    with contextlib.suppress(ValueError, RuntimeError):  # unmatched quote; ~ of an unknown user
        path = path.expanduser()
        words = shlex.split(answer)
        if not path.exists() and len(words) == 1:
            path = Path(words[0]).expanduser()
    return str(path)


def prepared(data: str) -> Path:
    """The prepared folder of `data`, made now if missing; a taken name gets a number."""
    if (Path(data) / "manifest.json").is_file():
        return Path(data)
    name = "python" if data == "python:" else Path(data).resolve().stem.partition(".")[0]
    name = name.strip("*") or "text"
    folders = (Path("data") / f"{name}{f'-{number}' * (number > 1)}" for number in count(1))
    folder = next(path for path in folders if not path.exists() or prepared_from(path, data))
    if data == "python:" and folder.exists():
        return folder  # installed packages may have changed since; the run's data must not
    from sota_transformer.data.prepare import prepare

    try:
        prepare(verbs.Prepare(inputs=(data,), out=folder))
    except cli.SotaError as error:
        if error.code != LOCKED or not folder.exists():
            raise
        raise cli.SotaError(
            f"{data} has changed since {folder} was prepared from it: --data {folder} continues "
            f"with the old text; to start over, move {folder} away and give another --out",
            LOCKED,
        ) from error
    return folder


def prepared_from(folder: Path, data: str) -> bool:
    """Whether a folder was prepared from exactly this input. SotaError 65 if it is damaged."""
    from sota_transformer.data.shards import load_manifest

    if not (folder / "manifest.json").exists():
        return False
    inputs = load_manifest(folder)["inputs"]
    return [Path(part["input"]).resolve() for part in inputs] == [Path(data).resolve()]


def configure(options: Options, data: Path) -> config.RunConfig:
    """The run these options ask for; a quick one is fitted to this machine at its first start."""
    name = "16m" if options.quick else "125m" if options.full else "250m"
    kind, usual = ("quick", "fast") if options.quick else (name, "seed")
    recipe = options.recipe or usual
    kind += f"-{recipe}" * (recipe != usual)
    out = options.out or Path("runs") / f"{kind}-{data.name}"
    flags = ["--data", str(data), "--out", str(out), "--device", options.device]
    resolved = cli.resolve([name, "--recipe", recipe, *flags], "train")
    if (out / "config.json").exists():
        kept = resumed(out, options, data)
        if kept.model.d_model != resolved.model.d_model:
            held = f"{out} holds a model of {kept.model.parameter_count:,} parameters, not {name}"
            raise cli.SotaError(f"{held}; resume it with --resume {out}, or give another --out")
        print(f"{out} exists: resuming it (remove the folder to start over)")
        return kept
    from sota_transformer import plan
    from sota_transformer.training.checkpoint import locked
    from sota_transformer.training.start import check_folders, check_room

    if options.quick:
        model = dataclasses.replace(resolved.model, seq_len=QUICK_SEQ_LEN)
        train = dataclasses.replace(resolved.train, eval_tokens=QUICK_EVAL_TOKENS)
        resolved = dataclasses.replace(resolved, model=model, train=train)
    check_folders(resolved)  # fail now rather than after minutes of measuring
    with locked(resolved.run.out):
        check_room(resolved)
    print("measuring this machine", flush=True)
    if not options.quick:
        for line in plan.estimates(resolved, plan.measure(resolved), plan.training_tokens(data)):
            print(line)
        return resolved
    return plan.fit_budget(resolved, (options.minutes or QUICK_MINUTES) * 60)


def resumed(folder: Path, options: Options, data: Path | None) -> config.RunConfig:
    """The run in `folder` with its own configuration, but this data and device if given.

    SotaError 2 for another recipe. --minutes has no effect: it only shapes a new run.
    """
    from sota_transformer.training.runlog import read_config

    kept = read_config(folder)
    recipe = recipe_of(kept)
    if options.recipe not in (None, recipe):
        over = "" if options.resume else ", or give another --out to start over"
        raise cli.SotaError(
            f"{folder} was started with --recipe {recipe}, not {options.recipe}; leave out "
            f"--recipe{over}"
        )
    if options.minutes is not None:
        print(f"--minutes is ignored: {folder} keeps the steps and batch size it was started with")
    device = kept.run.device if options.device == "auto" else options.device
    run = dataclasses.replace(kept.run, out=folder, resume="auto", device=device)
    path = dataclasses.replace(kept.data, path=data or kept.data.path)
    return dataclasses.replace(kept, data=path, run=run)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
