"""NorMuon: orthogonalized momentum with normalized rows (Li et al. 2025, 2510.05491).

For the matrices inside the blocks; AdamW updates the embedding and the norm gains. Muon is Jordan
et al. 2024; the iteration here is the Polar Express (Amsel et al. 2025, 2505.16932).
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm  # what Tensor.norm calls on MPS is deprecated

# Five odd polynomials a x + b x^3 + c x^5, each optimal for the range of singular values that the
# previous one leaves; a margin of 2% keeps rounding from pushing them above that range.
_POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_MARGIN = 1.02
_MOMENTUM = (0.85, 0.95)  # at the first update and after its warm-up
_MOMENTUM_STEPS = 300
_ROW_DECAY = 0.95
_BATCH_ELEMENTS = 1 << 24  # of the matrices orthogonalized together


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> roughly the nearest orthogonal matrices: singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (vector_norm(x, dim=(1, 2), keepdim=True) * _MARGIN + 1e-6)
    for a, b, c in _POLAR:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class NorMuon(torch.optim.Optimizer):
    """One parameter group. A parameter may stack several matrices; each is updated by itself."""

    def __init__(
        self, matrices: list[tuple[Tensor, list[int]]], weight_decay: float, dtype: torch.dtype
    ) -> None:
        """`matrices`: parameters with the row counts of their matrices; `dtype`: of products."""
        self._rows = dict(matrices)
        self._dtype = dtype
        super().__init__([p for p, _ in matrices], {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "momentum": torch.zeros_like(parameter),
                    "row_square": parameter.new_zeros(len(parameter), 1),
                }
        states, gradients = [self.state[p] for p in parameters], [p.grad for p in parameters]
        low, high = _MOMENTUM
        decay = low + (high - low) * min(1.0, float(states[0]["step"]) / _MOMENTUM_STEPS)
        momenta = [state["momentum"] for state in states]
        torch._foreach_lerp_(momenta, gradients, 1 - decay)
        ahead = torch._foreach_lerp(gradients, momenta, decay)  # Nesterov
        pieces: dict[torch.Size, list[tuple[Tensor, ...]]] = defaultdict(list)
        for parameter, state, direction in zip(parameters, states, ahead, strict=True):
            state["step"] += 1
            rows = self._rows[parameter]
            parts = (x.split(rows) for x in (parameter, direction, state["row_square"]))
            for part in zip(*parts, strict=True):
                pieces[part[0].shape].append(part)
        for shape, alike in pieces.items():
            size = max(1, _BATCH_ELEMENTS // shape.numel())
            for begin in range(0, len(alike), size):
                self._update(alike[begin : begin + size], group["lr"], group["weight_decay"])

    def _update(self, parts: list[tuple[Tensor, ...]], rate: float, weight_decay: float) -> None:
        """Update matrices of one shape together: (parameter, direction, mean squares of rows)."""
        parameters, ahead, row_squares = map(list, zip(*parts, strict=True))
        directions = torch.stack(ahead)  # (N, rows, columns)
        if self._dtype == torch.float16:  # in which a small gradient would lose precision
            directions /= vector_norm(directions, dim=(1, 2), keepdim=True) + 1e-30
        directions = orthogonal(directions.to(self._dtype)).float()
        size = vector_norm(directions, dim=(1, 2), keepdim=True)
        torch._foreach_lerp_(
            row_squares, directions.square().mean(2, keepdim=True).unbind(), 1 - _ROW_DECAY
        )
        directions /= torch.stack(row_squares).sqrt() + 1e-10
        directions *= size / (vector_norm(directions, dim=(1, 2), keepdim=True) + 1e-10)
        if weight_decay:  # only where the update also shrinks the weight (Chen et al. 2025)
            weights = torch.stack(parameters)
            directions.add_(weights * (directions * weights > 0), alpha=weight_decay)
        rows, columns = directions.shape[1:]
        rate = rate * max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(parameters, directions.unbind(), alpha=-rate)
