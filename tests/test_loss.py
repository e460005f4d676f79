"""The fused head and loss against torch's cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from sota_transformer.model import cpu
from sota_transformer.model import loss as loss_module
from sota_transformer.model.loss import IGNORED, PAD, targets_of, token_loss


def case(tokens: int = 37, width: int = 16, vocab: int = 101):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = torch.randn(vocab, width, requires_grad=True)
    return hidden, head, torch.randint(0, vocab, (tokens,))


def as_a_gpu(monkeypatch, compiled: bool = False) -> None:
    """Take the code path of devices other than CPUs."""

    def instead(*arguments):
        return loss_module._in_chunks(*arguments, compiled)

    monkeypatch.setattr(cpu, "head_loss", instead)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk", [5, 37, 1024])
@pytest.mark.parametrize("aligned", [0, 1, 64])
def test_sums_and_gradients_equal_torch(
    monkeypatch, smoothing: float, chunk: int, aligned: int
) -> None:
    if aligned:
        as_a_gpu(monkeypatch)
    monkeypatch.setattr(loss_module, "ALIGNED", {"cpu": aligned or 1})
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", chunk)
    monkeypatch.setattr(cpu, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(cpu, "STRIP_ROWS", 40)
    hidden, head, targets = case()
    sums = token_loss(hidden, head, targets, smoothing)
    (sums.smoothed / 7).backward()
    hidden64 = hidden.detach().double().requires_grad_()
    head64 = head.detach().double().requires_grad_()
    logits = hidden64 @ head64.t()
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    (expected / 7).backward()
    torch.testing.assert_close(sums.smoothed.double(), expected, rtol=1e-5, atol=1e-5)
    plain = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(sums.nll.double(), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.grad.double(), head64.grad, rtol=1e-4, atol=1e-5)
    assert int(sums.count) == 37


@pytest.mark.slow
def test_a_compiled_loss_is_the_same_and_has_no_second_buffer_of_logits(monkeypatch) -> None:
    hidden, head, targets = case()
    targets[3] = IGNORED
    plain = token_loss(hidden, head, targets, 0.1)
    expected = torch.autograd.grad(plain.smoothed, (hidden, head))
    as_a_gpu(monkeypatch, compiled=True)
    loss_module._compiled_losses.cache_clear()
    compiled, (code,) = run_and_get_code(token_loss, hidden, head, targets, 0.1)
    assert "empty_strided_cpu((37, )" in code and "empty_strided_cpu((37, 101)" not in code
    found = torch.autograd.grad(compiled.smoothed, (hidden, head))
    torch.testing.assert_close(compiled.nll, plain.nll)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [0.3, 6.0, 9.0, 300.0])
def test_certain_and_hopeless_predictions(
    dtype: torch.dtype, smoothing: float, size: float
) -> None:
    """Probabilities from 1 - 1e-6 to zero, half of the targets being right."""
    torch.manual_seed(0)
    head = torch.eye(64).to(dtype).float().requires_grad_()
    hidden = (size * torch.eye(64) + 0.1 * torch.randn(64, 64)).to(dtype).requires_grad_()
    targets = torch.arange(64)
    targets[::2] = targets[::2].roll(1)
    sums = token_loss(hidden, head, targets, smoothing)
    sums.smoothed.backward()
    inputs = hidden.detach().double(), head.detach().double()
    hidden64, head64 = (x.requires_grad_() for x in inputs)
    logits = (hidden64.detach() @ head64.detach().t()).to(dtype).double()  # as rounded
    nll = F.cross_entropy(logits, targets, reduction="sum")
    F.cross_entropy(
        hidden64 @ head64.t(), targets, reduction="sum", label_smoothing=smoothing
    ).backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(sums.nll.double(), nll, rtol=tolerance / 4, atol=1e-5)
    right = targets == torch.arange(64)
    for rows in (right, ~right):
        error = (hidden.grad[rows].double() - hidden64.grad[rows]).norm()
        assert float(error) < tolerance * float(hidden64.grad[rows].norm()) + 1e-6
    assert float((head.grad - head64.grad).norm()) < tolerance * float(head64.grad.norm()) + 1e-6


@pytest.mark.parametrize("gpu", [False, True])
def test_ignored_targets_count_nowhere(monkeypatch, gpu: bool) -> None:
    if gpu:
        as_a_gpu(monkeypatch)
    hidden, head, targets = case()
    targets[::3] = IGNORED
    kept = targets != IGNORED
    sums = token_loss(hidden, head, targets, 0.1)
    sums.smoothed.backward()
    alone = token_loss(hidden[kept], head, targets[kept], 0.1)
    torch.testing.assert_close(sums.smoothed, alone.smoothed)
    torch.testing.assert_close(sums.nll, alone.nll)
    assert int(sums.count) == int(kept.sum())
    assert not hidden.grad[~kept].any()


def test_padding_is_no_target() -> None:
    from sota_transformer.data.tokenizer import Tokenizer

    assert Tokenizer.pad == PAD
    assert targets_of(torch.tensor([[5, 6, PAD, PAD]])).tolist() == [[6, IGNORED, IGNORED]]


def test_any_split_into_micro_batches_gives_the_same_gradient() -> None:
    hidden, head, targets = case(tokens=48)
    gradients = []
    for size in (48, 16, 1):
        head.grad = None
        for part in range(0, 48, size):
            rows = slice(part, part + size)
            sums = token_loss(hidden[rows].detach(), head, targets[rows], 0.1)
            (sums.smoothed / 48).backward()
        gradients.append(head.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_without_gradients_the_sums_are_the_same() -> None:
    hidden, head, targets = case()
    with_gradient = token_loss(hidden, head, targets, 0.1)
    with torch.no_grad():
        without = token_loss(hidden, head, targets, 0.1)
    assert torch.equal(with_gradient.nll, without.nll)
    assert torch.equal(with_gradient.smoothed, without.smoothed)


def test_bfloat16_loss_is_computed_in_float32() -> None:
    hidden, head, targets = case(tokens=512)
    exact = token_loss(hidden, head, targets, 0.0).nll / 512
    half = token_loss(hidden.bfloat16(), head, targets, 0.0).nll / 512
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(exact), abs=0.02)


def test_perfect_predictions_cost_nothing_and_uniform_ones_the_logarithm() -> None:
    head = torch.eye(11) * 100
    targets = torch.arange(11)
    assert float(token_loss(torch.eye(11), head, targets, 0.0).nll) == pytest.approx(0, abs=1e-4)
    uniform = token_loss(torch.zeros(11, 11), head, targets, 0.1)
    expected = 11 * torch.tensor(11.0).log()
    torch.testing.assert_close(uniform.nll, expected)
    torch.testing.assert_close(uniform.smoothed, expected)


def test_a_second_backward_pass_is_a_clear_error() -> None:
    hidden, head, targets = case()
    sums = token_loss(hidden, head, targets, 0.1)
    sums.smoothed.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        sums.smoothed.backward()
