"""The vocabulary head and its cross-entropy in one pass, in chunks of tokens.

The logits of a micro-batch are the largest tensor of a small model, so they never exist in
float32 nor all at once: each chunk is multiplied, turned into losses and in place into gradients,
which the backward pass only scales. That is three matrix products a token, the fewest possible.
Losses are sums; the caller divides once by the global token count.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sota_transformer.config import GPT2_VOCAB

PAD = GPT2_VOCAB  # the id behind GPT-2's own
IGNORED = -1  # a target that counts nowhere
CHUNK_TOKENS = 512  # logits in flight: a chunk stays in a CPU's cache between its three uses
ALIGNED = {"cuda": 64}  # rows of the head that a device's products want a multiple of
SLICE_TOKENS = 16  # of them, in three passes over a CPU core's own cache
GROUP_TOKENS = 1024  # logits kept, as gradients, until one product gives the head's gradient
STRIP_ROWS = 8192  # of the head's gradient that a product makes at a time


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; only `smoothed` carries a gradient."""

    smoothed: Tensor
    nll: Tensor
    count: Tensor


def targets_of(windows: Tensor) -> Tensor:
    """Windows (B, T + 1) -> (B, T), what each token but the last shall predict; no padding."""
    targets = windows[:, 1:]
    return targets.masked_fill(targets == PAD, IGNORED)


def token_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float, compiled: bool = False
) -> LossSums:
    """Loss of hidden states (..., D) under the head (V, D) for targets (...,) int64.

    `smoothed` mixes each target with the uniform distribution over V by `smoothing`
    (Szegedy et al. 2016); `nll` is the plain negative log-likelihood in nats.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if hidden.dtype == torch.float16:  # its gradients over a vocabulary are too small for it
        hidden = hidden.float()
    smoothed, nll = _HeadLoss.apply(hidden, head, targets, smoothing, compiled)
    return LossSums(smoothed, nll, (targets != IGNORED).sum())


class _HeadLoss(torch.autograd.Function):
    """(N, D), (V, D), (N,) -> two sums; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        """The sums; keeps the gradients of the first for the backward pass."""
        train = any(ctx.needs_input_grad)
        vocabulary, kind = len(head), hidden.device.type
        weight, missing = head.detach().to(hidden.dtype), -vocabulary % ALIGNED.get(kind, 1)
        if missing:  # torch would copy it even to add nothing
            weight = F.pad(weight, (0, 0, 0, missing))
        rows = SLICE_TOKENS if compiled and kind == "cpu" else CHUNK_TOKENS
        losses_of = _compiled_losses() if compiled else chunk_losses
        sums = torch.zeros(2, device=hidden.device)
        hidden_gradient, head_gradient = torch.empty_like(hidden) if train else hidden, None
        group_tokens = min(len(hidden), GROUP_TOKENS if train else CHUNK_TOKENS)
        buffer = hidden.new_empty(group_tokens, len(weight))  # logits, then their gradients
        if train:
            head_gradient = torch.zeros_like(head, dtype=torch.float32)
        for begin in range(0, len(hidden), group_tokens):
            group = slice(begin, min(begin + group_tokens, len(hidden)))
            for start in range(begin, group.stop, CHUNK_TOKENS):
                part = slice(start, min(start + CHUNK_TOKENS, group.stop))
                logits = buffer[start - begin : part.stop - begin]
                torch.mm(hidden[part], weight.t(), out=logits)
                pieces = logits[:, :vocabulary].split(rows), targets[part].split(rows)
                for scores, answers in zip(*pieces, strict=True):
                    sums += losses_of(scores, answers, smoothing, train)
                if train:
                    torch.mm(logits, weight, out=hidden_gradient[part])
            if head_gradient is not None:
                _add_product(head_gradient, buffer[: group.stop - begin], hidden[group])
        ctx.save_for_backward(hidden_gradient, head_gradient)
        smoothed, nll = sums.unbind()
        ctx.mark_non_differentiable(nll)
        return smoothed, nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass made."""
        hidden_gradient, head_gradient = ctx.saved_tensors
        scale = gradients[0]
        hidden_gradient = hidden_gradient * scale.to(hidden_gradient.dtype)
        return hidden_gradient, head_gradient.mul_(scale), None, None, None


def _add_product(total: Tensor, gradients: Tensor, hidden: Tensor) -> None:
    """Add (N, V) gradients of logits times (N, D) hidden states to `total`, (V, D) float32.

    In the layout of the parameter, and in strips that a CPU's cache holds between product and sum.
    """
    for begin in range(0, len(total), STRIP_ROWS):
        rows = slice(begin, begin + STRIP_ROWS)
        product = gradients[:, rows].t() @ hidden
        total[rows] += product[: len(total) - begin]  # rows behind the vocabulary are padding


def chunk_losses(logits: Tensor, targets: Tensor, smoothing: float, in_place: bool) -> Tensor:
    """(N, V) logits and (N,) targets -> (2,) float32 sums of smoothed and plain loss.

    With `in_place` the logits become d(smoothed)/d(logits), in their own type.
    """
    scores = logits.float()
    valid = targets != IGNORED
    index = targets.clamp(min=0)[:, None]
    log_total = scores.logsumexp(-1)  # (N,)
    nll = log_total - scores.gather(1, index)[:, 0]
    uniform = log_total - scores.mean(-1)
    smoothed = (1 - smoothing) * nll + smoothing * uniform
    sums = torch.stack((smoothed, nll)).where(valid, 0.0).sum(-1)
    if in_place:
        uniform_share = smoothing / logits.shape[1]
        gradient = (scores - log_total[:, None]).exp() - uniform_share
        at_target = (-nll).exp() - uniform_share - (1 - smoothing)
        logits.copy_(gradient.where(valid[:, None], 0.0))
        logits.scatter_(1, index, at_target.where(valid, 0.0)[:, None].to(logits.dtype))
    return sums


_COMPILED: list[Any] = []


def _compiled_losses() -> Any:
    """`chunk_losses` compiled, once a process."""
    if not _COMPILED:
        _COMPILED.append(torch.compile(chunk_losses, dynamic=False))
    return _COMPILED[0]
