"""What a CPU does better in a way of its own: attention of compiled training steps, one row alone.

`benchmarks/attention.py` and `benchmarks/generation.py` measure them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SHARED_FROM = 1 << 19  # weights; fewer, and waking a second thread costs what it saves
_PANEL = 16  # outputs that stand side by side for each input
_PANELS_UP_TO = 128  # rows; more repay making the matrix anew
_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def by_columns(weight: Tensor) -> Tensor:
    """The same matrix (outputs, inputs), stored as (inputs, outputs)."""
    return weight.t().contiguous().t()


def panels(weight: Tensor) -> Tensor:
    """Float32 (outputs, inputs) -> (panels, inputs, 16), or by columns where that cannot be."""
    if len(weight) % _PANEL or not torch.backends.mkl.is_available():
        return by_columns(weight)
    return weight.view(-1, _PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def by_panels(x: Tensor, weight: Tensor) -> Tensor:
    """(..., inputs) by `panels` of a matrix -> (..., outputs).

    Nothing reads as fast: one row by 768 x 2048 takes 0.29 ms, by columns 0.43, by rows 0.38, and
    by 256 x 688 0.039, 0.087 and 0.059 (one core of a Zen 4, 24 Nov 2026). Two to 16 rows take no
    longer than by columns either, 64 take 10% longer.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > _PANELS_UP_TO:
        return F.linear(x, weight.transpose(1, 2).flatten(0, 1))
    y = torch.bmm(rows.expand(len(weight), *rows.shape), weight)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def one_row(x: Tensor, weight: Tensor) -> Tensor:
    """(1, inputs) by (outputs, inputs) -> (1, outputs), each weight read once.

    Float32 by columns (`decode.lay_for_rows`) is shared by the threads, each making some of the
    outputs: MKL gives a single row to a single thread. In bfloat16 torch's own `mv` reads at the
    memory's rate (50,258 x 768 in 4.1 ms on one core, 24 Nov 2026), but oneDNN is asked first and
    takes 14. On AMX it takes 6.3, and what torch's own would was not measured.
    """
    if weight.dtype == torch.bfloat16:
        return (torch.mv if _AMX else _mv_without_onednn)(weight, x[0])[None]
    outputs, inputs = weight.shape
    if weight.stride(0) == 1 and outputs * inputs >= _SHARED_FROM:
        parts = next(n for n in range(torch.get_num_threads(), 0, -1) if outputs % n == 0)
        if parts > 1:
            split = weight.t().view(inputs, parts, -1).transpose(0, 1)  # (parts, inputs, outputs)
            return torch.bmm(x.expand(parts, 1, inputs), split).view(1, outputs)
    return F.linear(x, weight)


def _mv_without_onednn(weight: Tensor, x: Tensor) -> Tensor:
    """`mv` of torch itself. The switch is the process's, so no other thread may compute beside."""
    onednn: Any = torch.backends.mkldnn
    before, onednn.enabled = onednn.enabled, False
    try:
        return torch.mv(weight, x)
    finally:
        onednn.enabled = before


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
