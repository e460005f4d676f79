"""Loss, perplexity and bits per byte, with an error bar over sequences. No smoothing, no dropout.

Every figure is a sum over tokens divided once. Shapes: B rows, T tokens, N sequences.
Reading order: `sequence_sums`, `sliding_sums` and `rolling_sums` measure, `summarise` divides. The
sums are kept per sequence because the error bar needs them.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from sota_transformer.data.packing import document_ids
from sota_transformer.data.progress import Meter
from sota_transformer.model.loss import IGNORED, targets_of, token_loss
from sota_transformer.model.transformer import Transformer, same_document

Array = np.ndarray[Any, Any]
BATCH_ROWS = 8


class Perplexity(NamedTuple):
    """A model's figures on some text."""

    nats: float
    """Mean negative log-likelihood per token."""
    error: float | None
    """Standard error of `nats` over sequences; None for a single one."""
    perplexity: float
    """exp(nats)."""
    bits_per_byte: float
    """Total nats / ln 2 / total UTF-8 bytes of predicted tokens; comparable across tokenizers."""
    tokens: int
    """Tokens predicted."""
    sequences: int
    """Number of windows."""


def sequence_sums(
    model: Transformer,
    windows: Iterable[Array],
    token_bytes: Array,
    document_mask: bool = False,
) -> Array:
    """(N, 3) float64: nats, tokens and bytes of each window (T+1,).

    The last T ids are predicted, each from the ids before it (with `document_mask`, only those of
    its own document). Padding is not predicted. `token_bytes` (V,) holds each token's UTF-8 length.
    """
    return _sums(model, ((window, 0) for window in windows), token_bytes, document_mask)


def sliding_sums(
    model: Transformer,
    tokens: Array,
    token_bytes: Array,
    context: int,
    stride: int,
    document_mask: bool = False,
    meter: Meter | None = None,
) -> Array:
    """(N, 3) as above for one text (n,) of any length; every token but the first counts once.

    Windows of `context` tokens start every `stride` tokens; each predicts only what the previous
    one did not, so a token of a later window sees at least context - stride tokens. `meter` counts
    the predicted tokens.
    """
    return _sums(model, _sliding(tokens, context, stride), token_bytes, document_mask, meter)


def rolling_sums(
    model: Transformer, tokens: Array, token_bytes: Array, context: int, meter: Meter
) -> Array:
    """(N, 3) as above with lm-eval's windows: side by side, and the last one always full."""
    return _sums(model, _rolling(tokens, context), token_bytes, False, meter)


def _rolling(tokens: Array, context: int) -> Iterator[tuple[Array, int]]:
    """As `_sliding`; the last window begins early, where already predicted tokens fill it."""
    for done in range(0, len(tokens) - 1, context):
        end = min(done + context, len(tokens) - 1)
        start = max(0, end - context)
        yield tokens[start : end + 1], done - start


def _sliding(tokens: Array, context: int, stride: int) -> Iterator[tuple[Array, int]]:
    """Windows of at most context + 1 tokens, each with its number of already predicted targets."""
    done = 0  # targets 1 ... done have been predicted
    for start in range(0, len(tokens) - 1, stride):
        window = tokens[start : start + context + 1]
        if start + len(window) - 1 > done:
            yield window, done - start
            done = start + len(window) - 1


@torch.no_grad()
def _sums(
    model: Transformer,
    windows: Iterable[tuple[Array, int]],
    token_bytes: Array,
    document_mask: bool,
    meter: Meter | None = None,
) -> Array:
    """(N, 3) of windows, each with the number of leading targets to skip."""
    head = model.embedding.weight.detach()  # with a parameter the loss would keep gradients
    device = model.rope.device
    result = []
    for batch in _batches(windows):
        ids = torch.from_numpy(np.stack([window for window, _ in batch]).astype(np.int64))
        targets = targets_of(ids)
        for line, (_, skip) in zip(targets, batch, strict=True):
            line[:skip] = IGNORED
        mask = None
        if document_mask:
            mask = same_document(torch.from_numpy(document_ids(ids[:, :-1].numpy())).to(device))
        hidden = model(ids[:, :-1].to(device), mask=mask)  # (B, T, D)
        on_device = targets.to(device)
        nats = [
            token_loss(hidden[row], head, on_device[row], smoothing=0.0).nll
            for row in range(len(batch))
        ]
        kept = targets.numpy() != IGNORED
        sizes = np.where(kept, token_bytes[ids[:, 1:].numpy()], 0).sum(1)
        result.append(np.stack([torch.stack(nats).cpu().double().numpy(), kept.sum(1), sizes], 1))
        if meter is not None:
            meter.add(int(kept.sum()))
    return np.concatenate(result) if result else np.zeros((0, 3))


def _batches(windows: Iterable[tuple[Array, int]]) -> Iterator[list[tuple[Array, int]]]:
    """Batches of consecutive windows of equal length, at most `BATCH_ROWS` each."""
    batch: list[tuple[Array, int]] = []
    for item in windows:
        if batch and (len(batch) == BATCH_ROWS or len(item[0]) != len(batch[0][0])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def summarise(sums: Array) -> Perplexity:
    """The figures from the sums (N, 3). Raises ValueError when there is no token.

    With x_i nats in n_i tokens of sequence i and m = sum x / sum n, the error is that of a ratio
    estimator, sqrt(N / (N-1) * sum (x_i - m n_i)^2) / sum n; for equal n_i it is the standard
    deviation of the sequence means over sqrt(N).
    """
    count, (total, tokens, size) = len(sums), sums.sum(0)
    if not tokens:
        raise ValueError("no tokens to evaluate")
    nats = total / tokens
    error = None
    if count > 1 and math.isfinite(nats):
        spread = float(np.square(sums[:, 0] - nats * sums[:, 1]).sum())
        error = math.sqrt(count / (count - 1) * spread) / float(tokens)
    bits = total / math.log(2) / size if size else math.nan
    value = math.exp(nats) if nats < 700 else math.inf
    return Perplexity(float(nats), error, value, float(bits), int(tokens), count)


def paired(one: Array, other: Array) -> tuple[float, float | None]:
    """Difference in nats per token between two models and its standard error, from the sums (N, 3)
    of both over the same windows. The difficulty common to both cancels out.
    """
    difference = summarise(np.column_stack([one[:, 0] - other[:, 0], one[:, 1:]]))
    return difference.nats, difference.error
