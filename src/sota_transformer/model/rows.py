"""Products of few rows with a matrix on a CPU, for generation: read each weight once, in order.

`benchmarks/generation.py` measures it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SHARED_FROM = 1 << 19  # weights; below, waking a second thread costs what it saves
_PANEL = 16  # outputs stored side by side for each input
_PANELS_UP_TO = 128  # rows; beyond, rebuilding the matrix pays off
_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def by_columns(weight: Tensor) -> Tensor:
    """The same (outputs, inputs) matrix, stored as (inputs, outputs)."""
    return weight.t().contiguous().t()


def panels(weight: Tensor) -> Tensor:
    """Float32 (outputs, inputs) -> (panels, inputs, 16), or by columns where that is impossible."""
    if len(weight) % _PANEL or not torch.backends.mkl.is_available():
        return by_columns(weight)
    return weight.view(-1, _PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def by_panels(x: Tensor, weight: Tensor) -> Tensor:
    """(..., inputs) by `panels` of a matrix -> (..., outputs).

    The fastest layout for one row: 768 x 2048 takes 0.29 ms, by columns 0.43, by rows 0.38;
    256 x 688 takes 0.039, 0.087 and 0.059 (one core of a Zen 4, 24 Nov 2026). Two to 16 rows take
    about as long as by columns, 64 up to a quarter longer.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > _PANELS_UP_TO:
        return F.linear(x, weight.transpose(1, 2).flatten(0, 1))
    y = torch.bmm(rows.expand(len(weight), *rows.shape), weight)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def one_row(x: Tensor, weight: Tensor) -> Tensor:
    """(1, inputs) by (outputs, inputs) -> (1, outputs), each weight read once.

    Float32 by columns (`decode.lay_for_rows`) is split over the threads by outputs, because MKL
    uses a single thread for a single row. In bfloat16 torch's own `mv` reads at memory speed
    (50,258 x 768 in 4.1 ms on one core, 24 Nov 2026), but oneDNN takes precedence and needs 14. On
    AMX oneDNN needs 6.3; torch's own was not measured there.
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
    """torch's own `mv`. The switch is process-wide: no other thread may compute meanwhile."""
    onednn: Any = torch.backends.mkldnn
    before, onednn.enabled = onednn.enabled, False
    try:
        return torch.mv(weight, x)
    finally:
        onednn.enabled = before
