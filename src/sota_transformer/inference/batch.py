"""Continuous batching of text generation, shared by the command line and the server.

`Batch.add` reads a prompt into a free row; each `Batch.step` samples one token for every job and
advances them all with one forward pass. A job that echoes its prompt first returns the prompt's
tokens, a few per step, so that it does not hold up the others. A finished or dropped job frees its
row at once. `Text` turns the tokens of a job into text that ends before a stop string.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sota_transformer.config import GPT2_VOCAB
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.inference.generate import Rows, Sampler, check_finite
from sota_transformer.model.transformer import Transformer

Reason = Literal["stop", "length"]
Likely = list[tuple[int, float]]
"""The most likely tokens at one position and their log-probabilities in nats, best first."""
_ROWS = 16  # batch size of `run_jobs`
_ECHOED = 64  # prompt tokens whose logits are computed at once; more is no faster


@dataclass(frozen=True, kw_only=True)
class Job:
    """One continuation to make."""

    tokens: Sequence[int]
    """The prompt, at least one token."""
    sampler: Sampler
    max_tokens: int
    """At least one; 0 only with `echo`."""
    alternatives: int | None = None
    """How many of the most likely tokens to report at each position; None: no probabilities."""
    stops: Sequence[str] = ()
    """Strings that end the text; they are not part of it."""
    stop_ids: Sequence[int] = (EOT,)
    echo: bool = False
    """Return the prompt's tokens first; all of them must fit the model's context."""


class Drawn(NamedTuple):
    """One token of a job: sampled, or echoed from the prompt."""

    token: int
    logprob: float | None
    """Nats under the model itself, before temperature, penalties and truncation. None for a
    prompt's first token."""
    alternatives: Likely
    text: str
    """Text that this token completes: whole characters, before any stop string."""
    reason: Reason | None
    """Why the job ends here; a token of `stop_ids` is not part of the text."""
    offset: int
    """Whole characters before this token, including those of an echoed prompt."""
    echoed: bool
    """Whether the token belongs to the prompt."""


class Batch:
    """At most `rows` jobs that advance together, identified by the caller's keys."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, rows: int, size: int | None = None
    ) -> None:
        self._rows, self._tokenizer = Rows(model, rows, size), tokenizer
        self.running: dict[int, _Running] = {}
        self._free = list(range(rows))

    @property
    def free(self) -> int:
        """Rows that can take a job."""
        return len(self._free)

    def add(self, key: int, job: Job) -> None:
        """Read a job's prompt into a free row."""
        row = min(self._free)  # adjacent rows are the fastest to compute together
        self._free.remove(row)
        text = Text(self._tokenizer, job.stops)
        hidden = self._rows.read(row, job.tokens)
        running = _Running(job, row, text, self._rows.logits(hidden[-1:])[0])
        if job.echo:
            assert len(hidden) == len(job.tokens)
            running.echoing = running.echo(self._rows, hidden)
        self.running[key] = running

    def drop(self, key: int) -> None:
        """Remove a job and free its row; ignores an unknown key."""
        if running := self.running.pop(key, None):
            self._free.append(running.row)

    def step(self) -> list[tuple[int, Drawn]]:
        """One more token of every job, by key; a job whose token has a reason is done.

        A job that echoes returns a few tokens of its prompt instead, until none are left.
        """
        drawn: list[tuple[int, Drawn]] = []
        advancing: list[tuple[_Running, Drawn]] = []
        for key, running in list(self.running.items()):
            results = next(running.echoing, None) or [running.draw(self._rows.tokens[running.row])]
            drawn += [(key, result) for result in results]
            if results[-1].reason:
                self.drop(key)
            elif not results[-1].echoed:
                advancing.append((running, results[-1]))
        if advancing:
            rows, tokens = [r.row for r, _ in advancing], [result.token for _, result in advancing]
            for (running, _), line in zip(advancing, self._rows.step(rows, tokens), strict=True):
                running.logits = line
        return drawn


