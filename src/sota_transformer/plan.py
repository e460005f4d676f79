"""The plan before a run: its time, memory, disk and expected loss.

Speed and memory are measured on this machine with the real training step. The expected loss comes
from a published scaling law and says so; outside the range the law was fitted on there is none.
"""

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sota_transformer.config import RunConfig
from sota_transformer.errors import TEMPORARY, SotaError
from sota_transformer.presets import PRESETS, command, recipe_of
from sota_transformer.schedules import (
    FRESH_EPOCHS,
    describe,
    repetition,
    step_tokens,
    useful_epochs,
)
from sota_transformer.words import counted, two_digits

if TYPE_CHECKING:
    from sota_transformer.runtime import Runtime

# Hoffmann et al. 2022, table A.3, approach 3, in nats per token of their data and tokenizer. Their
# smallest runs saw about one token per parameter; the law was not fitted below that.
_E, _A, _B, _ALPHA, _BETA = 1.69, 406.4, 410.7, 0.34, 0.28
_LAW_ERROR = 0.3  # nats: other text, another tokenizer, another recipe
_BALANCED = 20  # tokens per parameter (Hoffmann et al. 2022)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A measured training step."""

    seconds: float
    tokens: int
    """Tokens with a loss: padding is not counted."""
    memory: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained per second."""
        return self.tokens / self.seconds


def run_plan(config: RunConfig, preset: str, hours: float) -> int:
    """Print the plan of one run and, with `hours`, the best preset and steps for that time."""
    there = training_tokens(config.data.path)
    if there:
        from sota_transformer.data.shards import check_windows

        check_windows(config.data.path, config.model.seq_len)
    for line in describe(config, padding(config)):
        print(line)
    speed = measure(config)
    for line in (*estimates(config, speed, there), memory_estimate(config)):
        print(line)
    if hours:
        print(f"in {hours:g} h on this machine:")
        for line in compare(config, preset, speed, hours, there):
            print(line)
    return 0


def run_config(config: RunConfig) -> int:
    """Print the resolved configuration and its derived numbers."""
    # The data may be missing here: this run may be meant for another machine.
    share = padding(config) if config.data.path.is_dir() else 0.0
    print(config.to_json(), end="")
    for line in (*describe(config, share), memory_estimate(config)):
        print(f"# {line}")
    return 0


def estimates(config: RunConfig, speed: Speed, there: int) -> Iterator[str]:
    """Time, memory, data and expected loss of a run at this speed on `there` training tokens."""
    steps, parameters = config.train.steps, config.model.parameter_count
    total, seconds = speed.tokens * steps, speed.seconds * steps
    yield (
        f"speed: {speed.tokens_per_second:,.0f} tokens/s, measured here over {speed.tokens:,} "
        f"tokens; peak memory {speed.memory / 1e9:.2f} GB"
    )
    yield f"time: {_span(seconds)} for {counted(steps, 'step')}, without validation and samples"
    if there:
        epochs = total / there
        over = repetition(config, there, total)
        read = f"data: {there:,} training tokens, read {epochs:.2f} times"
        yield f"{read}; {over}" if over else read
    keep = config.train.most_checkpoints
    yield f"disk: {keep * config.state_bytes / 1e9:.2f} GB for {keep} checkpoints"
    each = two_digits(total / parameters)
    yield f"balance: {each} tokens per parameter; about {_BALANCED} is balanced"
    yield expected(parameters, total, there)


def expected(parameters: int, tokens: int, there: int) -> str:
    """The loss that the law predicts, or why there is no prediction."""
    loss = _predicted(parameters, tokens, there)
    if loss is None:
        reason = "the scaling law was not fitted below one token per parameter"
        repeated = there and tokens > FRESH_EPOCHS * there
        more = f", and repeats past {FRESH_EPOCHS} epochs do not count" * bool(repeated)
        return f"expected loss: no prediction; {reason}{more}"
    return (
        f"expected loss: {loss:.2f} +- {_LAW_ERROR} nats on web text (Chinchilla's law, annealed, "
        f"without label smoothing), perplexity {math.exp(loss):.0f}"
    )


def _predicted(parameters: int, tokens: int, there: int) -> float | None:
    """Nats per token after `tokens` of data that has `there`; None where the law does not apply."""
    useful = min(tokens, FRESH_EPOCHS * there) if there else tokens
    return law(parameters, useful) if useful >= parameters else None


def law(parameters: int, tokens: int) -> float:
    """Nats per token after training on `tokens` fresh tokens."""
    return _E + _A / parameters**_ALPHA + _B / tokens**_BETA


def compare(
    config: RunConfig, preset: str, speed: Speed, hours: float, there: int
) -> Iterator[str]:
    """What each preset reaches in the time, and the command for the best one."""
    choices, recipe = [], recipe_of(config)
    for name in (name for name in PRESETS if name in (preset, "16m", "125m", "250m")):
        other = config
        if name != preset:
            other = dataclasses.replace(PRESETS[name](recipe), run=config.run, data=config.data)
        parameters, per_step = other.model.parameter_count, step_tokens(other, 0)
        work = parameters / config.model.parameter_count * per_step / speed.tokens
        if name != preset and speed.seconds * work > 3600 * hours:  # measuring would take longer
            yield f"  {name:>5}: one step takes about {_span(speed.seconds * work)}"
            continue
        try:
            taken = speed if name == preset else measure(other)
        except SotaError as error:
            yield f"  {name:>5}: {error}"
            continue
        steps = int(hours * 3600 / taken.seconds)
        epochs = useful_epochs(other, there)
        enough = max(1, epochs * there // taken.tokens) if there else steps
        limited = f" (all that {counted(epochs, 'epoch')} of the data allow)" * (enough < steps)
        steps = min(steps, enough)  # more would overfit, as `estimates` warns
        tokens = steps * taken.tokens
        loss = _predicted(parameters, tokens, there)
        if steps:
            # Below the law's range the smaller model wins: it reaches a token per parameter sooner.
            order = (math.inf if loss is None else loss, parameters)
            choices.append((order, name, steps, other))
        yield (
            f"  {name:>5}: {taken.tokens_per_second:,.0f} tokens/s, {counted(steps, 'step')} of "
            f"{other.train.batch_rows} x {other.model.seq_len}{limited}, "
            f"{two_digits(tokens / parameters)} tokens per parameter, "
            + ("too few tokens to predict" if loss is None else f"about {loss:.2f} nats")
        )
    if not choices:
        yield "  best: none; not even one step fits in the time"
        return
    _, name, steps, other = min(choices)
    default = dataclasses.replace(other.train, steps=PRESETS[name](recipe).train.steps)
    run = dataclasses.replace(other.run, out=Path())  # each preset has its own default folder
    words = command(name, dataclasses.replace(other, train=default, run=run))
    yield f"  best: {shlex.join([*words, '--steps', str(steps)])}"


def memory_estimate(config: RunConfig) -> str:
    """Memory of weights, gradients and moments; activations come on top."""
    state = config.state_bytes
    return (
        f"memory: {(state + 4 * config.model.parameter_count) / 1e9:.2f} GB for weights, gradients "
        "and moments in float32, plus the activations of a micro-batch; a checkpoint takes "
        f"{state / 1e9:.2f} GB"
    )


def training_tokens(data: Path) -> int:
    """Tokens in the training split of prepared data; 0 if no data is given."""
    if data == Path():
        return 0
    from sota_transformer.data.shards import load_manifest

    return load_manifest(data)["splits"]["train"]["tokens"]


def padding(config: RunConfig) -> float:
    """Share of the training targets that is padding with this run's windows."""
    if config.data.path == Path() or config.data.windows != "best-fit":
        return 0.0
    return _best_fit_padding(config.data.path, config.model.seq_len)


