"""AdamW against its formula in float64, its groups, and its state by name."""

import pytest
import torch

from sota_transformer.config import Model, Optim
from sota_transformer.model.optim import (
    adamw,
    clip,
    gradient_norm,
    load_state_tensors,
    set_learning_rate,
    state_tensors,
)
from sota_transformer.model.transformer import Transformer

SMALL = Model(layers=1, d_model=16, heads=2, kv_heads=2, d_ff=24, seq_len=8, vocab_size=31)


def build() -> Transformer:
    model = Transformer(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def gradients(model: Transformer, step: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=source) for p in model.parameters()]


def advance(model: Transformer, optimizer: torch.optim.AdamW, step: int, rate: float) -> None:
    for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
        parameter.grad = gradient.clone()
    set_learning_rate(optimizer, rate)
    optimizer.step()


def test_ten_updates_equal_the_formula() -> None:
    """Loshchilov and Hutter 2019, algorithm 2; gains of norms do not decay."""
    config = Optim(weight_decay=0.1)
    model = build()
    optimizer = adamw(model, config)
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().double().clone() for p in model.parameters()]
    means = [torch.zeros_like(v) for v in values]
    squares = [torch.zeros_like(v) for v in values]
    for step in range(10):
        rate = 1e-2 / (step + 1)
        advance(model, optimizer, step, rate)
        for i, gradient in enumerate(gradients(model, step)):
            g = gradient.double()
            means[i] = config.beta1 * means[i] + (1 - config.beta1) * g
            squares[i] = config.beta2 * squares[i] + (1 - config.beta2) * g * g
            mean = means[i] / (1 - config.beta1 ** (step + 1))
            square = squares[i] / (1 - config.beta2 ** (step + 1))
            decay = config.weight_decay if values[i].ndim >= 2 else 0.0
            values[i] -= rate * decay * values[i]
            values[i] -= rate * mean / (square.sqrt() + config.eps)
    for name, value, parameter in zip(names, values, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_only_gains_do_not_decay() -> None:
    groups = adamw(build(), Optim()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])


def test_state_by_name_continues_bit_for_bit() -> None:
    whole, optimizer = build(), None
    optimizer = adamw(whole, Optim())
    for step in range(6):
        advance(whole, optimizer, step, 1e-3)
        if step == 2:
            weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
            moments = {n: t.clone() for n, t in state_tensors(whole, optimizer).items()}
    resumed = build()
    resumed.load_state_dict(weights)
    second = adamw(resumed, Optim())
    load_state_tensors(resumed, second, moments, updates=3)
    for step in range(3, 6):
        advance(resumed, second, step, 1e-3)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_clipping_equals_torch(limit: float) -> None:
    model, reference = build(), build()
    for ours, theirs, gradient in zip(
        model.parameters(), reference.parameters(), gradients(model, 3), strict=True
    ):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    norm = gradient_norm(model)
    clip(model, norm, limit)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), limit or torch.inf)
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
