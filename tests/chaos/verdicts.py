"""Expected figures for a model, in float64 from `docs/` and the papers; used by `judging.py`.

A `Subject` is a folder with a model and its weights, known independently of the program; the model
itself is in `twin.py`. Figures: Cochran's error of a ratio, lm-eval's protocols for LAMBADA and
HellaSwag, nucleus sampling (Holtzman et al. 2020), the penalty of Keskar et al. 2019. Only the
tokenizer is taken from the program.
"""

import codecs
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sota_transformer.data.tokenizer import Tokenizer

from .twin import EOT, Array, Weights, logits

DRAWN = 50_257  # ids that may be drawn; the others are not text
NEAR = 1e-4  # logits this close, as a share of the largest, may swap order


@dataclass
class Subject:
    """A model under test."""

    folder: Path
    model: dict[str, Any]  # its fields, as in a run's config.json
    weights: Weights
    masked: bool = False
    held_out: Array | None = None  # the validation split of its data
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """The context length."""
        return self.model["seq_len"]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], masked: bool = False) -> Tensor:
        """(T, V): the prediction after each token."""
        key = (int(masked), *map(int, ids))
        if key not in self._known:
            if len(self._known) > 64:
                self._known.clear()
            tokens = torch.tensor([key[1:]])
            self._known[key] = logits(self.weights, self.model, tokens, masked)[0]
        return self._known[key]

    def along(self, prompt: Sequence[int], drawn: Sequence[int]) -> Iterator[Tensor]:
        """(V,) logits for each of `drawn`. A long prompt is cut to its end, and when the context is
        full, its newer half is kept.
        """
        whole, begin, seen = [*prompt, *drawn], max(0, len(prompt) - self.context), dict[int, int]()
        begins = list[int]()
        for total in range(len(prompt), len(whole)):
            if total - begin > self.context:
                begin = total - self.context // 2
            begins.append(begin)
            seen[begin] = total
        for total, begin in enumerate(begins, len(prompt)):
            yield self.logits(whole[begin : seen[begin]])[total - begin - 1]


def make_subject(source: random.Random, folder: Path, vocab: Sequence[int]) -> Subject:
    """A model with random weights and sizes, as stored by transformers, more or less confident."""
    heads, pick = source.choice([1, 2, 4]), source.choice
    kv, width = pick([n for n in (1, 2, 4) if n <= heads]), pick([4, 6, 8])
    m = {
        "layers": pick([1, 2, 3]), "heads": heads, "kv_heads": kv, "d_model": heads * width,
        "d_ff": pick([5, 16, 24]), "seq_len": pick([8, 9, 11, 16, 33, 40]),
        "vocab_size": pick(vocab), "rope_base": pick([1e4, 300.0]), "qk_norm": pick([True, False]),
        "norm_eps": pick([1e-5, 1e-6, 0.1]),
    }  # fmt: skip
    generator, wide = torch.Generator().manual_seed(source.randrange(2**31)), m["d_model"]
    own = ["q_norm", "k_norm"] if m["qk_norm"] else []
    sizes = {
        "self_attn.q_proj": (wide, wide), "self_attn.k_proj": (kv * width, wide),
        "self_attn.v_proj": (kv * width, wide), "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (m["d_ff"], wide), "mlp.up_proj": (m["d_ff"], wide),
        "mlp.down_proj": (wide, m["d_ff"]), "input_layernorm": (wide,),
        "post_attention_layernorm": (wide,), **{f"self_attn.{name}": (width,) for name in own},
    }  # fmt: skip
    named = {f"layers.{n}.{name}": size for n in range(m["layers"]) for name, size in sizes.items()}
    named |= {"embed_tokens": (m["vocab_size"], wide), "norm": (wide,)}
    sure, stored = pick([0.2, 0.6, 1.0, 2.0]), Weights()
    for name, size in named.items():
        noise = torch.randn(size, generator=generator)
        gain = sure / math.sqrt(wide / 8) if name == "norm" else 1.0
        scale = 1.0 if name == "embed_tokens" else 1.5 / math.sqrt(size[-1])
        stored[f"model.{name}.weight"] = scale * noise if len(size) > 1 else gain * (1 + noise / 4)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    kind = "Qwen3" if m["qk_norm"] else "Llama"
    told = {
        "architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "head_dim": width,
        "hidden_size": wide, "num_hidden_layers": m["layers"], "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": m["d_ff"], "rope_theta": m["rope_base"],
        "max_position_embeddings": m["seq_len"], "vocab_size": m["vocab_size"],
        "rms_norm_eps": m["norm_eps"], "tie_word_embeddings": True, "hidden_act": "silu",
        "bos_token_id": EOT, "eos_token_id": EOT, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))
    return Subject(folder, m, _joined(stored, m["layers"]))


