"""Continue token sequences: a distribution, a sampler, and a streaming loop with a KV cache.

Shapes: B rows, T tokens, S cached tokens, V vocabulary. Reading order: `probabilities` turns logits
into a distribution, `make_sampler` closes over a seed, `Rows` holds sequences of different lengths
that advance together, `generate` continues one sequence. Sampling happens on the CPU in float32
with one random number per token, so a seed gives the same text on every device as far as the
logits agree.

A sequence that fills the model's context continues with its newer half, recomputed: the cost stays
linear and the result does not depend on how the sequence was fed.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sota_transformer.config import GPT2_VOCAB
from sota_transformer.data.tokenizer import EOT
from sota_transformer.errors import DIVERGED, SotaError
from sota_transformer.model.decode import OneRow
from sota_transformer.model.transformer import Cache, Transformer

_NUCLEUS_GUESS = 512  # most likely tokens, sorted first; they nearly always cover top-p

Sampler = Callable[[Tensor, Sequence[int]], int]
"""(logits (V,) float32 on the CPU, the tokens so far) -> the next token."""


def probabilities(
    logits: Tensor,
    history: Sequence[int] = (),
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Sampling probabilities (V,) from logits (V,) float32; zero for excluded tokens.

    In this order: the penalty divides positive and multiplies negative logits of tokens in
    `history` (Keskar et al. 2019), temperature divides, then top-k, top-p and min-p exclude tokens.
    The most likely token always stays.
    """
    logits = _penalized(logits, history, repetition_penalty)
    # Relative to the maximum, so that no temperature, however small, overflows.
    logits = (logits - logits.max()) / max(temperature, 1e-6)
    if 0 < top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    chances = logits.softmax(-1)
    if top_p < 1.0:
        chances = chances * (chances >= _nucleus_edge(chances, top_p))
    if min_p > 0.0:
        chances = chances * (chances >= min_p * chances.max())
    return chances / chances.sum()


