"""Imported into the zygote of `windows.py`: records what a run's model is given.

Each pass is appended to the file `watched` in the command's working directory: a number (0 and 1
for inputs in training and validation, 2 and 3 for the targets there), then the ids, then, for
inputs, the mask.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sota_transformer.inference import perplexity
from sota_transformer.model.transformer import Transformer
from sota_transformer.training import trainer


def _note(kind: int, *values: torch.Tensor | None) -> None:
    with Path("watched").open("ab") as file:
        np.save(file, np.array(kind))
        for value in values:
            np.save(file, np.zeros(0) if value is None else value.detach().cpu().numpy())


_forward, _fit = Transformer.forward, trainer.Trainer.fit
_losses = {2: trainer.token_loss, 3: perplexity.token_loss}
_fitting = False


def _watch_forward(self: Any, tokens: Any, dropout: Any = None, cache: Any = None,
                   mask: Any = None, positions: Any = None) -> Any:  # fmt: skip
    if _fitting and cache is None:
        _note(0 if self.training else 1, tokens, mask)
    return _forward(self, tokens, dropout, cache, mask, positions)


def _watch_loss(kind: int) -> Any:
    def loss(hidden: Any, head: Any, targets: Any, *more: Any, **named: Any) -> Any:
        if _fitting:
            _note(kind, targets)
        return _losses[kind](hidden, head, targets, *more, **named)

    return loss


def _watch_fit(self: Any) -> Any:
    global _fitting
    _fitting = True
    return _fit(self)


Transformer.forward = _watch_forward  # type: ignore[method-assign]
trainer.Trainer.fit = _watch_fit  # type: ignore[method-assign]
trainer.token_loss, perplexity.token_loss = _watch_loss(2), _watch_loss(3)
