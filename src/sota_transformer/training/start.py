"""From a configuration to a running trainer: the folder, its lock, what to resume, what to say."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sota_transformer import __version__, durable, schedules
from sota_transformer.config import VOCAB, RunConfig
from sota_transformer.data.shards import TokenWindows
from sota_transformer.errors import LOCKED, NO_INPUT, TEMPORARY, SotaError
from sota_transformer.inference.perplexity import Perplexity
from sota_transformer.runtime import Runtime, is_first_rank, out_of_memory, stay_awake
from sota_transformer.training import changes, checkpoint
from sota_transformer.training.runlog import RunLog, judged
from sota_transformer.training.trainer import Trainer
from sota_transformer.words import counted


def train(
    config: RunConfig, admit: Callable[[Path, Runtime], Runtime] | None = None
) -> Perplexity | None:
    """Train, or go on training, the run that `config` describes; None if it was complete already.

    `admit` is asked once, with the folder locked, before anything is computed, and may say not to
    compile. Raises SotaError for what a user can mend, Stopped on a signal.
    """
    folder = check_folders(config)
    changed: list[str] = []
    with ExitStack() as stack:
        if is_first_rank():  # before anything slow: who comes second shall know at once
            stack.enter_context(durable.DirectoryLock(folder))
            durable.sweep(folder)
            durable.sweep(folder / "checkpoints")
            check_room(config)
            changed = changes.of_configuration(folder, config)
        runtime = Runtime.detect(config.run, config.model.parameter_count)
        stack.callback(runtime.close)
        log = RunLog(folder, config.train.steps, silent=runtime.rank != 0)
        start = -1
        if runtime.rank == 0:
            if admit is not None:
                runtime = admit(folder, runtime)
            start = _resume_step(config, log.say)
        runtime, start = _as_the_first(runtime, start)
        verified = not config.run.resume.startswith("step:")  # by the first rank, as the newest
        state = checkpoint.load(folder, start, verified=verified) if start >= 0 else None
        trainer = Trainer(config, runtime, stack.enter_context(log))
        announce(trainer, state)
        if state is not None:
            changed += changes.of_rate(folder, config, start) if changed else []
            changed += changes.of_data(config, state, trainer)
        if start >= config.train.steps and _finished(folder, start, verified):
            steps = counted(config.train.steps, "step")
            log.say(f"{folder} is complete: {start:,} of {steps}; nothing to do")
            return None
        differing = changes.of_numerics(state, trainer) if state is not None else []
        if config.run.exact and (found := changed + differing):
            raise SotaError(f"--exact: {'; '.join(found)}. Go on as before, or without --exact")
        if state is not None:  # before config.json says that it was taken
            trainer.restore(state)
        del state  # else its weights would lie beside the model's to the end
        if runtime.rank == 0:
            _record(trainer, start, changed)
        for line in changed:
            log.say(f"changed: {line}")
        if differing:
            log.say(f"not bit-exact with before: {'; '.join(differing)}")
        begun = f"resuming from step {start}" if start >= 0 else "starting anew"
        log.event({"step": max(0, start), "event": "start"}, begun)
        log.begin_live(max(0, start))
        stay_awake()
        return _fit(trainer)


def _fit(trainer: Trainer) -> Perplexity:
    """Train to the end. SotaError 75 where not even small micro-batches fit into the memory."""
    try:
        return trainer.fit()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise SotaError(
            f"out of memory on {trainer.runtime.device}; what was saved is good. Smaller "
            "--train.micro-rows, --train.gradient-checkpointing or a smaller preset may fit",
            TEMPORARY,
        ) from error


def _as_the_first(runtime: Runtime, start: int) -> tuple[Runtime, int]:
    """Whether to compile and from which step on, as the first rank has chosen."""
    start, compiled = runtime.of_first(start, int(runtime.compile))
    if runtime.compile and not compiled:
        runtime = runtime.without_compiling("in the first process")
    return runtime, start


def _finished(folder: Path, step: int, newest: bool) -> bool:
    """Whether the run ends here, judged and with a sample; a signal may have come amid it.

    Where it is not known as the `newest`, that is looked up, at the cost of reading a checkpoint.
    """
    if not newest and checkpoint.latest(folder, lambda _: None) != step:
        return False
    return all(judged(folder, step))


def check_folders(config: RunConfig) -> Path:
    """The run's folder, made where it is missing, and not before all else is known to be fit.
    SotaError for what cannot work.
    """
    if config.data.path == Path():
        raise SotaError("say what to train on: --data FOLDER (made by `sota prepare`)")
    if config.run.out == Path():
        raise SotaError("say where the run shall live: --out FOLDER")
    folder = config.run.out
    if config.model.vocab_size < VOCAB:
        raise SotaError(
            f"model.vocab_size {config.model.vocab_size} is less than the {VOCAB} ids of prepared "
            "data; leave it out"
        )
    if (folder / durable.MANIFEST).exists():  # the files of a run would mix with these
        raise SotaError(
            f"{folder} holds prepared data, an exported model or a checkpoint; choose another "
            "--out",
            LOCKED,
        )
    if config.run.resume not in ("auto", "never") and not checkpoint.steps(folder):
        raise SotaError(f"{folder} has no checkpoint to resume from", NO_INPUT)
    if not checkpoint.is_utf8(folder):
        name = folder.absolute()
        raise SotaError(f"{name} is not UTF-8, as safetensors needs it; give another --out")
    if not checkpoint.steps(folder):  # else it began with them, and may not wait for their hashes
        for split in ("train", "val"):
            TokenWindows(config.data.path, split, config.model.seq_len)
    try:
        durable.make_folder(folder)
    except OSError as error:
        raise SotaError(
            f"cannot make {folder}: {error.strerror}; choose another --out", LOCKED
        ) from error
    return folder


def check_room(config: RunConfig) -> None:
    """SotaError 74 where what is learned could not be saved."""
    if checkpoint.steps(config.run.out)[-1:] != [config.train.steps]:
        checkpoint.check_room(config.run.out, config.state_bytes)


def _resume_step(config: RunConfig, say: Callable[[str], None]) -> int:
    """The step to go on from, or -1 to start anew."""
    folder, wanted = config.run.out, config.run.resume
    if wanted.startswith("step:"):
        return int(wanted.removeprefix("step:"))
    if wanted == "never":
        if checkpoint.steps(folder):
            raise SotaError(f"{folder} holds checkpoints; with --resume never give another --out")
        return -1
    found = checkpoint.latest(folder, say)  # for `latest` there is one: see `check_folders`
    return -1 if found is None else found


def announce(trainer: Trainer, state: checkpoint.State | None) -> None:
    """Every derived number, before anything takes time, of a run that goes on from `state`."""
    config, runtime, log = trainer.config, trainer.runtime, trainer.log
    done, learned = (state.step, trainer.learned(state)) if state is not None else (0, 0)
    total = learned + trainer.step_tokens * max(0, config.train.steps - done)
    there = trainer.windows.tokens
    for line in schedules.describe(config, trainer.windows.padding, done, learned):
        log.say(line)
    rounds = config.train.batch_rows // (trainer.micro_rows * runtime.world)
    log.say(
        f"data: {config.data.path}, {there:,} training tokens, {total / there:.2f} epochs; "
        f"{trainer.judge.windows.tokens:,} validation tokens"
    )
    log.say(_windows(trainer))
    log.say(
        f"machine: {'; '.join(runtime.reasons)}; {counted(runtime.threads, 'thread')}; "
        f"{runtime.world} process{'es' * (runtime.world > 1)}; micro-batch {trainer.micro_rows} x "
        f"{config.model.seq_len}, accumulated {rounds}x"
    )
    if total > schedules.FRESH_EPOCHS * there:
        log.say(
            f"note: the data is read {total / there:.0f} times; past four epochs it over-fits: "
            "more text or fewer --steps would serve better"
        )
    folder, free = config.run.out, shutil.disk_usage(config.run.out).free
    more = config.train.most_checkpoints - len(checkpoint.steps(folder))
    if free < (needed := more * config.state_bytes):
        log.say(
            f"note: {folder} may come to take {needed / 1e9:.2f} GB more, of which "
            f"{free / 1e9:.2f} GB are free; the run ends when a checkpoint finds no room"
        )


def _windows(trainer: Trainer) -> str:
    """How the text is cut, and how far a token sees."""
    data = trainer.config.data
    cut = f"windows: {len(trainer.windows):,} of the stream"
    if data.windows == "best-fit":
        cut = (
            f"windows: {len(trainer.windows):,} by best fit, {trainer.windows.padding:.1%} of "
            "their targets are padding, which no loss counts; validation keeps to the stream"
        )
    if data.document_mask:
        return f"{cut}; in training and validation a token sees its own document only"
    return f"{cut}; a token sees across documents"


def _record(trainer: Trainer, start: int, changed: list[str]) -> None:
    """run.json, where this run came from, with an entry for each start; then config.json.

    In this order, so that a change that is in config.json was recorded.
    """
    config, folder = trainer.config, trainer.config.run.out
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
        attempts = list(record["attempts"])
        durable.canonical_json(attempts)  # it may be written again
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        attempts = []
    attempts.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "from_step": max(0, start),
            "changed": changed,
            "command": shlex.join(sys.argv),
            "version": __version__,
            "git": _git(),
            "machine": trainer.runtime.describe(),
            "reasons": trainer.runtime.reasons,
        }
    )
    record = {
        "data": trainer.windows.fingerprint,
        "padding": trainer.windows.padding,
        "parameters": config.model.parameter_count,
        "attempts": attempts,
    }
    ordinary = dataclasses.replace(
        config.run, resume="auto", exact=False, override="", data_change="refuse"
    )
    kept = dataclasses.replace(config, run=ordinary)
    try:
        durable.write_file(path, durable.canonical_json(record))
        durable.write_file(folder / "config.json", kept.to_json().encode())
    except PermissionError as error:
        raise SotaError(f"cannot write to {folder}: {error.strerror}", LOCKED) from error


def _git() -> str | None:
    """The commit of the source tree, where this is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
