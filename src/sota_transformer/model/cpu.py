"""Attention for compiled training steps on a CPU, where SDPA's kernel is slow.

`benchmarks/attention.py` measures both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of (B, H, T, h), in blocks of queries that skip the future.

    k and v may have fewer heads, (B, K, T, h). A `mask` (B or 1, 1, T, T) may only narrow what a
    token sees of its past.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return _BlockAttention.apply(q, k, v, mask)


class _BlockAttention(torch.autograd.Function):
    """(B, H, T, h) three times -> (B, H, T, h); its gradient as in Dao et al. 2022."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Block by block; kept are the logarithms of the sums that probabilities are shares of."""
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
        """Gradients of q, k and v, from probabilities computed again.

        All of it transposed, (keys, queries): a compiler would find the forward pass's own product
        again, and keep it.
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
    """(start, end) of each block: a quarter of the queries, and at least 64."""
    size = max(64, tokens // 4)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _future(start: int, end: int, device: torch.device) -> Tensor:
    """(end - start, end) float32: 0 where a query may look, -inf where it may not."""
    key = torch.arange(end, dtype=torch.int32, device=device)  # 64 bits would halve the speed
    query = torch.arange(start, end, dtype=torch.int32, device=device)
    return torch.where(key > query[:, None], -torch.inf, 0.0)
