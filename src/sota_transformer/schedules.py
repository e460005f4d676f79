"""What changes over a run, as pure functions of the step.

`step` counts completed optimizer steps, so the first update happens at step 0.
"""

import math

from sota_transformer.config import RunConfig
from sota_transformer.words import counted, two_digits

FRESH_EPOCHS = 4  # Muennighoff et al. 2023: up to here repeated text is about as good as new
# NorMuon memorizes a small text sooner: tokens per parameter, and the useful epochs below that.
_SMALL = ((1 / 60, 1), (1 / 10, 2))  # docs/results.md
_WARMUP_SHARE = 0.05  # the original's 4,000 of 100,000 steps are 4%; short runs stay close to that


def warmup_steps(config: RunConfig) -> int:
    """Warm-up steps of this run: as configured, but at most 5% of its steps."""
    return min(config.optim.warmup_steps, int(config.train.steps * _WARMUP_SHARE))


def learning_rate(step: int, config: RunConfig) -> float:
    """AdamW's learning rate at `step`: a linear warm-up that starts above zero, then decay.

    The decay is a cosine or, with a cooldown, linear over the last part of the run.
    """
    optim, warmup, steps = config.optim, warmup_steps(config), config.train.steps
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    step = min(step, steps)  # past the end of a run that has been shortened
    if optim.cooldown:
        high = min(1.0, (steps - step) / (optim.cooldown * steps))
    else:
        progress = (step - warmup) / (steps - warmup)
        high = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.learning_rate * (optim.final_fraction + (1 - optim.final_fraction) * high)


def dropout(step: int, config: RunConfig) -> float:
    """Dropout rate at `step`: linear from start to end."""
    optim = config.optim
    progress = step / max(1, config.train.steps - 1)
    return optim.dropout_start + (optim.dropout_end - optim.dropout_start) * progress


def useful_epochs(config: RunConfig, there: int) -> int:
    """How many times a text of `there` tokens can be read before repeats do harm."""
    size = there / config.model.parameter_count if config.optim.matrix_rate else math.inf
    return next((epochs for limit, epochs in _SMALL if size < limit), FRESH_EPOCHS)


def repetition(config: RunConfig, there: int, total: int) -> str:
    """What to do if a run of `total` tokens reads `there` tokens too often; "" if it does not."""
    epochs = useful_epochs(config, there)
    if total <= epochs * there:
        return ""
    tokens = step_tokens(config, 0)
    steps, every = max(1, epochs * there // tokens), max(1, there // tokens)
    if epochs == FRESH_EPOCHS:
        return f"beyond {epochs} epochs the model overfits: add text or use --steps {steps}"
    return (
        f"this recipe soon memorizes so little text: add text, use --steps {steps} "
        f"({counted(epochs, 'epoch')}), or keep the best checkpoint by validating in every epoch "
        f"(--train.eval-every {every})"
    )


def step_tokens(config: RunConfig, padding: float) -> int:
    """Tokens that a step trains on; an average if `padding`, a share of its targets, is not 0."""
    return round(config.train.batch_rows * config.model.seq_len * (1 - padding))


def describe(config: RunConfig, padding: float = 0, done: int = 0, learned: int = 0) -> list[str]:
    """Summary lines of a run whose first `done` steps were trained on `learned` tokens.

    Those steps may have had another batch or window size, or skipped updates.
    """
    steps, tokens = config.train.steps, step_tokens(config, padding)
    total = learned + max(0, steps - done) * tokens
    work = f"{counted(steps, 'step')} x {tokens:,} tokens ="
    if learned != done * tokens:
        rest = f" {done:,} with {learned:,} tokens and {steps - done:,} x {tokens:,} ="
        work = f"{counted(steps, 'step')},{rest * (done < steps)}"
    warmup, asked = warmup_steps(config), config.optim.warmup_steps
    shortened = f" (capped at 5% of the run; {asked} configured)" if warmup < asked else ""
    optim = config.optim
    decay = "cosine decay"
    if optim.cooldown:
        decay = f"linear decay over the last {optim.cooldown:.0%}"
    muon = f", NorMuon {optim.matrix_rate:g} on the blocks' matrices" if optim.matrix_rate else ""
    parameters = config.model.parameter_count
    return [
        f"model: {parameters:,} parameters, context {config.model.seq_len}",
        f"run: {work} {total:,} tokens, {two_digits(total / parameters)} per parameter",
        f"schedule: peak learning rate {optim.learning_rate:g}{muon}, "
        f"{counted(warmup, 'warm-up step')}{shortened}, {decay} to "
        f"{optim.final_fraction:.0%}; dropout {optim.dropout_start:g} -> {optim.dropout_end:g}; "
        f"label smoothing {optim.label_smoothing:g} (reported losses exclude it)",
    ]