def _penalized(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Logits (V,) with tokens that already occurred made less likely."""
    if penalty == 1.0 or not history:
        return logits
    seen = torch.tensor(sorted(set(history)))
    old = logits[seen]
    logits = logits.clone()
    logits[seen] = torch.where(old > 0, old / penalty, old * penalty)
    return logits


def _nucleus_edge(chances: Tensor, top_p: float) -> float:
    """Lowest probability in the smallest set that covers `top_p` (Holtzman et al. 2020)."""
    ranked = chances.topk(min(_NUCLEUS_GUESS, len(chances))).values
    if ranked.double().sum() < top_p:
        ranked = chances.sort(descending=True).values
    before = ranked.double().cumsum(0) - ranked
    inside = int((before < top_p).sum())
    return float(ranked[max(inside, 1) - 1])


def make_sampler(
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Sampler:
    """A sampler that draws one random number per token from `seed`; temperature 0 draws none."""
    source = random.Random(seed)  # same sequence on every platform and version

    def sample(logits: Tensor, history: Sequence[int]) -> int:
        logits = logits[:GPT2_VOCAB]  # ids beyond GPT-2's vocabulary are never sampled
        if not temperature:
            penalized = _penalized(logits, history, repetition_penalty).numpy()
            best = int(penalized.argmax())  # numpy takes the first of ties, or the first NaN
            check_finite(float(penalized[best]))
            return best
        chances = probabilities(
            logits,
            history,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        # Inverse CDF in id order: rounding of the logits on another device moves the edges
        # slightly but never reorders the tokens.
        ids = chances.nonzero()[:, 0]
        edges = chances[ids].double().cumsum(0)
        check_finite(total := float(edges[-1]))
        drawn = int(torch.searchsorted(edges, source.random() * total, right=True))
        return int(ids[min(drawn, len(ids) - 1)])

    return sample


def check_finite(figure: float) -> None:
    """SotaError 70 for a figure computed from non-finite logits."""
    if not math.isfinite(figure):
        raise SotaError("the model's logits are not finite: its training diverged", DIVERGED)


class Rows:
    """Sequences of different lengths in one cache; each step is one forward pass for all."""

    def __init__(self, model: Transformer, rows: int, size: int | None = None) -> None:
        """Room for `rows` sequences of `size` tokens; the context by default and at most."""
        self.model = model
        self.size = min(size or model.config.seq_len, model.config.seq_len)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.lengths = [0] * rows  # cached tokens of each row
        self._cache = Cache(model, rows, self.size)
        self._alone: dict[int, OneRow] = {}
        self._read: tuple[int, list[int], Tensor] | None = None  # the last: row, tokens, states

    def start(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Reset a row to a prompt of at least one token; logits (V,) of the next, on the CPU.

        The model sees only the last `size` tokens of a longer prompt.
        """
        return self.logits(self.read(row, tokens)[-1:])[0]

    @torch.inference_mode()
    def read(self, row: int, tokens: Sequence[int]) -> Tensor:
        """As `start`, but returns the hidden states (T, D) of the tokens that the model sees.

        For several continuations of one prompt, only the first computes them.
        """
        self.tokens[row] = list(tokens)
        seen = self.tokens[row][-self.size :]
        self.lengths[row] = len(seen)
        if self._read is not None and self._read[1] == seen:
            known, _, hidden = self._read
            # The known row has at most grown since: a row that is reset becomes the last one read.
            store = self._cache.store[:, :, :, :, : len(seen)]
            store[:, :, row] = store[:, :, known]
            return hidden
        single = Cache(self.model, 1, len(seen))
        hidden = self.model(self._ids([seen]), cache=single)[0]
        self._cache.store[:, :, row, :, : len(seen)] = single.store[:, :, 0]
        self._read = row, seen, hidden
        return hidden

    @torch.inference_mode()
    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Add one token to each of `rows`; logits (len(rows), V) of the next ones, on the CPU."""
        result: dict[int, Tensor] = {}
        fitting = {}
        for row, token in zip(rows, tokens, strict=True):
            if self.lengths[row] < self.size:
                fitting[row] = token
                continue
            known = [*self.tokens[row], token]
            result[row] = self.start(row, known[-max(1, self.size // 2) :])
            self.tokens[row] = known
        if fitting:
            chosen = sorted(fitting)
            logits = self._advance(chosen, [fitting[row] for row in chosen])
            for row, line in zip(chosen, logits, strict=True):
                self.tokens[row].append(fitting[row])
                self.lengths[row] += 1
                result[row] = line
        return torch.stack([result[row] for row in rows])

    def _advance(self, rows: list[int], tokens: list[int]) -> Tensor:
        """One forward pass of a token at the end of each row, in their order; logits (B, V)."""
        if len(rows) == 1:  # same result with fewer kernel calls
            (row,), (token,) = rows, tokens
            if row not in self._alone:
                self._alone[row] = OneRow(self.model, self._cache.store[:, :, row])
            return self.logits(self._alone[row](token, self.lengths[row]))
        device = self._cache.store.device
        lengths = [self.lengths[row] for row in rows]
        ends = torch.tensor(lengths, device=device)
        mask = None
        if len(set(lengths)) > 1:
            mask = torch.arange(max(lengths) + 1, device=device) <= ends[:, None]  # (B, S)
            mask = mask[:, None, None, :]
        hidden = self.model(
            self._ids([[token] for token in tokens]),
            cache=_RowsCache(self._cache.store, rows, lengths, ends),
            mask=mask,
            positions=ends[:, None],
        )
        return self.logits(hidden[:, -1])

    def _ids(self, tokens: list[list[int]]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self._cache.store.device)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V) float32 on the CPU."""
        return self.model.logits(hidden).cpu()


class _RowsCache(Cache):
    """Rows of a larger store, each written at its own end, for one forward pass with T = 1."""

    def __init__(self, store: Tensor, rows: list[int], lengths: list[int], ends: Tensor) -> None:
        self.store, self.length = store, 0
        self._longest = max(lengths) + 1
        known = torch.tensor(rows, device=store.device)
        adjacent = rows[-1] - rows[0] + 1 == len(rows)
        # Adjacent rows can be read in place; others must be gathered first.
        self._read = slice(rows[0], rows[-1] + 1) if adjacent else known
        even = adjacent and len(set(lengths)) == 1  # all written at one position, without an index
        self._write = (self._read, slice(None), lengths[0]) if even else (known, slice(None), ends)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, 1, h) at each row's end; the first `longest` of each, (B, K, S, h)."""
        store = self.store[layer]
        store[0][self._write] = keys[:, :, 0]
        store[1][self._write] = values[:, :, 0]
        known = store[:, self._read, :, : self._longest]
        return known[0], known[1]


def generate(
    model: Transformer,
    tokens: Sequence[int],
    sampler: Sampler,
    max_tokens: int,
    stop_ids: Sequence[int] = (EOT,),
) -> Iterator[int]:
    """Up to `max_tokens` ids that continue `tokens` (at least one), each as soon as it is sampled.

    Ends before an id in `stop_ids`, which is not part of the text.
    """
    rows = Rows(model, 1, len(tokens) + max_tokens)
    logits = rows.start(0, tokens)
    for left in range(max_tokens, 0, -1):
        token = sampler(logits, rows.tokens[0])
        if token in stop_ids:
            return
        yield token
        if left > 1:
            logits = rows.step([0], [token])[0]
