"""Continuations that come and go in one batch: the command line and the server share this.

`Batch.add` reads a prompt into a free row; each `Batch.step` draws one token for every job and
moves all of them on with one forward pass. A finished or dropped job frees its row at once.
`Text` turns the tokens of a job into text that ends before a stop string.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from sota_transformer.inference.generate import EOT, Decoder, Rows, Sampler
from sota_transformer.model.transformer import Transformer

Reason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One continuation to make."""

    tokens: Sequence[int]
    """The prompt, at least one token."""
    sampler: Sampler
    max_tokens: int
    """At least one."""
    alternatives: int | None = None
    """How many of the likeliest tokens to report at each place; None reports no probabilities."""
    stops: Sequence[str] = ()
    """Strings that end the text; they are not part of it."""
    stop_ids: Sequence[int] = (EOT,)


class Drawn(NamedTuple):
    """One token of a job."""

    token: int
    logprob: float | None
    """Nats, under the model itself: before temperature, penalties and cuts."""
    alternatives: list[tuple[int, float]]
    """The likeliest tokens and their nats, best first."""
    text: str
    """What may be shown now that this token is known: whole characters, before any stop string."""
    reason: Reason | None
    """Why the job ends here; a token of `stop_ids` is not part of the text."""


class Batch:
    """At most `rows` jobs, known by keys of the caller's, that advance together."""

    def __init__(
        self, model: Transformer, tokenizer: Decoder, rows: int, size: int | None = None
    ) -> None:
        self._rows, self._tokenizer = Rows(model, rows, size), tokenizer
        self._going: dict[int, _Going] = {}
        self._free = list(range(rows))

    @property
    def free(self) -> int:
        """Rows that can take a job."""
        return len(self._free)

    def add(self, key: int, job: Job) -> None:
        """Read a job's prompt into a free row."""
        row = min(self._free)  # neighbours are the fastest to compute together
        self._free.remove(row)
        text = Text(self._tokenizer, job.stops)
        self._going[key] = _Going(job, row, text, self._rows.start(row, job.tokens))

    def drop(self, key: int) -> None:
        """Forget a job and free its row; nothing happens for an unknown key."""
        if going := self._going.pop(key, None):
            self._free.append(going.row)

    def step(self) -> list[tuple[int, Drawn]]:
        """One more token of every job, by key; a job whose token has a reason is done."""
        drawn = []
        for key, going in list(self._going.items()):
            result = going.draw(self._rows.tokens[going.row])
            drawn.append((key, result))
            if result.reason:
                self.drop(key)
        moving = [(self._going[key], result) for key, result in drawn if key in self._going]
        if moving:
            rows, tokens = [g.row for g, _ in moving], [result.token for _, result in moving]
            for (going, _), line in zip(moving, self._rows.step(rows, tokens), strict=True):
                going.logits = line
        return drawn


@dataclass
class _Going:
    """A job on its way: `logits` (V,) are those of its next token."""

    job: Job
    row: int
    text: "Text"
    logits: Tensor
    count: int = 0

    def draw(self, history: Sequence[int]) -> Drawn:
        """The next token and what it means."""
        token = self.job.sampler(self.logits, history)
        self.count += 1
        reason: Reason | None = "length" if self.count == self.job.max_tokens else None
        ended = token in self.job.stop_ids
        shown = "" if ended else self.text.push(token)
        if ended or self.text.stopped:
            reason = "stop"
        if reason:
            shown += self.text.finish()
        logprob, pairs = None, []
        if self.job.alternatives is not None:
            nats = self.logits.log_softmax(-1)
            best = nats.topk(min(self.job.alternatives, nats.shape[0]))
            pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            logprob = float(nats[token])
        return Drawn(token, logprob, pairs, shown, reason)


def run_jobs(
    model: Transformer, tokenizer: Decoder, jobs: Sequence[Job], rows: int
) -> Iterator[tuple[int, Drawn]]:
    """All tokens of all jobs as they come, with the number of their job; `rows` jobs at a time."""
    need = max((len(job.tokens) + job.max_tokens for job in jobs), default=1)
    batch = Batch(model, tokenizer, min(rows, max(1, len(jobs))), need)
    waiting, going = iter(enumerate(jobs)), 0
    while True:
        while batch.free and (following := next(waiting, None)):
            batch.add(*following)
            going += 1
        if not going:
            return
        for key, drawn in batch.step():
            going -= drawn.reason is not None
            yield key, drawn


class Text:
    """Text of one job, piece by piece: whole characters only, and nothing from a stop string on."""

    def __init__(self, tokenizer: Decoder, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What may be shown now that `token` is known; `stopped` tells whether that was all."""
        self._held += self._decoder.decode(self._tokenizer.decode_bytes([token]))
        return self._release(final=False)

    def finish(self) -> str:
        """The rest, at the end of the job."""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        """Give out all that cannot be the beginning of a stop string."""
        if self.stopped:
            return ""
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self._held) - (0 if final else self._hidden())
        text, self._held = self._held[:keep], self._held[keep:]
        return text

    def _hidden(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
