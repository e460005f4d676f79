"""AdamW with its parameter groups, NorMuon beside it, and their state by name for checkpoints."""

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
_GAINS = 0.1  # their rate as a share of the embedding's, where NorMuon has the matrices


def optimizers(model: Transformer, config: Optim) -> list[torch.optim.Optimizer]:
    """AdamW alone (Loshchilov and Hutter 2019), or NorMuon for the matrices of the blocks first.

    AdamW decays matrices and leaves the gains of norms alone. `update` sets the learning rate.
    """
    found, rest = list[torch.optim.Optimizer](), list(model.parameters())
    decay, gains = config.weight_decay, 1.0
    if config.matrix_rate:
        # On MPS its products in bfloat16 have given NaN (autoresearch#205).
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
    """() Euclidean norm of all gradients. Dot products are twice as fast as norms on a CPU."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    squares = [gradient.flatten().dot(gradient.flatten()) for gradient in gradients]
    return torch.stack(squares).sum().sqrt()


def clip(model: nn.Module, norm: float, limit: float) -> None:
    """Scale gradients of this norm down to `limit`, if they are longer. 0 turns clipping off.

    The norm is a number that the caller has waited for already: a GPU's tensor would cost a wait.
    """
    if limit and norm > limit:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, torch.tensor(norm))


def update(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """One update of every parameter, at this rate of AdamW's."""
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
    """Put back what `state_tensors` gave after `updates` updates. ValueError for another's."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        optimizer.state.clear()
    for optimizer in optimizers if updates else ():
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name, moments = names[parameter], _KEPT[type(optimizer)]
            if lacking := next((m for m in moments if f"{m}.{name}" not in tensors), None):
                raise ValueError(
                    f"no {lacking}.{name}; AdamW and NorMuon (optim.matrix_rate) do not go on from "
                    "each other, so a change of it needs another --out"
                )
            state = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in moments}
            for moment, tensor in state.items():
                row = (len(parameter), 1)
                if tensor.shape != (row if moment == "row_square" else parameter.shape):
                    raise ValueError(f"optimizer state {moment}.{name} has the wrong shape")
            device = "cpu" if isinstance(optimizer, NorMuon) else parameter.device
            count = torch.tensor(float(updates), device=device)  # NorMuon reads it at each step
            optimizer.state[parameter] = {"step": count, **state}
