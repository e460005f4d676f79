"""From a configuration to a running trainer: folder, lock, checkpoint to resume, first lines."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from sota_transformer import __version__, durable, schedules
from sota_transformer.config import VOCAB, RunConfig
from sota_transformer.data.shards import check_windows
from sota_transformer.errors import LOCKED, NO_INPUT, SotaError
from sota_transformer.inference.perplexity import Perplexity
from sota_transformer.launcher import is_first_rank
from sota_transformer.runtime import Runtime
from sota_transformer.training import changes, checkpoint, ranks
from sota_transformer.training.micro_batch import micro_rows
from sota_transformer.training.runlog import RunLog, judged
from sota_transformer.training.trainer import Trainer
from sota_transformer.words import counted


def train(
    config: RunConfig, admit: Callable[[Path, Runtime], Runtime] | None = None
) -> Perplexity | None:
    """Start or resume the run that `config` describes; None if it was complete already.

    `admit` is called once, with the folder locked and before any computation, and may turn
    compilation off. Raises SotaError for what a user can fix, Stopped on a signal.
    """
    folder, first = check_folders(config), is_first_rank()
    changed: list[str] = []
    with ExitStack() as stack:
        if first:  # before anything slow, so that a second start fails at once
            stack.enter_context(checkpoint.locked(folder))
            check_room(config)
            changed = changes.of_configuration(folder, config)
        runtime = Runtime.detect(config.run, config.model.parameter_count)
        stack.callback(runtime.close)
        runtime.join()
        micro_rows(config, runtime)  # refuses before `admit` computes, and leaves its verdict
        log = RunLog(folder, config.train.steps, silent=runtime.rank != 0)
        start = -1
        if runtime.rank == 0:
            if admit is not None:
                runtime = admit(folder, runtime)
            start = _resume_step(config, log.say)
        runtime, start = _as_the_first(runtime, start)
        trainer = Trainer(config, runtime, log)
        ranks.agree(config, runtime, trainer.windows.fingerprint)
        verified = not config.run.resume.startswith("step:")  # the first rank found the newest
        state = ranks.load(runtime, folder, start, verified=verified) if start >= 0 else None
        if first:  # another machine needs no folder
            announce(trainer, state)
        if state is not None:
            changed += changes.of_rate(folder, config, start) if changed else []
            changed += changes.of_data(config, state, trainer)
        done = start >= config.train.steps and checkpoint.steps(folder)[-1:] == [start]
        # A signal may have come before the last validation or sample.
        if any(runtime.of_first(done and all(judged(folder, start)))):
            steps = counted(config.train.steps, "step")
            log.say(f"{folder} is complete: {start:,} of {steps}; nothing to do")
            return None
        differing = changes.of_numerics(state, trainer) if state is not None else []
        if config.run.exact and (found := changed + differing):
            raise SotaError(f"--exact: {'; '.join(found)}. Restore the old values, or drop --exact")
        stack.enter_context(log)  # only now: a refused start creates no metrics.jsonl
        if state is not None:  # before config.json records this start
            trainer.restore(state)
        del state  # else its weights would stay in memory beside the model's
        if runtime.rank == 0:
            _record(trainer, start, changed)
        for line in changed:
            log.say(f"changed: {line}")
        if differing:
            log.say(f"not bit-exact with the run so far: {'; '.join(differing)}")
        begun = f"resuming from step {start}" if start >= 0 else "starting from scratch"
        log.event({"step": max(0, start), "event": "start"}, begun)
        log.begin_live(max(0, start))
        _stay_awake()
        return trainer.fit()


def _as_the_first(runtime: Runtime, start: int) -> tuple[Runtime, int]:
    """Whether to compile and the step to resume from, as the first rank has chosen."""
    start, compiled = runtime.of_first(start, int(runtime.compile))
    if runtime.compile and not compiled:
        runtime = runtime.without_compiling("in the first process")
    return runtime, start


def check_folders(config: RunConfig) -> Path:
    """The run's folder, not created yet. SotaError for what cannot work."""
    if config.data.path == Path():
        raise SotaError("no training data: give --data FOLDER (made by `sota prepare`)")
    if config.run.out == Path():
        raise SotaError("no folder for the run: give --out FOLDER")
    folder = config.run.out
    if config.model.vocab_size < VOCAB:
        raise SotaError(
            f"model.vocab_size {config.model.vocab_size} is less than the {VOCAB} ids of prepared "
            "data; leave the option out"
        )
    if (folder / durable.MANIFEST).exists():  # the files of a run would mix with these
        raise SotaError(
            f"{folder} holds prepared data, an exported model or a checkpoint; choose another "
            "--out",
            LOCKED,
        )
    wanted = config.run.resume not in ("auto", "never")
    if wanted and is_first_rank() and not checkpoint.steps(folder):
        raise SotaError(f"{folder} has no checkpoint to resume from", NO_INPUT)
    if not checkpoint.is_utf8(folder):
        name = folder.absolute()
        raise SotaError(f"{name} is not UTF-8, which safetensors requires; give another --out")
    if not checkpoint.steps(folder):  # else the data was checked at its start; hashing takes time
        check_windows(config.data.path, config.model.seq_len)
    return folder


