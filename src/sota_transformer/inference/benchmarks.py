"""LAMBADA and HellaSwag by the protocols of published figures, and the scoring beneath them.

`score` computes log-probabilities of continuations, batched by length, computing shared prefixes
only once. `lambada` and `hellaswag` turn examples into such pairs and the scores into figures. Each
figure names its protocol, because two protocols can differ by 15 points for the same model.
"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sota_transformer.data.progress import Meter
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.model.transformer import Cache, Transformer

_PREFIX_TOKENS = 4096  # in one batch of shared prefixes
_LOGIT_ROWS = 1024  # predictions whose logits are in memory at once

Pair = tuple[list[int], list[int]]
"""A context of at least one token and a continuation of at least one."""


class Scored(NamedTuple):
    """A model's score of one continuation."""

    nats: float
    """Negative log-likelihood of all its tokens."""
    greedy: bool
    """Whether each of its tokens is the most likely one at its position."""
    last_nats: float
    """Negative log-likelihood of its last token, given all before."""
    last_greedy: bool
    """Whether its last token is the most likely one."""


class Benchmark(NamedTuple):
    """One figure."""

    name: str
    value: float
    error: float | None
    """Standard error over examples, where one is defined."""
    examples: int
    protocol: str


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Ids of both, split so that together they are the ids of the whole text, as in lm-eval.

    Trailing spaces of the context move to the continuation; an empty context becomes end-of-text.
    ValueError if there is nothing to score.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not continuation:
        raise ValueError(f"nothing to score after {context[-40:]!r}")
    if not kept:
        return [EOT], tokenizer.encode(continuation)
    start = tokenizer.encode(kept)
    rest = tokenizer.encode(kept + continuation)[len(start) :]
    # Where one token spans both, that may leave nothing (lm-evaluation-harness#1297).
    return start, rest or tokenizer.encode(continuation)


@torch.no_grad()
def score(model: Transformer, pairs: Sequence[Pair]) -> list[Scored]:
    """Score each pair, in the order given. Pairs with the same context should be adjacent.

    If a pair exceeds the model's context, its oldest tokens are dropped.
    """
    results: dict[int, Scored] = {}
    groups = _shared(model.config.seq_len, pairs)
    with Meter("evaluate", sum(map(_tokens, groups))) as meter:
        for members in _batches(groups):
            places = [place for _, group in members for place, _ in group]
            lines = [line for _, group in members for _, line in group]
            hidden, targets = _continue(model, members, lines)
            results |= zip(places, _read(model, hidden, targets, lines), strict=True)
            meter.add(sum(map(_tokens, members)))
    return [results[place] for place in range(len(pairs))]


_Group = tuple[list[int], list[tuple[int, list[int]]]]
"""A shared prefix, and for each pair its index and [last token of the context, *continuation]."""


def _tokens(group: _Group) -> int:
    """Number of tokens that the model reads."""
    return len(group[0]) + sum(len(line) for _, line in group[1])


def _shared(seq_len: int, pairs: Sequence[Pair]) -> list[_Group]:
    """Adjacent pairs with the same prefix, as groups; longest prefixes first."""
    seen: list[tuple[list[int], int, list[int]]] = []
    for place, (context, continuation) in enumerate(pairs):
        whole = [*context, *continuation][-seq_len - 1 :]
        begin = max(0, len(whole) - len(continuation) - 1)
        seen.append((whole[:begin], place, whole[begin:]))
    groups = [
        (prefix, [(place, line) for _, place, line in items])
        for prefix, items in groupby(seen, key=lambda item: item[0])
    ]
    return sorted(groups, key=lambda group: -len(group[0]))


def _batches(groups: list[_Group]) -> Iterator[list[_Group]]:
    """Groups whose prefixes have the same length, as many as a batch can hold."""
    for length, same in groupby(groups, key=lambda group: len(group[0])):
        batch: list[_Group] = []
        for group in same:
            grown = [*batch, group]
            lines = [len(line) for _, members in grown for _, line in members]
            full = len(lines) * max(lines) > _LOGIT_ROWS or len(grown) * length > _PREFIX_TOKENS
            if batch and full:
                yield batch
                grown = [group]
            batch = grown
        yield batch


