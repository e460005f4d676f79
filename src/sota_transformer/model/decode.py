"""Decode one token of one sequence: `Transformer`'s forward pass in as few calls as possible.

For a small model, calls cost as much as the arithmetic, and one row needs no masks, dropout or
modules. The math is that of `transformer.py`, up to rounding; tests compare the two. Shape letters
as there; everything here has B = T = 1 and omits both.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sota_transformer.model import rows
from sota_transformer.model.transformer import Attention, Block, RMSNorm, Transformer, project


def lay_for_rows(model: Transformer) -> None:
    """Store a CPU model's float32 matrices so that a product with one row reads them sequentially.

    The embedding, which is also indexed, is stored by columns: shape and values stay. MKL took
    11.9 ms for 50,258 x 768 by rows and 6.3 by columns; reading alone takes 5.6 (one core of a
    Zen 4, 24 Nov 2026). The others use panels where possible, which are faster for small matrices.
    """
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.dtype == torch.float32 and parameter.is_cpu:
            looked_up = parameter is model.embedding.weight
            parameter.data = (rows.by_columns if looked_up else rows.panels)(parameter.data)


class OneRow:
    """The layers of a model with the KV cache of one row."""

    def __init__(self, model: Transformer, store: Tensor) -> None:
        """`store` (L, 2, K, S, h) holds the row's keys and values; new ones are written to it."""
        self._model, self._blocks = model, list(cast(Iterable[Block], model.blocks))
        self._caches = store.unsqueeze(2).unbind()  # (2, 1, K, S, h) of each layer

    def __call__(self, token: int, position: int) -> Tensor:
        """Hidden state (1, D) of a token that follows `position` cached ones."""
        model = self._model
        cosine, sine = model.rope[:, position].unbind()
        x = model.embedding.weight[token : token + 1].float().clone()  # (1, D) float32
        for block, cache in zip(self._blocks, self._caches, strict=True):
            y = _norm(x, block.attention_norm).to(model.dtype)
            found = _mix(y, block.attention, cosine, sine, cache[..., : position + 1, :])
            x += project(found, block.attention.out.weight)
            y = project(_norm(x, block.mlp_norm).to(model.dtype), block.mlp.gate_up.weight)
            gate, up = y.chunk(2, -1)
            x += project(F.silu(gate).mul_(up), block.mlp.down.weight)
        return _norm(x, model.norm).to(model.dtype)


def _norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm of the last dimension, in float32."""
    x = x.float()
    if len(x) == 1 and x.is_cpu:  # four calls; the one below makes eight
        scale = (float(x[0].dot(x[0])) / x.shape[1] + norm.eps) ** -0.5
        return (x * scale).mul_(norm.weight)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _mix(y: Tensor, layer: Attention, cosine: Tensor, sine: Tensor, known: Tensor) -> Tensor:
    """Attention of (1, D) -> (1, H h); writes the token's keys and values at the end of `known`."""
    turned, width = layer.heads + layer.kv_heads, cosine.shape[0]
    qkv = project(y, layer.qkv.weight).view(turned + layer.kv_heads, width)
    qk = qkv[:turned]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = qk.split((layer.heads, layer.kv_heads))
        qk = torch.cat((_norm(q, layer.q_norm), _norm(k, layer.k_norm))).to(y.dtype)
    qkv[:turned] = (qk * cosine).addcmul_(qk.roll(width // 2, -1), sine)
    q, new = qkv.split((layer.heads, 2 * layer.kv_heads))
    known[..., -1, :] = new.view(2, 1, layer.kv_heads, width)
    if known.is_cpu:  # in bfloat16 one query takes three times as long
        q, known = q.float(), known.float()
    keys, values = known.unbind()
    q = q.view(1, layer.kv_heads, -1, width)  # no mask needed: heads of a group become its queries
    found = F.scaled_dot_product_attention(q, keys, values)
    return found.view(1, -1).to(y.dtype)
