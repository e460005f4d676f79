"""AdamW with its parameter groups, and its state by parameter name for checkpoints."""

import torch
from torch import Tensor, nn

from sota_transformer.config import Optim

_MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(model: nn.Module, config: Optim) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices and leaves the gains of norms alone.

    The learning rate is set by the trainer before each update.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def gradient_norm(model: nn.Module) -> Tensor:
    """() Euclidean norm of all gradients. Dot products are twice as fast as norms on a CPU."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    squares = [gradient.flatten().dot(gradient.flatten()) for gradient in gradients]
    return torch.stack(squares).sum().sqrt()


def clip(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scale gradients of this norm down to `limit`, if they are longer. 0 turns clipping off."""
    if limit and norm > limit:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next update, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments as {"exp_avg.NAME": tensor, ...}; empty before the first update."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], updates: int
) -> None:
    """Put back what `state_tensors` gave after `updates` updates. KeyError for a missing name."""
    for name, parameter in model.named_parameters() if updates else ():
        state = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
        if any(moment.shape != parameter.shape for moment in state.values()):
            raise ValueError(f"optimizer state of {name} has the wrong shape")
        count = torch.tensor(float(updates), device=parameter.device)
        optimizer.state[parameter] = {"step": count, **state}
