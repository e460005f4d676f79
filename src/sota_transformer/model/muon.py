"""NorMuon: momentum, made orthogonal, with rows brought to one size (Li et al. 2025, 2510.05491).

For the matrices inside the blocks; AdamW keeps the embedding and the gains. Muon is Jordan et al.
2024, its iteration here the Polar Express (Amsel et al. 2025, 2505.16932).
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm  # what Tensor.norm calls on MPS is deprecated

# Five odd polynomials a x + b x^3 + c x^5, each the best for where the one before has brought the
# singular values; a margin of 2% keeps them from leaving on the upper side through rounding.
_POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_MARGIN = 1.02
_MOMENTUM = (0.85, 0.95)  # from the first update to the last of the warm-up
_MOMENTUM_STEPS = 300
_ROW_DECAY = 0.95
_BATCH_ELEMENTS = 1 << 24  # of matrices that are made orthogonal together


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the nearest orthogonal ones, roughly; singular values go to about 1."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (vector_norm(wide, dim=(1, 2), keepdim=True) * _MARGIN + 1e-6)
    for a, b, c in _POLAR:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class NorMuon(torch.optim.Optimizer):
    """One group. Parameters may hold several matrices one below the other, each on its own."""

    def __init__(
        self, matrices: list[tuple[Tensor, list[int]]], weight_decay: float, dtype: torch.dtype
    ) -> None:
        """`matrices`: parameters with the rows of each of their matrices; `dtype`: of products."""
        self._rows = dict(matrices)
        self._dtype = dtype
        super().__init__([p for p, _ in matrices], {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients that are there."""
        group = self.param_groups[0]
        pieces: dict[torch.Size, list[tuple[Tensor, ...]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["momentum"] = torch.zeros_like(parameter)
                state["row_square"] = parameter.new_zeros(len(parameter), 1)
            low, high = _MOMENTUM
            decay = low + (high - low) * min(1.0, float(state["step"]) / _MOMENTUM_STEPS)
            state["step"] += 1
            state["momentum"].lerp_(parameter.grad, 1 - decay)
            ahead = parameter.grad.lerp(state["momentum"], decay)  # Nesterov
            rows = self._rows[parameter]
            parts = (x.split(rows) for x in (parameter, ahead, state["row_square"]))
            for part in zip(*parts, strict=True):
                pieces[part[0].shape].append(part)
        for shape, alike in pieces.items():
            size = max(1, _BATCH_ELEMENTS // shape.numel())
            for begin in range(0, len(alike), size):
                self._update(alike[begin : begin + size], group["lr"], group["weight_decay"])

    def _update(self, parts: list[tuple[Tensor, ...]], rate: float, weight_decay: float) -> None:
        """Matrices of one shape: (parameter, direction, mean square of each row)."""
        directions = torch.stack([part[1] for part in parts])
        if self._dtype == torch.float16:  # in which a small gradient would lose its digits
            directions /= vector_norm(directions, dim=(1, 2), keepdim=True) + 1e-30
        directions = orthogonal(directions.to(self._dtype)).float()
        rows, columns = directions.shape[1:]
        rate = rate * max(1.0, rows / columns) ** 0.5
        for (parameter, _, row_square), direction in zip(parts, directions, strict=True):
            size = vector_norm(direction)
            row_square.lerp_(direction.square().mean(1, keepdim=True), 1 - _ROW_DECAY)
            direction = direction / (row_square.sqrt() + 1e-10)
            direction *= size / (vector_norm(direction) + 1e-10)
            if weight_decay:  # only where the update shrinks the weight too (Chen et al. 2025)
                shrinks = (direction * parameter > 0) * parameter
                parameter.add_(shrinks, alpha=-rate * weight_decay)
            parameter.add_(direction, alpha=-rate)
