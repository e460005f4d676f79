"""What changes over a run, as pure functions of the step.

`step` counts optimizer steps completed, so the first update is made at step 0.
"""

import math

from sota_transformer.config import RunConfig
from sota_transformer.words import counted

FRESH_EPOCHS = 4  # Muennighoff et al. 2023: up to here repeated text is worth about as much as new
_WARMUP_SHARE = 0.05  # the origin's 4,000 steps are 4% of its 100,000; short runs keep about that


def warmup_steps(config: RunConfig) -> int:
    """Warm-up of this run: as configured, but never more than 5% of its steps."""
    return min(config.optim.warmup_steps, int(config.train.steps * _WARMUP_SHARE))


def learning_rate(step: int, config: RunConfig) -> float:
    """Rate of AdamW's update at `step`: linear warm-up that starts above zero, then the decay.

    The decay is a cosine or, with a cooldown, a straight line over the last part of the run.
    """
    optim, warmup, steps = config.optim, warmup_steps(config), config.train.steps
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    if optim.cooldown:
        high = min(1.0, (steps - step) / (optim.cooldown * steps))
    else:
        progress = (step - warmup) / max(1, steps - warmup)
        high = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.learning_rate * (optim.final_fraction + (1 - optim.final_fraction) * high)


def dropout(step: int, config: RunConfig) -> float:
    """Dropout rate of the forward passes at `step`: linear from start to end."""
    optim = config.optim
    progress = min(1.0, step / max(1, config.train.steps - 1))
    return optim.dropout_start + (optim.dropout_end - optim.dropout_start) * progress


def rows(step: int, config: RunConfig) -> range:
    """Global rows (windows in training order) that `step` consumes."""
    size = config.train.batch_rows
    return range(step * size, (step + 1) * size)


def step_tokens(config: RunConfig, padding: float) -> int:
    """Tokens that a step learns from, on the average where this share of its targets is padding."""
    return round(config.train.batch_rows * config.model.seq_len * (1 - padding))


def describe(config: RunConfig, padding: float = 0, done: int = 0, learned: int = 0) -> list[str]:
    """The run in words, of which `done` steps have learned from so many tokens.

    Those may have been of another batch or window, or without an update.
    """
    steps, tokens = config.train.steps, step_tokens(config, padding)
    total = learned + max(0, steps - done) * tokens
    work = f"{counted(steps, 'step')} x {tokens:,} tokens ="
    if learned != done * tokens:
        rest = f" {done:,} with {learned:,} tokens and {steps - done:,} x {tokens:,} ="
        work = f"{counted(steps, 'step')},{rest * (done < steps)}"
    warmup, asked = warmup_steps(config), config.optim.warmup_steps
    shortened = f" (5% of the run; {asked} in long runs)" if warmup < asked else ""
    optim = config.optim
    decay = f"linear over the last {optim.cooldown:.0%}" if optim.cooldown else "cosine"
    muon = f", NorMuon {optim.matrix_rate:g} on the blocks' matrices" if optim.matrix_rate else ""
    return [
        f"model: {config.model.parameter_count:,} parameters, context {config.model.seq_len}",
        f"run: {work} {total:,} tokens, {total / config.model.parameter_count:.1f} per parameter",
        f"schedule: peak {optim.learning_rate:g}{muon}, {counted(warmup, 'step')} of "
        f"warm-up{shortened}, {decay} to {optim.final_fraction:.0%}; "
        f"dropout {optim.dropout_start:g} -> {optim.dropout_end:g}; "
        f"label smoothing {optim.label_smoothing:g} (reported losses are without it)",
    ]
