"""The network: a Llama with tied embeddings (a Qwen3 with qk_norm). Math only.

Shape letters: B batch, T tokens, S cached and new tokens, D width, H heads, K key/value heads,
h head dimension, V vocabulary. Reading order: RMSNorm, rotary positions, dropout, Attention,
SwiGLU, Block, Transformer. One forward serves training and generation; precision, compilation and
ranks are applied from outside. The residual stream stays float32; each branch computes in `dtype`.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sota_transformer.config import Model
from sota_transformer.model import cpu, rows


class Dropout(NamedTuple):
    """Dropout of a forward pass, a pure function of its rate and one key per row."""

    rate: Tensor  # () float32
    keys: Tensor  # (B,) int32


class Cache:
    """KV cache of a model, preallocated for `size` tokens."""

    def __init__(self, model: "Transformer", batch: int, size: int) -> None:
        config = model.config
        shape = (config.layers, 2, batch, config.kv_heads, size, config.head_dim)
        self.store = torch.zeros(shape, dtype=model.dtype, device=model.rope.device)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, h) after `length` cached tokens; returns all, (B, K, S, h)."""
        end = self.length + keys.shape[2]
        store = self.store[layer, :, :, :, :end]
        store[0, :, :, self.length :] = keys
        store[1, :, :, self.length :] = values
        return store[0], store[1]