def _continue(
    model: Transformer, groups: list[_Group], lines: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) that predict the continuations, and the targets (B, T)."""
    device = model.rope.device
    longest = max(len(line) for line in lines)
    padded = [line + [0] * (longest - len(line)) for line in lines]
    tokens = torch.tensor(padded, device=device)
    prefixes = [prefix for prefix, _ in groups]
    cache = None
    if length := len(prefixes[0]):
        cache = Cache(model, len(groups), length)
        model(torch.tensor(prefixes, device=device), cache=cache)
        repeats = torch.tensor([len(members) for _, members in groups], device=device)
        spread = Cache(model, len(lines), length + longest - 1)
        spread.store[..., :length, :] = cache.store.repeat_interleave(repeats, dim=2)
        spread.length, cache = length, spread
    return model(tokens[:, :-1], cache=cache), tokens[:, 1:]


def _read(
    model: Transformer, hidden: Tensor, targets: Tensor, lines: list[list[int]]
) -> Iterator[Scored]:
    """The scores of a batch, with the logits of a few rows at a time."""
    step = max(1, _LOGIT_ROWS // hidden.shape[1])
    for start in range(0, len(lines), step):
        logits = model.logits(hidden[start : start + step])  # (b, T, V)
        goals = targets[start : start + step]
        nats = (logits.logsumexp(-1) - logits.gather(-1, goals[..., None])[..., 0]).cpu()
        right = (logits.argmax(-1) == goals).cpu()
        for row, line in enumerate(lines[start : start + step]):
            last = len(line) - 1
            each = nats[row, :last].double()
            yield Scored(
                float(each.sum()),
                bool(right[row, :last].all()),
                float(each[-1]),
                bool(right[row, last - 1]),
            )


def _accuracy(name: str, right: Sequence[bool], protocol: str) -> Benchmark:
    return Benchmark(name, *_mean(right), len(right), protocol)


def _perplexity(name: str, nats: Sequence[float], protocol: str) -> Benchmark:
    """exp of the mean, with its error by the delta method."""
    mean, error = _mean(nats)
    value = math.exp(min(mean, 700.0))
    return Benchmark(name, value, error and value * error, len(nats), protocol)


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for a single value."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def lambada(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], standard: Sequence[str] = ()
) -> list[Benchmark]:
    """Accuracy and perplexity on the last word of each text, by each protocol the texts allow.

    `texts` are in OpenAI's form; `standard` are the originals, with spaces around punctuation.
    The perplexity of a whole-word protocol is per word, as in lm-eval.
    """
    found: list[Benchmark] = []
    if texts:
        whole = score(model, _last_words(tokenizer, texts))
        protocol = "last token"
        found += [
            _accuracy("lambada_paper accuracy", [s.last_greedy for s in whole], protocol),
            _perplexity("lambada_paper perplexity", [s.last_nats for s in whole], protocol),
        ]
        found += _whole_word("lambada_openai", whole, "whole word, lm-eval")
    if standard:
        words = score(model, _last_words(tokenizer, standard))
        found += _whole_word("lambada_standard", words, "whole word, original text")
    return found


def _last_words(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Pair]:
    """Each text, split before its last word."""
    pairs = []
    for text in texts:
        context, _, word = text.rpartition(" ")
        pairs.append(encode_pair(tokenizer, context, " " + word))
    return pairs


def _whole_word(name: str, scores: Sequence[Scored], protocol: str) -> list[Benchmark]:
    return [
        _accuracy(f"{name} accuracy", [s.greedy for s in scores], protocol),
        _perplexity(f"{name} perplexity", [s.nats for s in scores], protocol),
    ]


class Choice(NamedTuple):
    """A context with several endings, one of them correct."""

    context: str
    endings: list[str]
    label: int


def without_markup(text: str) -> str:
    """Remove WikiHow's markup, as lm-eval does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag(
    model: Transformer, tokenizer: Tokenizer, choices: Sequence[Choice]
) -> list[Benchmark]:
    """acc picks the most likely ending, acc_norm the most likely per character, as in lm-eval."""
    pairs = [
        encode_pair(tokenizer, choice.context, " " + ending)
        for choice in choices
        for ending in choice.endings
    ]
    scores = iter(score(model, pairs))
    plain, by_length = [], []
    for choice in choices:
        nats = [next(scores).nats for _ in choice.endings]
        normed = [x / len(ending) for x, ending in zip(nats, choice.endings, strict=True)]
        plain.append(nats.index(min(nats)) == choice.label)
        by_length.append(normed.index(min(normed)) == choice.label)
    return [
        _accuracy("hellaswag acc", plain, "0-shot, lm-eval"),
        _accuracy("hellaswag acc_norm", by_length, "0-shot, by character, lm-eval"),
    ]
