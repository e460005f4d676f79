"""The vocabulary head and its cross-entropy in one pass, in chunks of tokens.

The logits of a micro-batch are the largest tensor of a small model, so they never exist all at
once: the logits of each chunk become losses and, in place, gradients, which the backward pass only
scales. That is three matrix products per token, the minimum.
Losses are sums; the caller divides once by the global token count.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sota_transformer.config import GPT2_VOCAB
from sota_transformer.model import cpu
from sota_transformer.model.cpu import IGNORED

PAD = GPT2_VOCAB  # the id after GPT-2's own
# Logits exist for this many tokens at a time. Each chunk adds to the whole gradient of the head,
# which matters on fast devices.
CHUNK_TOKENS = {"cpu": cpu.CHUNK_TOKENS, "mps": 2048, "cuda": 4096}
# Terms in the sums of a matrix product. With 32,767 or more, M1 and M2 add memory beyond the
# operands (pytorch#195163); the gradient of the hidden states sums over the vocabulary. A multiple
# of 64.
LONGEST_SUM = {"mps": 32_704}
ALIGNED = {"cuda": 64}  # products are fast if the head's rows are a multiple of this


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; only `smoothed` carries a gradient."""

    smoothed: Tensor
    nll: Tensor
    count: Tensor


def targets_of(windows: Tensor) -> Tensor:
    """Windows (B, T + 1) -> targets (B, T) of every token but the last; padding is IGNORED."""
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
    if hidden.dtype == torch.float16:  # gradients over a vocabulary underflow in it
        hidden = hidden.float()
    smoothed, nll = _HeadLoss.apply(hidden, head, targets, smoothing, compiled)
    return LossSums(smoothed, nll, (targets != IGNORED).sum())


class _HeadLoss(torch.autograd.Function):
    """(N, D), (V, D), (N,) -> two sums; the forward pass computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        """The sums; saves the gradients of the first for the backward pass."""
        train = any(ctx.needs_input_grad)
        # Its bfloat16 losses are within 0.002 nats: enough for training, not for evaluation.
        if hidden.is_cpu and (train or hidden.dtype == torch.float32):
            sums, *gradients = cpu.head_loss(hidden, head, targets, smoothing, train)
        else:
            sums, *gradients = _in_chunks(hidden, head, targets, smoothing, train, compiled)
        ctx.gradients, ctx.head = gradients, head
        smoothed, nll = sums.unbind()
        ctx.mark_non_differentiable(nll)
        return smoothed, nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward pass. RuntimeError on a second call.

        The gradient of a parameter is put into its `.grad` here, as in Megatron: autograd would
        copy it, 154 MB, to add the sparse gradient of the looked-up rows. Not if there is one
        already: micro-batches are summed like ranks, each one complete first.
        """
        if ctx.gradients is None:
            raise RuntimeError("the loss allows one backward pass: its gradients are used up")
        (hidden_gradient, head_gradient), ctx.gradients = ctx.gradients, None
        scale = gradients[0]
        hidden_gradient.mul_(scale.to(hidden_gradient.dtype))
        head_gradient.mul_(scale)
        if isinstance(ctx.head, nn.Parameter) and ctx.head.requires_grad and ctx.head.grad is None:
            ctx.head.grad, head_gradient = head_gradient, None
        return hidden_gradient, head_gradient, None, None, None


def _in_chunks(
    hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float, train: bool, compiled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(2,) sums and, with `train`, gradients (N, D) and float32 (V, D) of the smoothed one."""
    vocabulary, kind = len(head), hidden.device.type
    weight, missing = head.detach().to(hidden.dtype), -vocabulary % ALIGNED.get(kind, 1)
    if missing:  # F.pad copies even to add nothing
        weight = F.pad(weight, (0, 0, 0, missing))
    losses_of = _compiled_losses() if compiled else chunk_losses
    sums = torch.zeros(2, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden) if train else hidden
    head_gradient = torch.zeros_like(head, dtype=torch.float32) if train else head
    size = CHUNK_TOKENS[kind]
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        logits = hidden[part] @ weight.t()
        index = targets[part].clamp(min=0)[:, None]
        at_target = logits.gather(1, index)[:, 0]
        sums += losses_of(logits[:, :vocabulary], at_target, targets[part], smoothing, train)
        if train:
            logits.scatter_(1, index, at_target[:, None])
            hidden_gradient[part] = _product(logits, weight)
            # In the layout of the parameter; rows past the vocabulary are padding.
            head_gradient += (logits.t() @ hidden[part])[:vocabulary]
    return sums, hidden_gradient, head_gradient


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(N, V) by (V, D) -> (N, D), with no sum longer than the device computes correctly.

    Returns a new tensor: on macOS 14, up to torch 2.13, a product written into a slice of another
    one is lost (pytorch#193385).
    """
    most = LONGEST_SUM.get(a.device.type, len(b))
    product = a[:, :most].contiguous() @ b[:most]  # other backends need no copy
    for start in range(most, len(b), most):
        part = slice(start, start + most)
        product.addmm_(a[:, part].contiguous(), b[part])
    return product


def chunk_losses(
    logits: Tensor, at_target: Tensor, targets: Tensor, smoothing: float, in_place: bool
) -> Tensor:
    """(N, V) logits, (N,) of the targets, (N,) targets -> (2,) sums of smoothed and plain loss.

    With `in_place` the logits become d(smoothed)/d(logits), in their own dtype, as if no token were
    a target, and `at_target` the gradients of the targets. To gather and scatter them here would
    cost a compiled GPU kernel a second buffer of logits, and a copy.
    """
    scores = logits.float()
    valid = targets != IGNORED
    log_total = scores.logsumexp(-1)  # (N,)
    nll = log_total - at_target.float()
    uniform = log_total - scores.mean(-1)
    smoothed = (1 - smoothing) * nll + smoothing * uniform
    sums = torch.stack((smoothed, nll)).where(valid, 0.0).sum(-1)
    if in_place:
        uniform_share = smoothing / logits.shape[1]
        gradient = (scores - log_total[:, None]).exp() - uniform_share
        logits.copy_(gradient.where(valid[:, None], 0.0))
        gradient = (-nll).exp() - uniform_share - (1 - smoothing)
        at_target.copy_(gradient.where(valid, 0.0))
    return sums


@cache
def _compiled_losses() -> Any:
    """`chunk_losses`, compiled once per process."""
    return torch.compile(chunk_losses, dynamic=False)