def project(x: Tensor, weight: Tensor) -> Tensor:
    """(..., inputs) by (outputs, inputs) -> (..., outputs); casts the weight to the dtype of x.

    A weight of three dimensions is one of `rows.panels`.
    """
    weight = weight.to(x.dtype)
    if weight.ndim == 3:
        return rows.by_panels(x, weight)
    if x.numel() == weight.shape[1] and x.device.type == "cpu":
        return rows.one_row(x.reshape(1, -1), weight).view(*x.shape[:-1], -1)
    if x.is_mps:  # in 16 bits more dimensions are wrong on an M5 (pytorch#180776), slow on all Macs
        return F.linear(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return F.linear(x, weight)


class Linear(nn.Linear):
    """Linear layer without bias; casts the weight to the dtype of the activations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return project(input, self.weight)


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) of any dtype -> the same shape in float32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotary(positions: int, head_dim: int, base: float) -> Tensor:
    """Cosines and sines of Su et al. 2021, (2, positions, head_dim), halves repeated as in Llama.

    The first half of the sines is negated, for `rotate`. Computed in float32 with the order of
    operations of `transformers`, so that exports agree.
    """
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency[None, :]
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate (B, H, T, h) by the positions of rope, (2, T, h); keeps the dtype of x."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # the other half of each pair
    return (x * rope[0] + swapped * rope[1]).to(x.dtype)


def drop(x: Tensor, dropout: Dropout | None, site: int) -> Tensor:
    """Dropout of (B, T, D) whose mask is a hash of (row key, site, position).

    There is no random generator: a row drops the same elements on every device, in any micro-batch
    and on any rank, and a resumed run needs no saved random state. The hash is two rounds of
    multiply and xor-shift on int32; the resolution of the rate is 1/65,536.
    """
    if dropout is None:
        return x
    size = x.shape[1] * x.shape[2]
    index = torch.arange(size, dtype=torch.int32, device=x.device).view(1, *x.shape[1:])
    bits = (index + dropout.keys.view(-1, 1, 1) + site * 0x2545F49) * -1640531535
    bits = (bits ^ (bits >> 15)) * -2048144777
    bits = (bits ^ (bits >> 13)) * -1028477379
    least = (dropout.rate * 65_536).ceil().int()
    keep = (((bits >> 16) & 0xFFFF) - least >> 31) + 1  # 1 from `least` up; booleans are slow
    return x * (keep / (1 - dropout.rate)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention through SDPA, with its flash kernel if there is one; causal without a mask.

    (B, H, T, h), (B, K, S, h), (B, K, S, h) -> (B, H, T, h).
    """
    causal, dtype = mask is None and q.shape[2] > 1, q.dtype
    if q.is_mps:
        # Its 16-bit causal kernel lets three of four queries see the future (pytorch#195910).
        q, k, v = q.float(), k.float(), v.float()
        if k.shape[1] != q.shape[1]:  # grouped queries have crashed it (pytorch#149132)
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if mask is not None:  # misreads boolean masks for few queries (pytorch#182285)
            mask = torch.where(mask, 0.0, -torch.inf)
    grouped = k.shape[1] != q.shape[1]
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return y.to(dtype)


def same_document(documents: Tensor) -> Tensor:
    """Document numbers (B, T) -> (B, 1, T, T) causal mask: True within a token's own document.

    Rotary positions are relative, so positions need not restart at each document.
    """
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


class Attention(nn.Module):
    """Causal self-attention with rotary positions; grouped queries when K < H."""

    compiled_on_cpu = False  # set by `Runtime.optimize`

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.layer = config.heads, config.kv_heads, layer
        width = config.head_dim
        self.qkv = Linear(config.d_model, (config.heads + 2 * config.kv_heads) * width)
        self.out = Linear(config.heads * width, config.d_model)
        self.q_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rope: Tensor, cache: Cache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). `mask` (B or 1, 1, T, S) is True where attention is allowed."""
        batch, tokens, _ = x.shape
        parts = (self.heads, self.kv_heads, self.kv_heads)
        qkv = self.qkv(x).view(batch, tokens, sum(parts), -1).split(parts, dim=2)
        q, k, v = (heads.transpose(1, 2) for heads in qkv)  # (B, H or K, T, h)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = rotate(q, rope), rotate(k, rope)
        if not x.is_cuda:  # permuted q, k or v gave wrong results on MPS (pytorch#181133)
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        blockwise = self.compiled_on_cpu and self.training and cache is None
        y = (cpu.attend_in_blocks if blockwise else attend)(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and pre-norm SwiGLU, each added to the residual stream."""

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        dtype: torch.dtype,
        rope: Tensor,
        dropout: Dropout | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) float32 -> (B, T, D) float32."""
        return self.feed(self.mix(x, dtype, rope, dropout, cache, mask), dtype, dropout)

    def mix(
        self,
        x: Tensor,
        dtype: torch.dtype,
        rope: Tensor,
        dropout: Dropout | None,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> Tensor:
        """The attention half."""
        y = self.attention(self.attention_norm(x).to(dtype), rope, cache, mask)
        return x + drop(y, dropout, 1)

    def feed(self, x: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> Tensor:
        """The feed-forward half."""
        y = self.mlp(self.mlp_norm(x).to(dtype))
        return x + drop(y, dropout, 2)


class Transformer(nn.Module):
    """Token ids -> hidden states; the tied head is `logits`, or part of the loss in training."""

    rope: Tensor

    def __init__(self, config: Model, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is that of the activations; parameters are float32."""
        super().__init__()
        self.config, self.dtype = config, dtype
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        rope = rotary(config.seq_len, config.head_dim, config.rope_base)
        self.register_buffer("rope", rope, persistent=False)

    def init_weights(self, generator: torch.Generator, muon: bool = False) -> None:
        """Normal(0, 0.02); projections into the residual stream scaled by 1/sqrt(2L) (GPT-2).

        `muon`: for NorMuon, see `_init_muon`.
        """
        if muon:
            self._init_muon(generator)
            return
        residual = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                std = residual if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, 0.0, std, generator=generator)

    def _init_muon(self, generator: torch.Generator) -> None:
        """For NorMuon: blocks start as the identity, on an embedding of unit scale.

        Projections into the residual stream are zero, the other matrices uniform with standard
        deviation 0.5/sqrt(inputs). With a tied head a token would start by predicting itself, with
        a logit of sqrt(D); the last norm reduces that to a quarter. Normalized queries and keys get
        an attention scale of 0.12 (modded-nanogpt).
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.zeros_(parameter)
            elif name == "embedding.weight":
                nn.init.normal_(parameter, 0.0, 1.0, generator=generator)
            elif parameter.ndim == 2:
                edge = 3**0.5 * 0.5 * parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -edge, edge, generator=generator)
            elif name == "norm.weight":
                nn.init.constant_(parameter, 0.25 * self.config.d_model**-0.5)
            elif name.endswith("q_norm.weight"):
                nn.init.constant_(parameter, 0.12 * self.config.head_dim**0.5)
            else:
                nn.init.ones_(parameter)

    def matrices(self) -> list[tuple[Tensor, list[int]]]:
        """Weights of the blocks, each with the row counts of the matrices stacked in it."""
        shape, found = self.config, list[tuple[Tensor, list[int]]]()
        qkv = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        for block in cast(Iterable[Block], self.blocks):
            found.append((block.attention.qkv.weight, qkv))
            found.append((block.attention.out.weight, [shape.d_model]))
            found.append((block.mlp.gate_up.weight, [shape.d_ff, shape.d_ff]))
            found.append((block.mlp.down.weight, [shape.d_model]))
        return found

    def forward(
        self,
        tokens: Tensor,
        dropout: Dropout | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(B, T) int64 -> (B, T, D) hidden states in `dtype`.

        With a cache, the tokens follow the cached ones and are added to it. `positions`, (T,) or
        per row (B, T), overrides their positions, which by default follow the cached ones.
        """
        start = cache.length if cache is not None else 0
        following = slice(start, start + tokens.shape[1])
        rope = self.rope[:, following if positions is None else positions]
        if rope.ndim == 4:  # per row: (2, B, T, h) -> (2, B, 1, T, h)
            rope = rope.unsqueeze(2)
        if cache is not None and mask is None and start and tokens.shape[1] > 1:
            mask = _causal_after(start, tokens.shape[1], tokens.device)
        # The tied head's gradient is dense; on a CPU only the looked-up rows are added to it.
        # Training without the head gives the embedding a sparse gradient.
        sparse = self.training and tokens.is_cpu
        x = F.embedding(tokens, self.embedding.weight, sparse=sparse)
        x = self.begin(x, dropout)  # (B, T, D) float32
        for layer, block in enumerate(self.blocks, start=1):
            inner = dropout and Dropout(dropout.rate, dropout.keys + layer * 0x51ED27)
            given = (x, self.dtype, rope, inner, cache, mask)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*given)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.end(x)

    def begin(self, x: Tensor, dropout: Dropout | None) -> Tensor:
        """Looked-up embeddings (B, T, D) -> the residual stream, in float32."""
        return drop(x.float(), dropout, 0)

    def end(self, x: Tensor) -> Tensor:
        """The residual stream after the blocks -> hidden states in `dtype`."""
        return self.norm(x).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in float32."""
        return project(hidden, self.embedding.weight).float()


def _causal_after(start: int, tokens: int, device: torch.device) -> Tensor:
    """(1, 1, T, S) causal mask of T new tokens after `start` cached ones."""
    square = torch.ones(tokens, start + tokens, dtype=torch.bool, device=device)
    return square.tril(diagonal=start)[None, None]
