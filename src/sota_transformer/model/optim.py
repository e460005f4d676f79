"""AdamW with its parameter groups, NorMuon, and their state by name for checkpoints."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sota_transformer.config import Optim
from sota_transformer.model.muon import NorMuon
from sota_transformer.model.transformer import Transformer

_KEPT: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    NorMuon: ("momentum", "row_square"),
}
_GAINS = 0.1  # norm gains' learning rate relative to the embedding's, with NorMuon


def optimizers(model: Transformer, config: Optim) -> list[torch.optim.Optimizer]:
    """AdamW alone (Loshchilov and Hutter 2019), or NorMuon for the blocks' matrices and then AdamW.

    AdamW decays matrices, not norm gains. `update` sets the learning rate.
    """
    found, rest = list[torch.optim.Optimizer](), list(model.parameters())
    decay, gains = config.weight_decay, 1.0
    if config.matrix_rate:
        # On MPS its bfloat16 products have given NaN (autoresearch#205).
        products = torch.float32 if model.embedding.weight.is_mps else model.dtype
        muon = NorMuon(model.matrices(), config.weight_decay, products)
        muon.param_groups[0]["relative_rate"] = config.matrix_rate / config.learning_rate
        taken = {id(p) for p in muon.param_groups[0]["params"]}
        rest = [p for p in rest if id(p) not in taken]
        found, decay, gains = [muon], 0.0, _GAINS
    matrices = {"params": [p for p in rest if p.ndim >= 2], "relative_rate": 1.0}
    vectors = {"params": [p for p in rest if p.ndim < 2], "relative_rate": gains}
    groups = [matrices | {"weight_decay": decay}, vectors | {"weight_decay": 0.0}]
    betas, eps = (config.beta1, config.beta2), config.eps
    return [*found, torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)]


def gradient_norm(model: nn.Module) -> Tensor:
    """() Euclidean norm of all gradients. On a CPU, dot products are twice as fast as norms."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    squares = [gradient.flatten().dot(gradient.flatten()) for gradient in gradients]
    return torch.stack(squares).sum().sqrt()


def clip(model: nn.Module, norm: float, limit: float) -> None:
    """Scale gradients of norm `norm` down to at most `limit`. 0 turns clipping off.

    The caller has the norm as a number already; a GPU tensor would cost another synchronization.
    """
    if limit and norm > limit:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, torch.tensor(norm))


def update(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """One update of every parameter; `rate` is AdamW's learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["relative_rate"]
        optimizer.step()


def state_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The moments as {"exp_avg.NAME": tensor, ...}; empty before the first update."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        if parameter in optimizer.state
        for moment in _KEPT[type(optimizer)]
    }


def load_state_tensors(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: dict[str, Tensor],
    updates: int,
) -> None:
    """Restore what `state_tensors` gave after `updates`. KeyError or ValueError if it is unfit."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        optimizer.state.clear()
    for optimizer in optimizers if updates else ():
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name, row = names[parameter], (len(parameter), 1)
            # Copies: maps of a checkpoint's file would keep its space after it is deleted, and some
            # network drives rename no folder with a mapped file.
            state = {
                moment: tensors[f"{moment}.{name}"].to(parameter.device, copy=True)
                for moment in _KEPT[type(optimizer)]
            }
            for moment, tensor in state.items():
                if tensor.shape != (row if moment == "row_square" else parameter.shape):
                    raise ValueError(f"optimizer state {moment}.{name} has the wrong shape")
            device = "cpu" if isinstance(optimizer, NorMuon) else parameter.device
            count = torch.tensor(float(updates), device=device)  # NorMuon reads it at every step
            optimizer.state[parameter] = {"step": count, **state}
