"""How often a step waits for its device, which costs a GPU time that it could compute in.

A wait is a number that Python reads from a tensor. On a CPU it costs nothing, but nearly all calls
are the same there once the head's loss takes the GPU code path. Waits of copies, and NorMuon's step
count, which is on the CPU, are not covered.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sota_transformer.config import RunConfig
from sota_transformer.model import loss
from sota_transformer.training import trainer
from sota_transformer.training.start import train


class Waits(TorchDispatchMode):
    """Counts the numbers that are read: `item`, `float`, `int` and `bool` of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_counter_counts() -> None:
    with Waits() as waits:
        assert torch.ones(()) and float(torch.ones(())) == torch.ones(()).item()
    assert waits.count == 3


@pytest.mark.parametrize("packed", [{}, {"windows": "best-fit", "document_mask": True}])
def test_a_step_reads_no_number_except_its_totals(
    make_run: Callable[..., RunConfig], monkeypatch, packed: dict[str, object]
) -> None:
    """The totals, one list, are read by `tolist` and decide whether the update is applied."""
    found, original = [], trainer.Trainer._train_step

    def step(self: trainer.Trainer) -> None:
        with Waits() as waits:
            original(self)
        found.append(waits.count)

    def chunks(*arguments: Any) -> Any:
        return loss._in_chunks(*arguments, False)

    monkeypatch.setattr(trainer.Trainer, "_train_step", step)
    monkeypatch.setattr(loss.cpu, "head_loss", chunks)
    train(
        make_run(steps=3, batch_rows=4, micro_rows=2, clip_norm=0.01, dropout_start=0.1, **packed)
    )
    assert found == [0, 0, 0]