@cache
def _best_fit_padding(data: Path, seq_len: int) -> float:
    """The padding of best-fit windows; cached, since packing is slow and a plan asks repeatedly."""
    from sota_transformer.data.packing import BestFit

    return BestFit(data, "train", seq_len).padding


def _span(seconds: float) -> str:
    """A duration in a readable unit."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return counted(round(seconds), "second")


def measure(config: RunConfig) -> Speed:
    """Time one optimizer step of this run: one micro-batch is timed and scaled to the batch.

    SotaError 75 if it does not fit in memory.
    """
    from sota_transformer.runtime import Runtime, out_of_memory
    from sota_transformer.training.micro_batch import dividing, micro_rows

    runtime = Runtime.detect(config.run, config.model.parameter_count)
    # On a system that overcommits memory, trying would get this process killed.
    needed = config.state_bytes + 4 * config.model.parameter_count
    if needed > (free := runtime.available_memory()):
        raise SotaError(
            f"weights, gradients and moments take {needed / 1e9:.1f} GB, but only "
            f"{free / 1e9:.1f} GB are free; a smaller preset may fit",
            TEMPORARY,
        )
    rows = micro_rows(config, runtime)
    while True:
        try:
            seconds, update = step_seconds(config, runtime, rows)
            break
        except (RuntimeError, MemoryError) as error:  # as in training
            if not out_of_memory(error):
                raise
            rows = dividing(config.train.batch_rows, rows // 2)
            if not rows:
                text = f"not even one window of {config.model.seq_len} tokens fits in memory"
                raise SotaError(text, TEMPORARY) from error
    rounds = config.train.batch_rows // rows
    total = rounds * (seconds - update) + update
    tokens = step_tokens(config, padding(config))
    return Speed(seconds=total, tokens=tokens, memory=runtime.peak_memory())


def step_seconds(
    config: RunConfig, runtime: "Runtime", rows: int, steps: int = 3
) -> tuple[float, float]:
    """Seconds of a step of `rows` windows, and of its update alone; medians of `steps`."""
    from sota_transformer.runtime import out_of_memory

    try:
        return _step_seconds(config, runtime, rows, steps)
    except Exception as error:  # as in training
        if not runtime.compile or out_of_memory(error):
            raise
        plain = runtime.without_compiling(error)
        print(f"sota: {plain.reasons[-1]}", file=sys.stderr)
        return _step_seconds(config, plain, rows, steps)


def _step_seconds(
    config: RunConfig, runtime: "Runtime", rows: int, steps: int
) -> tuple[float, float]:
    import torch

    from sota_transformer.model.loss import token_loss
    from sota_transformer.model.optim import clip, gradient_norm, optimizers, update
    from sota_transformer.model.transformer import Dropout, Transformer, same_document

    device = runtime.device
    model = Transformer(config.model, runtime.dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    runtime.optimize(model, config.data.document_mask)
    both = optimizers(model, config.optim)
    tokens = torch.randint(config.model.vocab_size, (rows, config.model.seq_len + 1), device=device)
    keys = torch.arange(rows, dtype=torch.int32, device=device)
    dropout = Dropout(torch.tensor(0.1, device=device), keys) if config.optim.drops_out else None
    mask = same_document(torch.zeros_like(tokens[:, 1:])) if config.data.document_mask else None
    taken = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        hidden = model(tokens[:, :-1], dropout, mask=mask)
        sums = token_loss(
            hidden, model.embedding.weight, tokens[:, 1:], 0.1, compiled=runtime.compile
        )
        (sums.smoothed / sums.count).backward()
        del hidden, sums  # as in training: one left over would lie between the next step's tensors
        runtime.synchronize()
        between = time.perf_counter()
        clip(model, float(gradient_norm(model)), 1.0)
        update(both, config.optim.learning_rate)
        model.zero_grad(set_to_none=True)
        runtime.synchronize()
        ended = time.perf_counter()
        taken.append((ended - started, ended - between))
    return sorted(taken[1:])[steps // 2]


def fit_budget(config: RunConfig, seconds: float) -> RunConfig:
    """The run with the largest batch that lets all its steps finish in `seconds` on this machine.

    When only a few rows fit, one more would be a large jump, so longer rows use up the remaining
    time; when not even one fits, the row is shortened, to half at the least.
    """
    from sota_transformer.runtime import Runtime

    runtime = Runtime.detect(config.run, config.model.parameter_count)
    few, more = 4, 8  # windows; a micro-batch on a CPU is eight, so larger batches are multiples
    fast, fixed = step_seconds(config, runtime, few)
    per_row = (fast - fixed) / few
    if (seconds / config.train.steps - fixed) / per_row > few:  # else no second shape
        slow, _ = step_seconds(config, runtime, more)
        per_row = max((slow - fast) / (more - few), slow / more / 4)
        fixed = max(0.0, fast - few * per_row)
    fitting = (seconds / config.train.steps - fixed) / per_row
    if fitting < 0.5:
        least, steps = fixed + per_row / 2, counted(config.train.steps, "step")
        whole = _span(config.train.steps * least)
        print(f"{steps} of half a window take {whole} on this machine, not {_span(seconds)}")
    rows = max(1, int(fitting))
    rows -= rows % more if rows > more else 0
    seq_len = config.model.seq_len
    if rows < more:
        seq_len = max(seq_len // 2, int(fitting / rows * seq_len) // 64 * 64)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, seq_len=seq_len),
        train=dataclasses.replace(config.train, batch_rows=rows),
    )
