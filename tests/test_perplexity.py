"""Perplexity against float64 cross-entropy over full logits, and its error bar against spread."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.inference import benchmarks, perplexity
from sota_transformer.inference.perplexity import (
    Perplexity,
    sequence_sums,
    sliding_sums,
    summarise,
)
from sota_transformer.model.transformer import Transformer
from tests.inference_models import FULL, TINY, as_transformers, small_model

BYTES = Tokenizer().token_bytes


def windows_of(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 700, (rows, length)).astype(np.uint16)


def judged(model: Transformer, windows: Iterable[np.ndarray]) -> Perplexity:
    return summarise(sequence_sums(model, windows, BYTES))


def reference_nll(model: torch.nn.Module, window: np.ndarray) -> torch.Tensor:
    """(T,) nats in float64 from full logits of `transformers`."""
    ids = torch.from_numpy(window.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0]
    return F.cross_entropy(logits.double(), ids[1:], reduction="none")


def test_equals_transformers_in_float64() -> None:
    model = small_model()
    other = as_transformers(model)
    windows = windows_of(5, 20)
    nats = torch.stack([reference_nll(other, row) for row in windows])
    result = judged(model, windows)
    assert result.nats == pytest.approx(float(nats.mean()), rel=1e-6)
    assert result.perplexity == pytest.approx(float(nats.mean().exp()), rel=1e-5)
    assert result.error == pytest.approx(float(nats.mean(1).std()) / math.sqrt(5), rel=1e-4)
    size = sum(len(Tokenizer().decode_bytes(row[1:])) for row in windows)
    assert result.bits_per_byte == pytest.approx(float(nats.sum()) / math.log(2) / size, rel=1e-6)
    assert (result.tokens, result.sequences) == (95, 5)


def test_tokens_weigh_the_same_in_any_window() -> None:
    model = small_model()
    short, long = windows_of(3, 5), windows_of(2, 31, seed=1)
    mixed = judged(model, [short[0], *long, short[1], short[2]])
    sums = np.concatenate([sequence_sums(model, w, BYTES) for w in (short, long)])
    assert mixed.tokens == 3 * 4 + 2 * 30
    assert mixed.nats == pytest.approx(sums[:, 0].sum() / 72, rel=1e-9)
    mean_of_means = (sums[:, 0] / sums[:, 1]).mean()
    assert abs(mixed.nats - mean_of_means) > 1e-3  # the mistake this guards against


@pytest.mark.parametrize("rows", [1, 3])
def test_batch_size_changes_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    model = small_model()
    windows = windows_of(7, 16)
    base = sequence_sums(model, windows, BYTES)
    monkeypatch.setattr(perplexity, "BATCH_ROWS", rows)
    np.testing.assert_allclose(sequence_sums(model, windows, BYTES), base, rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 5, 8, 12])
@pytest.mark.parametrize("length", [2, 9, 13, 14, 40])
def test_sliding_counts_each_token_once_with_its_context(stride: int, length: int) -> None:
    model, context = small_model(), 12
    other = as_transformers(model)
    tokens = windows_of(1, length)[0]
    expected = 0.0
    for target in range(1, length):
        # The first window that reaches the target: windows start at 0, stride, 2 x stride ...
        start = stride * max(0, math.ceil((target - context) / stride))
        nll = reference_nll(other, tokens[start : target + 1])
        expected += float(nll[-1])
    sums = sliding_sums(model, tokens, BYTES, context, stride)
    assert sums[:, 1].sum() == length - 1
    assert sums[:, 0].sum() == pytest.approx(expected, rel=1e-5)
    assert sums[:, 2].sum() == len(Tokenizer().decode_bytes(tokens[1:]))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = Transformer(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = judged(model, windows_of(3, 10))
    assert result.perplexity == pytest.approx(TINY.vocab_size, rel=1e-5)
    assert result.error == pytest.approx(0.0, abs=1e-6)


def test_the_error_bar_covers_the_truth_as_often_as_stated() -> None:
    """Sequences of unequal length drawn from one population; 1.96 errors cover about 95%."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        tokens = random.integers(10, 60, 40)
        nats = tokens * 3.0 + random.normal(0, 4, 40) + (tokens - 34.5) * random.normal(0, 0.5, 40)
        result = summarise(np.stack([nats, tokens, tokens], 1))
        assert result.error is not None
        covered += abs(result.nats - 3.0) <= 1.96 * result.error
    assert 0.92 <= covered / 2000 <= 0.97


def test_leaves_no_gradient_and_no_buffer_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "BATCH_ROWS", 48)
    model = small_model(FULL)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    windows = windows_of(48, TINY.seq_len + 1)  # more tokens than two chunks of the loss
    with Watch():
        result = judged(model, windows)
    assert max(sizes) < result.tokens * FULL.vocab_size / 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_sequence_has_no_error_bar_and_zero_are_refused() -> None:
    model = small_model()
    assert judged(model, windows_of(1, 9)).error is None
    with pytest.raises(ValueError, match="no token"):
        judged(model, [])


def test_bfloat16_is_close() -> None:
    model = small_model(spread=2.0)
    exact = judged(model, windows_of(4, 30))
    model.dtype = torch.bfloat16
    rough = judged(model, windows_of(4, 30))
    assert rough.nats == pytest.approx(exact.nats, rel=5e-3)
    assert rough.nats != exact.nats


def test_padding_is_not_scored_and_a_mask_isolates_documents() -> None:
    model = small_model(FULL)
    first, second = windows_of(1, 9)[0], windows_of(1, 12, seed=3)[0]
    first[-1] = second[-1] = EOT
    window = np.concatenate([first, second, np.full(7, Tokenizer.pad, np.uint16)])
    masked = sequence_sums(model, [window], BYTES, document_mask=True)
    assert masked[0, 1] == len(first) + len(second) - 1
    # The first token of the second document is predicted from the end of the first.
    apart = [sequence_sums(model, [part], BYTES) for part in (first, second)]
    last = sequence_sums(model, [np.append(first, second[0])], BYTES) - apart[0]
    np.testing.assert_allclose(masked, apart[0] + apart[1] + last, rtol=1e-5)
    assert sequence_sums(model, [window], BYTES)[0, 0] != pytest.approx(masked[0, 0], rel=1e-4)


def test_the_error_of_a_perplexity_is_its_own_and_not_of_its_nats() -> None:
    """By hand: nats of 1, 2 and 3 have the mean 2 and the standard error 1 / sqrt(3)."""
    found = benchmarks._perplexity("perplexity", [1.0, 2.0, 3.0], "")
    assert found.value == pytest.approx(math.exp(2))
    assert found.error == pytest.approx(math.exp(2) / math.sqrt(3))
    assert benchmarks._perplexity("perplexity", [1.0], "").error is None
