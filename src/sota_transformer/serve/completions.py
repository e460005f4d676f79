"""Answers `/v1/completions`: a request becomes jobs, their tokens become an answer or a stream."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import HTTPException, Request
from fastapi.responses import Response, StreamingResponse

from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.inference.batch import Drawn, Job
from sota_transformer.inference.generate import make_sampler
from sota_transformer.model.transformer import Transformer
from sota_transformer.serve.engine import Deliver, Engine
from sota_transformer.serve.guard import error_body
from sota_transformer.serve.schema import Answer, Choice, Completion, Usage, logprobs_of

SECONDS = 60.0  # of one request
_LOOK_SECONDS = 0.5  # between two looks whether the client is still there

Event = tuple[int, Drawn | None]
"""The number of a continuation and its next token; None when the engine failed or stops."""


@dataclass
class _Going:
    """One request on its way."""

    wanted: Completion
    prompt_tokens: int
    keys: list[int]
    queue: asyncio.Queue[Event]
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    drawn: int = 0  # tokens of all continuations


def _unavailable(text: str) -> HTTPException:
    """What the same request may meet no more in a moment."""
    return HTTPException(503, text, {"retry-after": "1"})


class Completions:
    """The model, its tokenizer and its engine, as one route needs them."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, name: str, engine: Engine) -> None:
        self._context, self._tokenizer = model.config.seq_len, tokenizer
        self._name, self._engine = name, engine

    async def answer(self, wanted: Completion, request: Request) -> Response:
        """A whole answer, or a stream. HTTPException."""
        going = await self._start(wanted)
        if wanted.stream:
            return StreamingResponse(self._stream(going), media_type="text/event-stream")
        drawn = await self._collect(going, request)
        # Seconds of work where prompts are echoed with many alternatives.
        return await asyncio.to_thread(self._whole, going, drawn)

    async def _start(self, wanted: Completion) -> _Going:
        """Hand the jobs to the engine."""
        if not (wanted.max_tokens or wanted.echo):
            raise HTTPException(422, "max_tokens: 0 without echo leaves nothing to answer")
        prompts = await asyncio.to_thread(self._prompts, wanted)
        seed = wanted.seed if wanted.seed is not None else secrets.randbits(62)
        stops = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop or []
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        jobs = []
        for number, tokens in enumerate(tokens for tokens in prompts for _ in range(wanted.n)):
            sampler = make_sampler(
                wanted.temperature,
                wanted.top_k,
                wanted.top_p,
                wanted.min_p,
                wanted.repetition_penalty,
                seed + number,
            )
            job = Job(
                tokens=tokens,
                sampler=sampler,
                max_tokens=min(wanted.max_tokens, self._context - len(tokens)),
                alternatives=wanted.logprobs,
                stops=stops,
                echo=wanted.echo,
            )
            jobs.append((job, _deliver(loop, queue, number)))
        keys = self._engine.submit(jobs)
        if keys is None:
            raise _unavailable("all places are taken; try again in a moment")
        return _Going(wanted, sum(map(len, prompts)), keys, queue)

    def _prompts(self, wanted: Completion) -> list[list[int]]:
        """Token ids of each prompt; an empty one begins a document."""
        given = wanted.prompt
        whole = [given] if isinstance(given, str) or not isinstance(given[0], str | list) else given
        prompts = [
            (self._tokenizer.encode(part) if isinstance(part, str) else part) or [EOT]
            for part in whole
        ]
        for tokens in prompts:
            if len(tokens) + min(wanted.max_tokens, 1) > self._context:
                raise HTTPException(
                    422,
                    f"a prompt of {len(tokens):,} tokens leaves no room in the context of "
                    f"{self._context:,} tokens",
                )
        return prompts

    async def _events(self, going: _Going) -> AsyncIterator[tuple[int, Drawn]]:
        """Every token of every continuation; whatever ends it, the places are free again."""
        left = len(going.keys)
        try:
            async with asyncio.timeout(SECONDS):
                while left:
                    number, drawn = await going.queue.get()
                    if drawn is None:
                        stopping = self._engine.stopping
                        text = "the server is stopping" if stopping else "the model failed"
                        raise _unavailable(f"{text}; try again")
                    left -= drawn.reason is not None
                    going.drawn += not drawn.echoed
                    yield number, drawn
        except TimeoutError:
            raise HTTPException(504, f"not done after {SECONDS:.0f} seconds") from None
        finally:
            self._engine.cancel(going.keys)

    async def _collect(self, going: _Going, request: Request) -> list[list[Drawn]]:
        """All tokens of each continuation; given up as soon as the client has left."""
        drawn: list[list[Drawn]] = [[] for _ in going.keys]

        async def collect() -> None:
            async for number, piece in self._events(going):
                drawn[number].append(piece)

        work = asyncio.create_task(collect())
        try:
            while not (await asyncio.wait({work}, timeout=_LOOK_SECONDS))[0]:
                if await request.is_disconnected():
                    raise _unavailable("the client has left")
            await work
        finally:
            work.cancel()
        return drawn

    def _whole(self, going: _Going, drawn: list[list[Drawn]]) -> Response:
        """The answer in one piece."""
        choices = [self._choice(going, number, pieces) for number, pieces in enumerate(drawn)]
        text = self._answer(going, choices, self._usage(going)).model_dump_json()
        return Response(text, media_type="application/json")

    async def _stream(self, going: _Going) -> AsyncIterator[str]:
        """Server-sent events, one for each piece of text, the first with the prompt if echoed."""
        held: list[list[Drawn]] = [[] for _ in going.keys]
        try:
            async for number, piece in self._events(going):
                held[number].append(piece)
                if piece.echoed and not piece.reason:
                    continue
                if not (piece.text or piece.reason or going.wanted.logprobs is not None):
                    continue  # a part of a character, or perhaps of a stop string
                choice = self._choice(going, number, held[number])
                held[number] = []
                yield _event(self._answer(going, [choice], None).model_dump_json())
                await asyncio.sleep(0)  # a client that leaves is noticed amid what has queued up
            options = going.wanted.stream_options
            if options is not None and options.include_usage:
                yield _event(self._answer(going, [], self._usage(going)).model_dump_json())
        except HTTPException as problem:
            yield _event(json.dumps(error_body(problem.status_code, problem.detail)))
        yield _event("[DONE]")

    def _choice(self, going: _Going, number: int, drawn: list[Drawn]) -> Choice:
        """Some tokens of one continuation."""
        text = "".join(piece.text for piece in drawn)
        asked = going.wanted.logprobs is not None
        logprobs = logprobs_of(self._tokenizer, drawn) if asked else None
        return Choice(text=text, index=number, logprobs=logprobs, finish_reason=drawn[-1].reason)

    def _usage(self, going: _Going) -> Usage:
        total = going.prompt_tokens + going.drawn
        return Usage(
            prompt_tokens=going.prompt_tokens, completion_tokens=going.drawn, total_tokens=total
        )

    def _answer(self, going: _Going, choices: list[Choice], usage: Usage | None) -> Answer:
        return Answer(
            id=going.id,
            object="text_completion",
            created=going.created,
            model=self._name,
            choices=choices,
            usage=usage,
        )


def _deliver(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Event], number: int) -> Deliver:
    """From the engine's thread into the loop's queue."""

    def deliver(drawn: Drawn | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, (number, drawn))

    return deliver


def _event(data: str) -> str:
    return f"data: {data}\n\n"
