"""Each probe of the doctor detects the fault that it is for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sota_transformer import doctor, probes
from sota_transformer.config import Run
from sota_transformer.runtime import Runtime

ATTENTION = "scaled_dot_product_attention"


def steeper(y: torch.Tensor) -> torch.Tensor:
    """The same with another gradient."""
    return y * 1.2 - (y * 0.2).detach()


def packed(x: torch.Tensor) -> torch.Tensor:
    """As a kernel reads it that takes every input for contiguous."""
    return x.as_strided(x.shape, torch.empty(x.shape).stride())


def wrong_loss(hidden, *given, original=probes.token_loss):
    sums = original(hidden, *given)
    return sums._replace(smoothed=steeper(sums.smoothed))


def wrong_linear(x, weight, bias=None, original=F.linear):
    return original(packed(x) if x.dtype == torch.bfloat16 else x, weight, bias)


def unmasked(q, k, v, attn_mask=None, original=F.scaled_dot_product_attention, **how):
    if attn_mask is not None and q.dtype == torch.bfloat16:
        attn_mask, how["is_causal"] = None, True
    return original(q, k, v, attn_mask=attn_mask, **how)


def wrong_slope(q, k, v, attn_mask=None, original=F.scaled_dot_product_attention, **how):
    y = original(q, k, v, attn_mask=attn_mask, **how)
    return steeper(y) if how["is_causal"] else y


def other_heads(q, k, v, original=F.scaled_dot_product_attention, **how):
    if k.shape[1] != q.shape[1]:
        k, v = k.flip(1), v.flip(1)
    return original(q, k, v, **how)


def ends_early(a, b, original=torch.bmm):
    y = original(a, b)
    return y.index_fill(1, torch.tensor(64), 0) if a.dtype == torch.bfloat16 else y


def wrong_square(a, b, original=torch.Tensor.__matmul__):
    y = original(a, b)
    return y.roll(1, -1) if a.dtype == torch.bfloat16 and y.ndim == 3 else y


def overflows(x, dim, original=torch.Tensor.log_softmax):
    return original(x.clamp(max=88.0), dim)  # of exp in float32


@pytest.mark.parametrize(
    ("probe", "place", "name", "fault"),
    [
        ("gradient through the vocabulary", probes, "token_loss", wrong_loss),
        ("linear of a strided input", F, "linear", wrong_linear),
        ("attention within documents", F, ATTENTION, unmasked),
        ("attention within documents", F, ATTENTION, wrong_slope),
        ("attention within documents", F, ATTENTION, other_heads),
        ("batched products", torch, "bmm", ends_early),
        ("batched products", torch.Tensor, "__matmul__", wrong_square),
        ("softmax of large logits", torch.Tensor, "log_softmax", overflows),
    ],
)
def test_each_probe_detects_what_it_is_for(
    monkeypatch, probe: str, place: Any, name: str, fault: Callable[..., Any]
) -> None:
    machine = Runtime.detect(Run(device="cpu", dtype="bfloat16", compile="off"), 1)
    (found,) = (each for name, each in probes.PROBES.items() if name.startswith(probe))
    monkeypatch.setattr(place, name, fault)
    assert not doctor._probed("broken", found, machine).passed
