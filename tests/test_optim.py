"""AdamW and NorMuon against their formulas in float64, their groups, and their state by name."""

import pytest
import torch

from sota_transformer.config import Model, Optim
from sota_transformer.model.muon import orthogonal
from sota_transformer.model.optim import (
    clip,
    gradient_norm,
    load_state_tensors,
    optimizers,
    state_tensors,
    update,
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


Optimizers = list[torch.optim.Optimizer]
FAST = Optim(learning_rate=0.1, matrix_rate=0.02, weight_decay=0.05)


def advance(model: Transformer, both: Optimizers, step: int, rate: float) -> None:
    for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
        parameter.grad = gradient.clone()
    update(both, rate)


def test_ten_updates_equal_the_formula() -> None:
    """Loshchilov and Hutter 2019, algorithm 2; gains of norms do not decay."""
    config = Optim(weight_decay=0.1)
    model = build()
    both = optimizers(model, config)
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().double().clone() for p in model.parameters()]
    means = [torch.zeros_like(v) for v in values]
    squares = [torch.zeros_like(v) for v in values]
    for step in range(10):
        rate = 1e-2 / (step + 1)
        advance(model, both, step, rate)
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
    groups = optimizers(build(), Optim())[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])


@pytest.mark.parametrize("config", [Optim(), FAST], ids=["adamw", "normuon"])
def test_state_by_name_continues_bit_for_bit(config: Optim) -> None:
    whole = build()
    both = optimizers(whole, config)
    for step in range(6):
        advance(whole, both, step, 1e-3)
        if step == 2:
            weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
            moments = {n: t.clone() for n, t in state_tensors(whole, both).items()}
    resumed = build()
    resumed.load_state_dict(weights)
    second = optimizers(resumed, config)
    load_state_tensors(resumed, second, moments, updates=3)
    for name, tensor in state_tensors(resumed, second).items():  # `moments` may map a file
        assert tensor.data_ptr() != moments[name].data_ptr()
    for step in range(3, 6):
        advance(resumed, second, step, 1e-3)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_parameter_has_one_optimizer() -> None:
    model = build()
    muon, adamw = optimizers(model, FAST)
    groups = [*muon.param_groups, *adamw.param_groups]
    given = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters()}
    assert len(given) == len(list(model.parameters()))
    assert all(
        p.ndim == 2 and len(p) < SMALL.vocab_size * 2 for p in muon.param_groups[0]["params"]
    )


@pytest.mark.parametrize("shape", [(2, 48, 48), (3, 24, 96), (2, 96, 24)])
def test_orthogonal_against_the_singular_vectors(shape: tuple[int, int, int]) -> None:
    """torch's SVD gives the nearest orthogonal matrix; five polynomials come close to it."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    sizes = torch.linalg.svdvals(found)
    assert sizes.min() > 0.85 and sizes.max() < 1.15
    alike = torch.nn.functional.cosine_similarity(found.flatten(1), (u @ v).flatten(1))
    assert alike.min() > 0.99


def test_normuon_equals_its_formula() -> None:
    """Li et al. 2025, algorithm 1, with each update's norm kept; q, k, v separately."""
    model = build()
    both = optimizers(model, FAST)
    name = "blocks.0.attention.qkv.weight"
    place = [n for n, _ in model.named_parameters()].index(name)
    weight = model.get_parameter(name).detach().double().clone()
    momentum, square = torch.zeros_like(weight), torch.zeros(len(weight), 1).double()
    for step in range(4):
        rate = 0.1 / (step + 1)
        advance(model, both, step, rate)
        decay = 0.85 + 0.1 * step / 300
        gradient = gradients(model, step)[place].double()
        momentum = decay * momentum + (1 - decay) * gradient
        ahead = decay * momentum + (1 - decay) * gradient
        matrix_rate = rate * FAST.matrix_rate / FAST.learning_rate
        for part in (slice(0, 16), slice(16, 32), slice(32, 48)):  # square: no shape factor
            direction = orthogonal(ahead[None, part].float())[0].double()
            square[part] = 0.95 * square[part] + 0.05 * direction.square().mean(1, keepdim=True)
            even = direction / square[part].sqrt()
            even *= direction.norm() / even.norm()
            agrees = even * weight[part] > 0
            decayed = matrix_rate * FAST.weight_decay * weight[part]
            weight[part] -= torch.where(agrees, decayed, 0.0) + matrix_rate * even
    found = model.get_parameter(name).detach().double()
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_clipping_equals_torch(limit: float) -> None:
    model, reference = build(), build()
    for ours, theirs, gradient in zip(
        model.parameters(), reference.parameters(), gradients(model, 3), strict=True
    ):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    norm = gradient_norm(model)
    clip(model, float(norm), limit)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), limit or torch.inf)
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
