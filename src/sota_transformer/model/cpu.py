"""CPU versions for faster training: the loss of the head, and attention when compiled.

`benchmarks/training.py` and `benchmarks/attention.py` measure them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1  # a target that no loss counts
CHUNK_TOKENS = 512  # logits exist for this many tokens at a time
STRIP_ROWS = 4096  # of the head in its bfloat16 products: they stay in cache until they are added
# MKL is up to 1.4 times as fast if rows start on a cache line, as rows of 50,258 numbers do not.
ALIGNED = {torch.float32: 16}


def head_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The head and its loss, for `loss.token_loss`, with torch's softmax in place.

    (N, D), (V, D), (N,) -> (2,) sums of smoothed and plain loss; with `train`, gradients of the
    former, (N, D) and (V, D) float32. The part of label smoothing that is the same for all V
    outputs has rank one and is added to the gradients, not to the logits.
    """
    weight, valid, index = head.detach().to(hidden.dtype), targets != IGNORED, targets.clamp(min=0)
    share, size = smoothing / len(head), min(len(hidden), CHUNK_TOKENS)
    whole = torch.zeros(head.shape[1])
    if smoothing:  # reading the whole head takes a twentieth of the loss's time
        whole = head.detach().sum(0, dtype=torch.float32)
    means = hidden.float() @ (whole / len(head))  # (N,) mean logits
    pull = share * hidden[valid].sum(0, dtype=torch.float32)
    missing = -len(head) % ALIGNED.get(hidden.dtype, 1)
    sums, buffer = torch.zeros(2), hidden.new_empty(size, len(head) + missing)
    hidden_gradient = torch.empty_like(hidden) if train else hidden
    head_gradient = (-pull).expand_as(head).contiguous() if train else head
    for begin in range(0, len(hidden), size):
        part = slice(begin, begin + size)
        padded = buffer[: len(hidden[part])]
        logits = padded[:, : len(head)]
        torch.mm(hidden[part], weight.t(), out=logits)
        nll, score = _softmax_losses(padded, hidden[part], weight, index[part], smoothing)
        uniform = score + nll - means[part]
        losses = torch.stack(((1 - smoothing) * nll + smoothing * uniform, nll))
        sums += losses.where(valid[part], 0.0).sum(-1)
        if not train:
            continue
        if not valid[part].all():
            logits.index_fill_(0, (~valid[part]).nonzero()[:, 0], 0.0)
        if logits.dtype == torch.float32:  # the dtype of the gradients: accumulate in place
            torch.mm(logits, weight, out=hidden_gradient[part])
            head_gradient.addmm_(logits.t(), hidden[part])
            continue
        total = torch.zeros(hidden[part].shape)
        for top in range(0, len(head), STRIP_ROWS):
            rows = slice(top, top + STRIP_ROWS)
            total += logits[:, rows] @ weight[rows]
            head_gradient[rows] += logits[:, rows].t() @ hidden[part]
        hidden_gradient[part] = total
    if train:
        hidden_gradient -= valid[:, None] * (share * whole)
    return sums, hidden_gradient, head_gradient


def _softmax_losses(
    padded: Tensor, hidden: Tensor, weight: Tensor, index: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Plain losses (N,) and target logits (N,); the logits (N, V or more) become gradients.

    A loss is minus the log of its target's probability p: in bfloat16 within 0.002 nats. For p over
    a half, 1 - p would be rounding error, so the other probabilities are summed instead; where p
    underflows, the logits are computed again.
    """
    padded[:, len(weight) :] = -torch.inf
    logits, places = padded[:, : len(weight)], (torch.arange(len(index)), index)
    score = logits[places].float()
    torch.softmax(padded, -1, out=padded)  # a slice would be copied first
    probability = logits[places].float()
    nll, at_target = -probability.log(), probability - (1 - smoothing)
    sure, lost = (probability > 0.5), (probability < torch.finfo(torch.float32).tiny)
    if sure.any():
        logits[places] = logits[places].where(~sure, 0.0)
        rest = logits[sure].sum(-1, dtype=torch.float32)
        nll[sure], at_target[sure] = -(-rest).log1p(), smoothing - rest
    if lost.any():
        nll[lost] = (hidden[lost] @ weight.t()).float().logsumexp(-1) - score[lost]
    logits[places] = at_target.to(logits.dtype)
    return nll, score


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of (B, H, T, h), in blocks of queries that skip later keys.

    k and v may have fewer heads, (B, K, T, h). A `mask` (B or 1, 1, T, T) must be a subset
    of the causal one.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return _BlockAttention.apply(q, k, v, mask)


class _BlockAttention(torch.autograd.Function):
    """(B, H, T, h) three times -> (B, H, T, h); its gradient as in Dao et al. 2022."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Block by block; saves the log-sum-exp of the scores for the backward pass."""
        outputs, totals = [], []
        for start, end in _query_blocks(q.shape[2]):
            scores = (q[:, :, start:end] @ k[:, :, :end].transpose(2, 3)).float()
            scores = scores * q.shape[3] ** -0.5
            if mask is None:
                scores = scores + _future(start, end, q.device)
            else:
                scores = scores.masked_fill(~mask[:, :, start:end, :end], -torch.inf)
            top = scores.amax(-1, keepdim=True)
            shares = (scores - top).exp()
            total = shares.sum(-1, keepdim=True)
            totals.append(top + total.log())
            outputs.append((shares / total).to(q.dtype) @ v[:, :, :end])
        output = torch.cat(outputs, dim=2)
        ctx.save_for_backward(q, k, v, mask, output, torch.cat(totals, dim=2))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v, from recomputed probabilities.

        Everything is transposed, (keys, queries): a compiler would otherwise recognize the forward
        pass's product, and keep it in memory.
        """
        (gradient,), (q, k, v, mask, output, totals) = gradients, ctx.saved_tensors
        tokens, scale = q.shape[2], q.shape[3] ** -0.5
        mean = (gradient.float() * output.float()).sum(-1)[:, :, None]  # (B, H, 1, T)
        totals = totals.transpose(2, 3)
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for start, end in _query_blocks(tokens):
            rest, past, these = (0, 0, 0, tokens - end), slice(end), slice(start, end)
            query, part = q[:, :, these], gradient[:, :, these]
            scores = (k[:, :, past] @ query.transpose(2, 3)).float() * scale
            if mask is None:
                scores = scores + _future(start, end, q.device).t()
            else:
                scores = scores.masked_fill(~mask[:, :, these, past].transpose(2, 3), -torch.inf)
            p = (scores - totals[:, :, :, these]).exp()
            dp = (v[:, :, past] @ part.transpose(2, 3)).float()
            ds = (p * (dp - mean[:, :, :, these]) * scale).to(q.dtype)
            dq.append(ds.transpose(2, 3) @ k[:, :, past])
            dk = dk + F.pad(ds @ query, rest)
            dv = dv + F.pad(p.to(q.dtype) @ part, rest)
        return torch.cat(dq, dim=2), dk, dv, None


def _query_blocks(tokens: int) -> list[tuple[int, int]]:
    """(start, end) of each block: a quarter of the queries, but at least 64."""
    size = max(64, tokens // 4)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _future(start: int, end: int, device: torch.device) -> Tensor:
    """(end - start, end) float32: 0 where attention is allowed, -inf elsewhere."""
    key = torch.arange(end, dtype=torch.int32, device=device)  # int64 would halve the speed
    query = torch.arange(start, end, dtype=torch.int32, device=device)
    return torch.where(key > query[:, None], -torch.inf, 0.0)