@dataclass
class _Running:
    """A running job: `logits` (V,) are those of its next token."""

    job: Job
    row: int
    text: "Text"
    logits: Tensor
    count: int = 0
    echoing: Iterator[list[Drawn]] = field(default_factory=lambda: iter(()))

    def echo(self, rows: Rows, hidden: Tensor) -> Iterator[list[Drawn]]:
        """The prompt's tokens, a few at a time; `hidden` (T, D) predicts the one after each."""
        tokens, count = self.job.tokens, self.job.alternatives
        for begin in range(0, len(tokens), _ECHOED):
            part = tokens[begin : begin + _ECHOED]
            known: list[tuple[float | None, Likely]] = [(None, [])] * len(part)
            if count is not None:
                first, end = max(begin, 1), begin + len(part)  # nothing predicts the first token
                logits = rows.logits(hidden[first - 1 : end - 1])
                known[first - begin :] = _nats(logits, tokens[first:end], count)
            drawn = []
            for token, (logprob, pairs) in zip(part, known, strict=True):
                offset = self.text.length
                text = self.text.pass_on(token)
                drawn.append(Drawn(token, logprob, pairs, text, None, offset, True))
            if begin + len(part) == len(tokens) and not self.job.max_tokens:
                shown = drawn[-1].text + self.text.finish()
                drawn[-1] = drawn[-1]._replace(text=shown, reason="length")
            yield drawn

    def draw(self, history: Sequence[int]) -> Drawn:
        """Sample the next token."""
        offset = self.text.length
        token = self.job.sampler(self.logits, history)
        self.count += 1
        reason: Reason | None = "length" if self.count == self.job.max_tokens else None
        ended = token in self.job.stop_ids
        shown = "" if ended else self.text.push(token)
        if reason or ended or self.text.stopped:
            shown += self.text.finish()  # an incomplete character may complete a stop string
        if ended or self.text.stopped:
            reason = "stop"
        logprob, pairs = None, []
        if self.job.alternatives is not None:
            ((logprob, pairs),) = _nats(self.logits[None], [token], self.job.alternatives)
        return Drawn(token, logprob, pairs, shown, reason, offset, False)


def _nats(logits: Tensor, tokens: Sequence[int], count: int) -> list[tuple[float, Likely]]:
    """Log-probability in nats of each token under its logits (n, V), and the `count` best."""
    nats = logits.log_softmax(-1)
    places = torch.tensor(tokens, dtype=torch.int64)
    chosen = nats.gather(1, places[:, None])[:, 0]
    check_finite(float(chosen.sum()))
    best = nats[:, :GPT2_VOCAB].topk(count)
    likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    pairs = [list(zip(ids, values, strict=True)) for ids, values in likely]
    return list(zip(chosen.tolist(), pairs, strict=True))


def run_jobs(
    model: Transformer, tokenizer: Tokenizer, jobs: Sequence[Job], rows: int = _ROWS
) -> Iterator[tuple[int, Drawn]]:
    """The tokens of all jobs as they are sampled, each with its job's index; `rows` at a time."""
    need = max((len(job.tokens) + job.max_tokens for job in jobs), default=1)
    batch = Batch(model, tokenizer, min(rows, max(1, len(jobs))), need)
    waiting, running = iter(enumerate(jobs)), 0
    while True:
        while batch.free and (following := next(waiting, None)):
            batch.add(*following)
            running += 1
        if not running:
            return
        for key, drawn in batch.step():
            running -= drawn.reason is not None
            yield key, drawn


class Text:
    """Text of one job, piece by piece: whole characters only, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._behind = max((len(stop) - 1 for stop in self._stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.length = 0  # whole characters so far, released or not
        self.stopped = False

    def pass_on(self, token: int) -> str:
        """The text that a prompt token adds; stop strings are not searched for in it."""
        text = self._decoder.decode(self._tokenizer.decode_bytes([token]))
        self.length += len(text)
        return text

    def push(self, token: int) -> str:
        """The text that `token` releases; `stopped` is set once a stop string is found."""
        self._held += self.pass_on(token)
        return self._release(final=False)

    def finish(self) -> str:
        """The remaining text, at the end of the job."""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        """Release the text up to a stop string, or all that is too far back to begin one."""
        if self.stopped:
            return ""
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        known = len(self._held) if final else max(0, len(self._held) - self._behind)
        keep = min(found, default=known)
        text, self._held = self._held[:keep], self._held[keep:]
        return text
