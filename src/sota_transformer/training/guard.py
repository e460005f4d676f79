"""Divergence: which updates to skip, and when to roll back.

A step is bad if its loss or gradient is not finite or was not computed, or if its loss is far above
those before it. A bad step's update is skipped. After `PATIENCE` bad steps in a row the run rolls
back to its last checkpoint from before them, skips the data that caused them and halves the
learning rate; after `RETURNS` rollbacks it gives up. This state is part of the checkpoint, so a
resumed run decides the same.
"""

import math
import statistics
from typing import Any

PATIENCE = 10  # bad steps in a row before a rollback
RETURNS = 3  # rollbacks before giving up
_WINDOW = 128  # losses remembered
_KNOWN = 32  # losses to have seen before one can be an outlier
_DEVIATIONS = 8.0  # of the window's median absolute deviation; llm.c and OLMo use 4 to 6 sigma
_LEAST = 1.0  # nats; a smaller rise may be a batch of hard text


class Guard:
    """Detects bad steps; `shift` rows of data were skipped, `rate` scales the learning rate."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.bad_in_a_row = 0
        self.skipped = 0
        self.returns = 0
        self.shift = 0
        self.rate = 1.0

    def problem(self, loss: float, norm: float, stale: bool = False) -> str | None:
        """What is wrong with a step of this mean loss (nats) and gradient norm, or None.

        `stale`: they are not this step's.
        """
        found = None
        if stale:
            found = "the device did not compute this step"
        elif not math.isfinite(loss) or not math.isfinite(norm):
            found = "loss or gradient is not finite"
        elif len(self.losses) >= _KNOWN:
            middle = statistics.median(self.losses)
            spread = statistics.median(abs(value - middle) for value in self.losses)
            if loss > middle + max(_LEAST, _DEVIATIONS * spread):
                found = f"loss {loss:.2f} is far above the median of {middle:.2f}"
        if found is None:
            self.bad_in_a_row = 0
            self.losses = [*self.losses[1 - _WINDOW :], loss]
        else:
            self.bad_in_a_row += 1
            self.skipped += 1
        return found

    def go_back(self, rows: int) -> None:
        """Record a rollback, which skips `rows` more rows and halves the rate."""
        self.returns += 1
        self.shift += rows
        self.rate /= 2
        self.bad_in_a_row = 0
        self.losses = []

    def state(self) -> dict[str, Any]:
        """Everything, for trainer.json."""
        return dict(vars(self))

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. KeyError if something is missing."""
        vars(self).update({name: state[name] for name in vars(self)})