def _joined(stored: Weights, layers: int) -> Weights:
    """Rename transformers' tensors to those of a checkpoint, docs/format.md."""
    w = {name.removeprefix("model."): value.double() for name, value in stored.items()}
    found = {"embedding.weight": w["embed_tokens.weight"], "norm.weight": w["norm.weight"]}
    plain = {"attention.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj",
             "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
             "attention.q_norm": "self_attn.q_norm",
             "attention.k_norm": "self_attn.k_norm"}  # fmt: skip
    for n in range(layers):
        there = f"layers.{n}"
        for ours, theirs in plain.items():
            if f"{there}.{theirs}.weight" in w:
                found[f"blocks.{n}.{ours}.weight"] = w[f"{there}.{theirs}.weight"]
        qkv = [w[f"{there}.self_attn.{name}_proj.weight"] for name in "qkv"]
        found[f"blocks.{n}.attention.qkv.weight"] = torch.cat(qkv)
        both = [w[f"{there}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        found[f"blocks.{n}.mlp.gate_up.weight"] = torch.cat(both)
    return found


def sums(subject: Subject, tokens: Array, context: int, stride: int, sizes: Array) -> Array:
    """(N, 3) nats, tokens and bytes: each target counts in the first window that reaches it."""
    windows: dict[int, list[int]] = {}
    for j in range(1, len(tokens)):
        windows.setdefault(max(0, -((context - j) // stride)), []).append(j)
    rows = []
    for k, targets in windows.items():
        ids = tokens[k * stride : targets[-1] + 1].astype(np.int64)
        found = subject.logits(ids[:-1].tolist(), subject.masked).log_softmax(-1)
        own = found[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])][-len(targets) :]
        rows.append((-own.sum().item(), len(targets), sizes[ids[-len(targets) :]].sum()))
    return np.array(rows, float).reshape(-1, 3)


def figures(rows: Array) -> dict[str, Any]:
    """From sums (N, 3): the mean is a ratio of totals, with a ratio's error (Cochran)."""
    total, tokens, size = rows.sum(0)
    mean, n = total / tokens, len(rows)
    rest = rows[:, 0] - mean * rows[:, 1]
    error = rest.std(ddof=1) * math.sqrt(n) / tokens if n > 1 else None
    bits = total / math.log(2) / size if size else None
    return {"nats": mean, "error": error, "perplexity": math.exp(mean), "bits_per_byte": bits,
            "tokens": int(tokens), "sequences": n}  # fmt: skip


def paired(one: Array, other: Array) -> tuple[float, float | None]:
    """From sums over the same windows: a difference and its error; Student's if all are alike."""
    found = figures(np.column_stack([one[:, 0] - other[:, 0], one[:, 1:]]))
    if len(one) > 1 and len(set(one[:, 1])) == 1:
        apart = (one[:, 0] - other[:, 0]) / one[:, 1]
        found["error"] = apart.std(ddof=1) / math.sqrt(len(apart))
    return found["nats"], found["error"]


def asked(
    subject: Subject, tokenizer: Tokenizer, context: str, answer: str
) -> tuple[list[float], list[bool | None]]:
    """Nats of each token of an answer and whether it is the most likely (None: a tie); the text is
    split where lm-eval splits it.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(kept + context[len(kept) :] + answer)
    start = tokenizer.encode(kept)
    ids = [*(start or [EOT]), *whole[len(start) :]][-subject.context - 1 :]
    count = min(len(whole) - len(start), len(ids) - 1)
    found = subject.logits(ids[:-1])[-count:]
    own = found[torch.arange(count), torch.tensor(ids[-count:])]
    best = found.topk(2).values
    tie = best[:, 0] - best[:, 1] < NEAR * best.abs().max()
    right = (own == best[:, 0]).tolist()
    nats = (found.logsumexp(-1) - own).tolist()
    return nats, [None if t else r for r, t in zip(right, tie.tolist(), strict=True)]


def hella(text: str) -> str:
    """A HellaSwag text without WikiHow's markup, as in lm-eval's `preprocess`."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def chances(
    found: Tensor, history: Sequence[int], o: dict[str, float], slack: float = 0.0
) -> Array:
    """Probabilities from logits (V,): penalty, temperature, top-k, top-p, min-p, in this order.

    Temperature 0 keeps all that is most likely up to rounding; `slack` also keeps what a rounded
    threshold may keep.
    """
    z = found[:DRAWN].numpy().copy()
    seen = sorted({i for i in history if i < DRAWN}) if o["repetition-penalty"] != 1 else []
    z[seen] = np.where(z[seen] > 0, z[seen] / o["repetition-penalty"],
                       z[seen] * o["repetition-penalty"])  # fmt: skip
    near = NEAR * max(1.0, np.abs(z).max())
    if o["temperature"] == 0:
        left = z >= z.max() - near
        return left / left.sum()
    order = np.argsort(-z, kind="stable")
    share = np.exp((z[order] - z[order[0]]) / o["temperature"])
    if o["top-k"]:
        last = z[order][int(o["top-k"]) - 1 :][0]
        share[z[order] < last - slack * near / NEAR] = 0
    share /= share.sum()
    if o["top-p"] < 1:
        share[int((share.cumsum() < o["top-p"] + slack).sum()) + 1 :] = 0
    share[share < o["min-p"] * share[0] * (1 - 10 * slack)] = 0
    found_chances = np.zeros(DRAWN)
    found_chances[order] = share / share.sum()
    return found_chances


def rank(share: Array, token: int, fraction: float) -> float | None:
    """Where a draw lies among all, most likely first: uniform in 0 to 1 if it was drawn from
    `share`. None for a token that may not be drawn.
    """
    own = share[token]
    return float(share[share > own].sum() + fraction * own) if own else None


def fits(share: Array, drawn: Sequence[int]) -> float:
    """Pearson's chi-square: the probability of draws at least this far from the shares.

    A bin is a token or neighbors in likelihood, and expects at least eight draws.
    """
    expected, found = share * len(drawn), np.bincount(drawn, minlength=DRAWN)
    bins, wanted, counted = list[tuple[float, float]](), 0.0, 0.0
    for token in np.argsort(-share, kind="stable")[: int((share > 0).sum())]:
        wanted, counted = wanted + expected[token], counted + found[token]
        if wanted >= 8:
            bins.append((wanted, counted))
            wanted = counted = 0.0
    if not bins:
        return 1.0
    bins[-1] = (bins[-1][0] + wanted, bins[-1][1] + counted)
    e, f = np.array(bins).T
    return pearson(f, e) if len(bins) > 1 else 1.0


def pearson(found: Array, expected: Array) -> float:
    """Upper tail of chi-square with one degree of freedom fewer than bins."""
    half = torch.tensor([len(found) - 1, ((found - expected) ** 2 / expected).sum()]).double() / 2
    return torch.special.gammaincc(*half).item()


@dataclass
class Said:
    """A continuation as text: what is shown, and whether and when a stop string ended it."""

    text: str
    offsets: list[int]  # whole characters before each token, including an echoed prompt
    stopped_after: int | None  # tokens


def said(
    tokenizer: Tokenizer, echoed: Sequence[int], drawn: Sequence[int], stops: Sequence[str]
) -> Said:
    """Whole characters as they arrive, up to the first stop string outside the prompt."""
    decoder, text, offsets = codecs.getincrementaldecoder("utf-8")("replace"), "", list[int]()
    for token in echoed:
        offsets.append(len(text))
        text += decoder.decode(tokenizer.decode_bytes([token]))
    prompt, text = text, ""
    for count, token in enumerate([*drawn, None], 1):
        if token is not None:
            offsets.append(len(prompt) + len(text))
        rest = tokenizer.decode_bytes([token]) if token is not None else b""
        text += decoder.decode(rest, final=token is None)
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return Said(prompt + text[: min(places)], offsets, min(count, len(drawn)))
    return Said(prompt + text, offsets, None)
