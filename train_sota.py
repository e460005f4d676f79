#!/usr/bin/env python3
"""From text to a trained model and its first words, by a menu or by flags.

    python train_sota.py            asks: quick test, full training, 250M, resume
    python train_sota.py --quick    16M, 1,000 steps, in about five minutes on this machine
    python train_sota.py --full --data PATH

It checks the configuration, prepares the data where that is missing, says what it will do and how
long it will take, trains, evaluates and shows a sample. Started again, it goes on where it was.
"""

import contextlib
import dataclasses
import json
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
    print(f"sota: not installed here; {advice}", file=sys.stderr)
    raise SystemExit(2) from None

MENU = """What shall it be?
  1  quick test     16M parameters, 1,000 steps, about five minutes
  2  full training  125M parameters, 100,000 steps
  3  large          250M parameters, 100,000 steps
  4  resume a run"""
QUICK_SEQ_LEN = 256  # half the preset's: more windows, so finer steps, on a small machine
QUICK_EVAL_TOKENS = 1 << 15  # four times; twice as many took a slow machine over two minutes
QUICK_MINUTES = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to train."""

    quick: bool = False
    """16M parameters, 1,000 steps, fitted to --minutes."""
    full: bool = False
    """125M parameters, 100,000 steps."""
    large: bool = False
    """250M parameters, 100,000 steps."""
    resume: Path | None = None
    """Folder of a run to go on with."""
    data: str = "python:"
    """Text: a file, folder or glob, a prepared folder, or the Python source on this machine."""
    out: Path | None = None
    """Folder of the run; runs/NAME by default."""
    recipe: Literal["seed", "fast"] | None = None
    """How it learns: as the project's origin did, or, as the quick test does, faster."""
    minutes: float | None = None
    """Time budget of --quick, five by default; a run that goes on keeps its own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def main(arguments: list[str]) -> int:
    """The exit code of the command."""

    def work() -> int:
        with interruptible(signal.SIGTERM, signal.SIGHUP):  # until training takes them over
            return run(cli.parse(Options, "train_sota.py", arguments))

    return cli.guarded(work)


def run(options: Options) -> int:
    """Resolve what to do, then do it."""
    asked = [bool(x) for x in (options.quick, options.full, options.large, options.resume)]
    if sum(asked) > 1:
        raise cli.SotaError("give one of --quick, --full, --large and --resume RUN")
    if options.minutes is not None and not 0 < options.minutes < 1e6:
        raise cli.SotaError(f"--minutes {options.minutes} must be above 0 and finite")
    if not any(asked):
        options = ask(options)
    if options.minutes is not None and (options.full or options.large):
        raise cli.SotaError("--minutes is the budget of --quick; leave it out")
    if options.resume and options.out not in (None, options.resume):
        raise cli.SotaError(f"--resume {options.resume} goes on in that folder; leave --out out")
    if options.resume is None:
        return cli.train_and_show(configure(options, prepared(options.data)))
    given = options.data != Options.data  # the run's own data may have moved
    return cli.train_and_show(
        going_on(options.resume, options, prepared(options.data) if given else None)
    )


def ask(options: Options) -> Options:
    """The menu, where there is somebody to ask."""
    if not sys.stdin.isatty():
        raise cli.SotaError("nobody to ask here: give --quick, --full, --large or --resume RUN")
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
    """The path of an answer; a name that was dropped on the terminal comes as a shell's word."""
    path = Path(answer)
    with contextlib.suppress(ValueError, RuntimeError):  # a lone quote; ~ before nobody's name
        path = path.expanduser()
        words = shlex.split(answer)
        if not path.exists() and len(words) == 1:
            path = Path(words[0]).expanduser()
    return str(path)


def prepared(data: str) -> Path:
    """The prepared folder of `data`, made now if need be; a name that is taken gets a number."""
    if (Path(data) / "manifest.json").is_file():
        return Path(data)
    name = "python" if data == "python:" else Path(data).resolve().stem.partition(".")[0]
    name = name.strip("*") or "text"
    folders = (Path("data") / f"{name}{f'-{number}' * (number > 1)}" for number in count(1))
    folder = next(path for path in folders if not path.exists() or made_of(path, data))
    if data == "python:" and folder.exists():
        return folder  # what is installed here may have changed since; the run's data may not
    from sota_transformer.data.prepare import prepare

    try:
        prepare(verbs.Prepare(inputs=(data,), out=folder))
    except cli.SotaError as error:
        if error.code != LOCKED or not folder.exists():
            raise
        raise cli.SotaError(
            f"{data} is not what it was when {folder} was made of it: --data {folder} goes on with "
            f"what it was; to begin anew, move {folder} away and give another --out",
            LOCKED,
        ) from error
    return folder


def made_of(folder: Path, data: str) -> bool:
    """Whether a folder was prepared from this input alone."""
    try:
        inputs = json.loads((folder / "manifest.json").read_bytes())["inputs"]
        return [Path(part["input"]).resolve() for part in inputs] == [Path(data).resolve()]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def configure(options: Options, data: Path) -> config.RunConfig:
    """The run these options ask for; a quick one is fitted to this machine once, then kept."""
    name = "16m" if options.quick else "125m" if options.full else "250m"
    kind, usual = ("quick", "fast") if options.quick else (name, "seed")
    recipe = options.recipe or usual
    kind += f"-{recipe}" * (recipe != usual)
    out = options.out or Path("runs") / f"{kind}-{data.name}"
    flags = ["--data", str(data), "--out", str(out), "--device", options.device]
    resolved = cli.resolve([name, "--recipe", recipe, *flags], "train")
    if (out / "config.json").exists():
        kept = going_on(out, options, data)
        if kept.model.d_model != resolved.model.d_model:
            held = f"{out} holds a model of {kept.model.parameter_count:,} parameters, not {name}"
            raise cli.SotaError(f"{held}; --resume {out} goes on with it, or give another --out")
        print(f"{out} is there: going on with it (remove the folder to start anew)")
        return kept
    from sota_transformer import plan
    from sota_transformer.training.start import check_folders, check_room

    if options.quick:
        model = dataclasses.replace(resolved.model, seq_len=QUICK_SEQ_LEN)
        train = dataclasses.replace(resolved.train, eval_tokens=QUICK_EVAL_TOKENS)
        resolved = dataclasses.replace(resolved, model=model, train=train)
    check_folders(resolved)  # what cannot work is said before minutes go by
    check_room(resolved)
    print("measuring this machine", flush=True)
    if not options.quick:
        for line in plan.estimates(resolved, plan.measure(resolved), plan.training_tokens(data)):
            print(line)
        return resolved
    return plan.fit_budget(resolved, (options.minutes or QUICK_MINUTES) * 60)


def going_on(folder: Path, options: Options, data: Path | None) -> config.RunConfig:
    """The run in `folder` as it was begun, on this data and device if they are given.

    SotaError 2 for another recipe; a budget was used up when the run was fitted to it.
    """
    from sota_transformer.training.runlog import read_config

    kept = read_config(folder)
    recipe = recipe_of(kept)
    if options.recipe not in (None, recipe):
        raise cli.SotaError(
            f"{folder} was begun with --recipe {recipe}, not {options.recipe}; leave --recipe out, "
            "or give another --out to start anew"
        )
    if options.minutes is not None:
        print(f"--minutes is not used: {folder} goes on with the steps and batch it was begun with")
    device = kept.run.device if options.device == "auto" else options.device
    run = dataclasses.replace(kept.run, out=folder, resume="auto", device=device)
    path = dataclasses.replace(kept.data, path=data or kept.data.path)
    return dataclasses.replace(kept, data=path, run=run)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