def check_room(config: RunConfig) -> None:
    """SotaError 74 if a checkpoint would not fit on the disk."""
    if checkpoint.steps(config.run.out)[-1:] != [config.train.steps]:
        checkpoint.check_room(config.run.out, config.state_bytes)


def _resume_step(config: RunConfig, say: Callable[[str], None]) -> int:
    """The step to resume from, or -1 to start from scratch."""
    folder, wanted = config.run.out, config.run.resume
    if wanted.startswith("step:"):
        return int(wanted.removeprefix("step:"))
    if wanted == "never":
        if checkpoint.steps(folder):
            raise SotaError(f"{folder} has checkpoints; --resume never needs another --out")
        return -1
    found = checkpoint.latest(folder, say)  # --resume latest: `check_folders` has seen one
    return -1 if found is None else found


def announce(trainer: Trainer, state: checkpoint.State | None) -> None:
    """Print every derived number, before anything slow, of a run that resumes from `state`."""
    config, runtime, log = trainer.config, trainer.runtime, trainer.log
    done, learned = (state.step, state.trainer.get("tokens", 0)) if state else (0, 0)
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
    apart = config.data.document_mask or config.data.windows == "best-fit"
    if apart and not trainer.windows.documents:  # an index beside the ids is not consulted
        log.say(
            "note: no end-of-text token in the training ids, so they count as one document; other "
            "programs add it only if asked to (Megatron: --append-eod)"
        )
    log.say(
        f"machine: {'; '.join(runtime.reasons)}; {counted(runtime.threads, 'thread')}; "
        f"{runtime.world} process{'es' * (runtime.world > 1)}; micro-batch {trainer.micro_rows} x "
        f"{config.model.seq_len}, accumulated {rounds}x"
    )
    if repeated := schedules.repetition(config, there, total):
        log.say(f"note: {total / there:.1f} epochs over the data; {repeated}")
    folder = config.run.out
    free = checkpoint.free_bytes(folder)
    more = config.train.most_checkpoints - len(checkpoint.steps(folder))
    if free < (needed := more * config.state_bytes):
        log.say(
            f"note: checkpoints in {folder} may need {needed / 1e9:.2f} GB more, and "
            f"{free / 1e9:.2f} GB are free; the run stops when one does not fit"
        )


def _windows(trainer: Trainer) -> str:
    """How the text is cut into windows, and what a token attends to."""
    data = trainer.config.data
    cut = f"windows: {len(trainer.windows):,} cut from the token stream"
    if data.windows == "best-fit":
        cut = (
            f"windows: {len(trainer.windows):,} packed by best fit, {trainer.windows.padding:.1%} "
            "padding, which no loss counts; validation windows are cut from the token stream"
        )
    if data.document_mask:
        return f"{cut}; attention stays within a document, in training and validation"
    return f"{cut}; attention crosses documents"


def _record(trainer: Trainer, start: int, changed: list[str]) -> None:
    """Write run.json, the run's provenance with an entry for each start, then config.json.

    In this order, so that every change in config.json has been recorded.
    """
    config, folder = trainer.config, trainer.config.run.out
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
        attempts = list(record["attempts"])
        durable.canonical_json(attempts)  # raises if it cannot be written again
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
    durable.write_file(path, durable.canonical_json(record))
    durable.write_file(folder / "config.json", kept.to_json().encode())


def _stay_awake() -> None:
    """Keep an idle Mac from sleeping while this process runs."""
    if sys.platform == "darwin" and (caffeinate := shutil.which("caffeinate")):
        nothing = subprocess.DEVNULL
        command = [caffeinate, "-i", "-s", "-w", str(os.getpid())]
        with suppress(OSError):
            subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)


def _git() -> str | None:
    """The commit of the source tree, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
