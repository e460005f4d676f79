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
        """Block by block; the probabilities are kept."""
        outputs, chances = [], []
        for start, end in _query_blocks(q.shape[2]):
            scores = (q[:, :, start:end] @ k[:, :, :end].transpose(2, 3)).float()
            scores = scores * q.shape[3] ** -0.5
            if mask is None:
                scores = scores + _future(start, end, q.device)
            else:
                scores = scores.masked_fill(~mask[:, :, start:end, :end], -torch.inf)
            chances.append(scores.softmax(-1).to(q.dtype))
            outputs.append(chances[-1] @ v[:, :, :end])
        output = torch.cat(outputs, dim=2)
        ctx.save_for_backward(q, k, v, output, *chances)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        (gradient,), (q, k, v, output, *chances) = gradients, ctx.saved_tensors
        tokens, scale = q.shape[2], q.shape[3] ** -0.5
        mean = (gradient.float() * output.float()).sum(-1, keepdim=True)  # (B, H, T, 1)
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), p in zip(_query_blocks(tokens), chances, strict=True):
            rest = (0, 0, 0, tokens - end)
            part = gradient[:, :, start:end]
            dp = (part @ v[:, :, :end].transpose(2, 3)).float()
            ds = (p.float() * (dp - mean[:, :, start:end]) * scale).to(q.dtype)
            dq.append(ds @ k[:, :, :end])
            dk = dk + F.pad(ds.transpose(2, 3) @ q[:, :, start:end], rest)
            dv = dv + F.pad(p.transpose(2, 3) @ part, rest)
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
