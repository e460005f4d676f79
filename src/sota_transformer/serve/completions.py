"""Answers `/v1/completions`: turns a request into jobs, and tokens into a response or a stream."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import Response, StreamingResponse

from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.inference.batch import Drawn, Job
from sota_transformer.inference.generate import make_sampler
from sota_transformer.model.transformer import Transformer
from sota_transformer.serve.engine import Engine
from sota_transformer.serve.guard import error_body
from sota_transformer.serve.schema import (
    MOST_PROMPTS,
    Answer,
    Choice,
    Completion,
    Usage,
    logprobs_of,
)

SECONDS = 60.0  # time limit of one request
_LOOK_SECONDS = 0.5  # between checks that the client is still connected

Event = tuple[int, Drawn | None]
"""The key of a continuation and its next token; None if the engine failed or stops."""


@dataclass
class _Active:
    """A request in progress."""

    wanted: Completion
    prompt_tokens: int
    keys: list[int]
    queue: asyncio.Queue[Event]
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    drawn: int = 0  # tokens of all continuations


def _unavailable(text: str) -> HTTPException:
    """An error that the client may retry; the openai client does twice, and places free slowly."""
    return HTTPException(503, text, {"retry-after": "5"})


class Completions:
    """The completions route of a model."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, name: str, engine: Engine) -> None:
        self._context, self._tokenizer = model.config.seq_len, tokenizer
        self._name, self._engine = name, engine

    async def answer(self, wanted: Completion, request: Request) -> Response:
        """A whole response, or a stream. HTTPException."""
        active = await self._start(wanted)
        if wanted.stream:
            unheld = {"x-accel-buffering": "no"}  # nginx would collect pieces to fill its buffer
            return StreamingResponse(
                self._stream(active), headers=unheld, media_type="text/event-stream"
            )
        drawn = await self._collect(active, request)
        # In a thread: echoed prompts with many alternatives take seconds.
        return await asyncio.to_thread(self._whole, active, drawn)

    async def _start(self, wanted: Completion) -> _Active:
        """Submit the jobs to the engine."""
        if not (wanted.max_tokens or wanted.echo):
            raise HTTPException(400, "max_tokens: 0 is only allowed with echo")
        prompts = await asyncio.to_thread(self._prompts, wanted)
        if len(prompts) * wanted.n > MOST_PROMPTS:
            raise HTTPException(
                400, f"n: {len(prompts)} prompts times {wanted.n} are more than {MOST_PROMPTS}"
            )
        seed = wanted.seed if wanted.seed is not None else secrets.randbits(62)
        stops = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop or []
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        jobs = [
            Job(
                tokens=tokens,
                sampler=make_sampler(
                    wanted.temperature,
                    wanted.top_k,
                    wanted.top_p,
                    wanted.min_p,
                    wanted.repetition_penalty,
                    seed + number,
                ),
                max_tokens=min(wanted.max_tokens, self._context - len(tokens)),
                alternatives=wanted.logprobs,
                stops=stops,
                echo=wanted.echo,
            )
            for number, tokens in enumerate(tokens for tokens in prompts for _ in range(wanted.n))
        ]

        def deliver(*event: Any) -> None:  # from the engine's thread to the event loop
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        keys = self._engine.submit(jobs, deliver)
        if keys is None:
            raise _unavailable("the server is busy; try again in a moment")
        return _Active(wanted, sum(map(len, prompts)), keys, queue)

    def _prompts(self, wanted: Completion) -> list[list[int]]:
        """Token ids of each prompt; an empty one starts a new document."""
        given = wanted.prompt
        whole = [given] if isinstance(given, str) or not isinstance(given[0], str | list) else given
        prompts = [
            (self._tokenizer.encode(part) if isinstance(part, str) else part) or [EOT]
            for part in whole
        ]
        for tokens in prompts:
            if len(tokens) + min(wanted.max_tokens, 1) > self._context:
                # These words of OpenAI's are how clients recognize it (LangChain, LiteLLM).
                raise HTTPException(
                    400,
                    f"this model's maximum context length is {self._context:,} tokens; a prompt "
                    f"of {len(tokens):,} tokens leaves no room in it",
                )
        return prompts

    async def _events(self, active: _Active) -> AsyncIterator[tuple[int, Drawn]]:
        """Every token of every continuation; always frees their places in the end."""
        left = len(active.keys)
        try:
            async with asyncio.timeout(SECONDS):
                while left:
                    key, drawn = await active.queue.get()
                    if drawn is None:
                        stopping = self._engine.stopping
                        text = "the server is shutting down" if stopping else "the model failed"
                        raise _unavailable(f"{text}; try again")
                    left -= drawn.reason is not None
                    active.drawn += not drawn.echoed
                    yield active.keys.index(key), drawn
        except TimeoutError:
            # The openai client would try twice more, in vain.
            headers = {"x-should-retry": "false"}
            raise HTTPException(504, f"not finished after {SECONDS:.0f} seconds", headers) from None
        finally:
            self._engine.cancel(active.keys)

    async def _collect(self, active: _Active, request: Request) -> list[list[Drawn]]:
        """All tokens of each continuation; gives up if the client disconnects."""
        drawn: list[list[Drawn]] = [[] for _ in active.keys]

        async def collect() -> None:
            async for number, piece in self._events(active):
                drawn[number].append(piece)

        work = asyncio.create_task(collect())
        try:
            while not (await asyncio.wait({work}, timeout=_LOOK_SECONDS))[0]:
                if await request.is_disconnected():
                    raise _unavailable("the client disconnected")
            await work
        finally:
            work.cancel()
        return drawn

    def _whole(self, active: _Active, drawn: list[list[Drawn]]) -> Response:
        """The response in one piece."""
        choices = [self._choice(active, number, pieces) for number, pieces in enumerate(drawn)]
        return Response(self._answer(active, choices, True), media_type="application/json")

    async def _stream(self, active: _Active) -> AsyncIterator[str]:
        """Server-sent events, one per piece of text; the first has the prompt if echoed."""
        held: list[list[Drawn]] = [[] for _ in active.keys]
        try:
            async for number, piece in self._events(active):
                held[number].append(piece)
                if piece.echoed and not piece.reason:
                    continue
                if not (piece.text or piece.reason or active.wanted.logprobs is not None):
                    continue  # part of a character, or possibly of a stop string
                choice = self._choice(active, number, held[number])
                held[number] = []
                yield _event(self._answer(active, [choice], False))
                await asyncio.sleep(0)  # notice a disconnect even while tokens are queued
            options = active.wanted.stream_options
            if options is not None and options.include_usage:
                yield _event(self._answer(active, [], True))
        except HTTPException as problem:
            yield _event(json.dumps(error_body(problem.status_code, problem.detail)))
        yield _event("[DONE]")

    def _choice(self, active: _Active, number: int, drawn: list[Drawn]) -> Choice:
        """A piece of one continuation."""
        text = "".join(piece.text for piece in drawn)
        asked = active.wanted.logprobs is not None
        logprobs = logprobs_of(self._tokenizer, drawn) if asked else None
        return Choice(text=text, index=number, logprobs=logprobs, finish_reason=drawn[-1].reason)

    def _answer(self, active: _Active, choices: list[Choice], counted: bool) -> str:
        """A response or an event as ASCII JSON, with the number of tokens or without.

        Python's `iter_lines` (httpx, requests) would split an event at a raw U+2028 or U+0085.
        """
        read, drawn = active.prompt_tokens, active.drawn
        usage = Usage(prompt_tokens=read, completion_tokens=drawn, total_tokens=read + drawn)
        answer = Answer(
            id=active.id,
            object="text_completion",
            created=active.created,
            model=self._name,
            choices=choices,
            usage=usage if counted else None,
        )
        return json.dumps(answer.model_dump())


def _event(data: str) -> str:
    return f"data: {data}\n\n"
