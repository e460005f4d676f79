"""Output of `sota generate` and the server, compared with `verdicts.py`: text, ends, probabilities.

`judging.py` makes the models and checks everything else.
"""

import io
import json
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi.testclient import TestClient

from sota_transformer.commands.common import open_to_generate
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.serve.engine import Engine
from sota_transformer.serve.guard import Guard
from sota_transformer.serve.schema import Curve
from sota_transformer.serve.server import build_app, content_policy

from .commands import Finished
from .folders import command
from .twin import EOT
from .verdicts import DRAWN, NEAR, Said, Subject, chances, fits, pearson, rank, said

ALLOWED = 1e-4  # difference of a loss, relative to a magnitude of at least 1
SELDOM = 1e-8  # p-value below which a test of draws fails
DRAWS = 400
WORDS = ["def f(x):", "\n", "  ", "the", " cat", "Ünïcödé", "日本語", "🦊🦊", "x" * 9, "\t", "1234",
         "<b>", "<|endoftext|>", " a", ".", ", and", "it's", "\n\n", "Ωmega", " return None",
         "🏳️‍🌈"]  # fmt: skip


@dataclass
class Result:
    """What was asked and compared, and what is wrong."""

    asked: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    largest: Counter[str] = field(default_factory=Counter)
    ranks: list[float] = field(default_factory=list)
    """Rank of each drawn token in its distribution; together they have to be uniform."""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        asked = ", ".join(f"{number:,} {name}" for name, number in sorted(self.asked.items()))
        far = ", ".join(f"{name} {value:.1e}" for name, value in sorted(self.largest.items()))
        text = f"{asked}; {self.compared:,} figures, largest differences: {far}"
        return f"{text}; the ranks of {len(self.ranks):,} draws are uniform: p = {self.even():.2g}"

    def even(self) -> float:
        """The p-value of ranks this uneven."""
        bins = max(2, min(20, len(self.ranks) // 10))
        counts = np.histogram(self.ranks, bins, (0, 1))[0]
        return pearson(counts, np.full(bins, max(1, len(self.ranks)) / bins))

    def same(self, case: str, name: str, value: Any, wanted: Any, allowed: float = 0.0) -> None:
        """Compare one figure, or anything, with the reference."""
        self.compared += 1
        if value is None or not isinstance(wanted, float):
            far = 0.0 if value == wanted else math.inf
        else:
            far = abs(value - wanted) / max(1.0, abs(wanted))
        kind = name.split(",")[0]
        if far:
            self.largest[kind] = max(self.largest[kind], far)
        if not far <= allowed:
            self.wrong.append(f"{case}: {name} is {value!r}, and should be {wanted!r}")


def some_text(source: random.Random, words: int) -> str:
    """Words, punctuation and whitespace of every kind."""
    return "".join(source.choice(WORDS) + source.choice(["", " "]) for _ in range(words))


class Writing:
    """Asks for continuations and compares."""

    def __init__(self, root: Path) -> None:
        self.root, self.result, self.tokenizer = root, Result(), Tokenizer()
        self.noise = random.Random(0)
        self.names = {self._shown(token): token for token in range(DRAWN)}

    def _shown(self, token: int) -> str:
        """A token's name in OpenAI's lists."""
        data = self.tokenizer.decode_bytes([token])
        try:
            return data.decode() or "<|endoftext|>"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def ask(self, name: str, verb: str, *words: object, given: str = "") -> list[Any] | Finished:
        """The JSON lines of a command, or how it ended if it failed."""
        self.result.asked[verb] += 1
        before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(given.encode()))
        try:
            done = command(verb, *words)
        finally:
            sys.stdin = before
        if done.code:
            told = " ".join(map(str, words))
            self.result.wrong.append(f"{name}: {verb} {told}: {done.code}: {done.output[-900:]}")
            return done
        return [json.loads(line) for line in done.output.split("\n") if line[:1] == "{"]

    def _options(self, source: random.Random) -> dict[str, float]:
        """Sampling options."""
        pick = source.choice
        return {"temperature": pick([0, 0.3, 0.8, 1.0, 2.5]), "top-k": pick([0, 0, 1, 3, 40]),
                "top-p": pick([1.0, 1.0, 0.95, 0.5, 0.01]), "min-p": pick([0.0, 0.0, 0.1, 0.5]),
                "repetition-penalty": pick([1.0, 1.0, 1.3, 0.7])}  # fmt: skip

    def _prompt(self, source: random.Random, longest: int) -> str:
        """A text of at most about `longest` tokens, possibly empty or just fitting."""
        ids = self.tokenizer.encode(some_text(source, longest))
        return self.tokenizer.decode(
            ids[: source.choice([0, 1, longest, source.randint(1, longest)])]
        )

    def _drawn(
        self, case: str, one: Subject, prompt: list[int], drawn: list[int], o: dict[str, float]
    ) -> None:
        """Whether each token may be drawn, and its rank among those that may."""
        history = list(prompt)
        for token, found in zip(drawn, one.along(prompt, drawn), strict=True):
            self.result.compared += 1
            place = rank(chances(found, history, o), token, self.noise.random())
            if place is None and not chances(found, history, o, NEAR)[token]:
                self.result.wrong.append(f"{case}: {token} after {history} may not be drawn, {o}")
            if place is not None and o["temperature"]:
                self.result.ranks.append(place)
            history.append(token)

    def _ended(
        self, case: str, story: Said, tokens: list[int], reason: str, most: int
    ) -> list[int]:
        """Check the end of a continuation; return what was drawn, with end-of-text."""
        if story.stopped_after is not None:
            end = ("stop", story.stopped_after)
        else:
            end = ("length", most) if reason == "length" else ("stop", len(tokens))
        self.result.same(case, "end", (reason, len(tokens)), end)
        at_text_end = reason == "stop" and story.stopped_after is None
        return [*tokens, EOT] if at_text_end else tokens

    def generate(self, name: str, one: Subject, place: Path, source: random.Random) -> None:
        """Prompts of uneven lengths in one batch, and one of them alone."""
        o, context, seed = self._options(source), one.context, source.randrange(10**9)
        count = source.choice([1, 2, 4, 18])
        prompts = [self._prompt(source, context + 4) for _ in range(count)]
        most = source.choice([1, 2, 5, 12] if count > 4 else [1, 5, context // 2, context + 5])
        words = [f"--{key}={value}" for key, value in o.items()] + ["--json", "--device", "cpu"]
        words += ["--max-tokens", most, "--logprobs", source.choice([0, 3])]
        stops = source.sample(
            ["a", "e", " t", "th", "ing", ". ", "\ufffd"], source.choice([0, 0, 2])
        )
        words += ["--stop", *stops] if stops else []
        path = place / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
        told = self.ask(name, "generate", one.folder, "--file", path, "--seed", seed, *words)
        if isinstance(told, Finished):
            return
        case, same = f"{name} {' '.join(map(str, words))} seed {seed} generate", self.result.same
        same(case, "prompts", [each["prompt"] for each in told], prompts)
        for each in told:
            prompt, tokens = self.tokenizer.encode(each["prompt"]) or [EOT], each["tokens"]
            story = said(self.tokenizer, [], tokens, stops)
            same(case, "text", each["text"], story.text)
            drawn = self._ended(case, story, tokens, each["finish_reason"], most)
            self._drawn(case, one, prompt, drawn, o)
            for token, found in zip(each["logprobs"], one.along(prompt, tokens), strict=True):
                same(case, "logprob", token["logprob"], _nats(found, token["id"]), ALLOWED)
                best = {a["id"]: a["logprob"] for a in token["alternatives"]}
                self._likely(case, best, found, words[words.index("--logprobs") + 1])
        which = source.randrange(count)
        alone = ["--prompt", prompts[which], "--seed", seed + which]
        again = self.ask(name, "generate", one.folder, *alone, *words)
        if not isinstance(again, Finished) and o["temperature"]:
            same(case, "alone", again[0]["tokens"], told[which]["tokens"])

    def _likely(self, case: str, best: dict[int, float], found: torch.Tensor, count: int) -> None:
        """The most likely tokens and their log-probabilities."""
        wanted = found.log_softmax(-1)[:DRAWN].topk(count).values.tolist()
        self.result.same(case, "alternatives", len(best), count)
        for (token, value), other in zip(best.items(), wanted, strict=True):
            self.result.same(case, "alternative", value, other, ALLOWED)
            self.result.same(case, "alternative", value, _nats(found, token), ALLOWED)

    def distribution(self, name: str, one: Subject, source: random.Random) -> None:
        """One token, drawn many times."""
        o, seed = self._options(source), source.randrange(10**9)
        neutral: dict[str, float] = {"top-k": 0, "top-p": 1.0, "min-p": 0.0}
        neutral.pop(source.choice(list(neutral)))  # one filter at a time: two mask each other
        o |= neutral | {"temperature": o["temperature"] or 1.0}
        text = self._prompt(source, one.context)
        words = [f"--{key}={value}" for key, value in o.items()] + ["--json", "--device", "cpu"]
        words += ["--max-tokens", 1, "--seed", seed, "--prompt", *[text] * DRAWS]
        told = self.ask(name, "generate", one.folder, *words)
        if isinstance(told, Finished):
            return
        prompt, drawn = (
            self.tokenizer.encode(text) or [EOT],
            [(e["tokens"] or [EOT])[0] for e in told],
        )
        case = f"{name} draws of {text!r} seed {seed}"
        share = chances(next(one.along(prompt, [0])), prompt, o)
        if odd := {token for token in drawn if not share[token]}:
            self._drawn(case, one, prompt, [odd.pop()], o)
        self.result.ranks += filter(None, (rank(share, t, self.noise.random()) for t in drawn))
        likely = fits(share, drawn)
        if likely < SELDOM:
            self.result.wrong.append(f"{case}: not the distribution of {o}: p = {likely:.1g}")

    def serve(self, name: str, one: Subject, source: random.Random) -> None:
        """Requests to the server's application."""
        model = open_to_generate(one.folder, "cpu", None, "float32").model
        engine = Engine(model, self.tokenizer, source.choice([1, 3, 8]), 16)
        app = build_app(model, self.tokenizer, "it", Curve(train=[], validation=[]), engine)
        guarded = Guard(app, "127.0.0.1", "", content_policy())
        client = TestClient(guarded, base_url="http://127.0.0.1")
        for _ in range(5):
            self._request(name, one, client, source)
        engine.close()

    def _request(self, name: str, one: Subject, client: TestClient, source: random.Random) -> None:
        """One request in several forms: with probabilities, without, as a stream, stopped."""
        o, many = self._options(source), source.choice([1, 1, 2, 4])
        longest = source.choice([one.context, 1 + one.context // 2])
        prompts: list[Any] = [self._prompt(source, longest) for _ in range(many)]
        ids = [self.tokenizer.encode(each) or [EOT] for each in prompts]
        if source.random() < 0.4:  # as tokens, one of them end-of-text
            ids = [
                [*each[: source.randint(1, 40)], *source.choice([[], [EOT, 318]])] for each in ids
            ]
            prompts = ids
        body = {key.replace("-", "_"): value for key, value in o.items()} | {
            "prompt": prompts if many > 1 or source.random() < 0.3 else prompts[0],
            "n": source.choice([1, 1, 3]), "seed": source.randrange(10**9),
            "max_tokens": source.choice([0, 1, 5, one.context, one.context]),
            "logprobs": source.choice([0, 1, 5, 20]), "echo": source.random() < 0.5,
        }  # fmt: skip
        fit = all(len(each) + min(body["max_tokens"], 1) <= one.context for each in ids)
        self.result.asked["requests"] += 1
        answer, case = client.post("/v1/completions", json=body), f"{name} {body} request"
        good = fit and (body["max_tokens"] or body["echo"])
        self.result.asked["answers"] += answer.status_code == 200
        self.result.same(case, "status", answer.status_code, 200 if good else 400)
        if not good or answer.status_code != 200:
            return
        self._answered(case, one, ids, body, o, answer.json())
        self._streamed(case, client, body, answer.json())
        chosen = source.choice(answer.json()["choices"])
        text, begins = chosen["text"], chosen["logprobs"]["text_offset"]
        long = source.choice([1, 2, 3, 5])  # all but its end often comes from the token before
        at = max(0, source.choice(begins[len(begins) // 2 :]) - source.choice([0, 1, long - 1]))
        stop = text[at : at + long] or "x"
        body["stop"] = source.choice([stop, [stop], [stop, source.choice(["a", "\ufffd"])]])
        answer, case = client.post("/v1/completions", json=body), f"{name} {body} request"
        self._answered(case, one, ids, body, o, answer.json())
        body["logprobs"] = None
        bare = client.post("/v1/completions", json=body).json()
        wanted = [choice | {"logprobs": None} for choice in answer.json()["choices"]]
        self.result.same(case, "choices without logprobs", bare["choices"], wanted)
        self._streamed(case, client, body, bare)

    def _answered(
        self,
        case: str,
        one: Subject,
        ids: list[list[int]],
        body: dict[str, Any],
        o: dict[str, float],
        answer: dict[str, Any],
    ) -> None:
        """Check every token, its probability, text and end."""
        same, written = self.result.same, 0
        choices, n = answer["choices"], body["n"]
        same(case, "indices", [c["index"] for c in choices], list(range(len(ids) * n)))
        for number, choice in enumerate(choices):
            prompt, told = ids[number // n], choice["logprobs"]
            echoed = prompt if body["echo"] else []
            tokens = [self.names[each] for each in told["tokens"]]
            same(case, "echo", tokens[: len(echoed)], echoed)
            drawn = tokens[len(echoed) :]
            written += len(drawn)
            kept = drawn[:-1] if drawn[-1:] == [EOT] else drawn
            stops = body.get("stop", [])
            stops = [stops] if isinstance(stops, str) else stops
            story = said(self.tokenizer, echoed, kept, stops)
            most = min(body["max_tokens"], one.context - len(prompt))
            same(case, "text", choice["text"], story.text)
            same(
                case, "drawn", self._ended(case, story, kept, choice["finish_reason"], most), drawn
            )
            same(case, "offsets", told["text_offset"][: len(story.offsets)], story.offsets)
            self._drawn(case, one, prompt, drawn, o)
            found = list(one.logits(prompt)[:-1]) if echoed else []
            found += one.along(prompt, drawn)
            if echoed:
                first = (told["token_logprobs"].pop(0), told["top_logprobs"].pop(0), tokens.pop(0))
                same(case, "first", first[:2], (None, None))
            lists = (tokens, told["token_logprobs"], told["top_logprobs"], found)
            for token, value, best, row in zip(*lists, strict=True):
                same(case, "logprob", value, _nats(row, token), ALLOWED)
                named = {self.names[key]: other for key, other in best.items()}
                self._likely(case, named, row, body["logprobs"])
        usage = {"prompt_tokens": sum(map(len, ids)), "completion_tokens": written}
        usage["total_tokens"] = sum(usage.values())
        same(case, "usage", answer["usage"], usage)

    def _streamed(
        self, case: str, client: TestClient, body: dict[str, Any], whole: dict[str, Any]
    ) -> None:
        """The pieces of a stream, joined, equal the whole answer."""
        more = {"stream": True, "stream_options": {"include_usage": True}}
        lines = client.post("/v1/completions", json=body | more).text.split("\n\n")
        self.result.same(case, "end of the stream", lines[-2:], ["data: [DONE]", ""])
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        self.result.same(case, "usage of the stream", events[-1]["usage"], whole["usage"])
        parts = dict[int, dict[str, Any]]()
        for choice in (each for event in events for each in event["choices"]):
            known = parts.setdefault(choice["index"], choice | {"text": "", "logprobs": None})
            known["text"] += choice["text"]
            known["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"]:
                lists = known["logprobs"] or {key: [] for key in choice["logprobs"]}
                known["logprobs"] = {k: lists[k] + v for k, v in choice["logprobs"].items()}
        self.result.same(case, "stream", [parts[i] for i in sorted(parts)], whole["choices"])


def _nats(found: torch.Tensor, token: int) -> float:
    """The log-probability of a token given logits (V,)."""
    return float(found[token] - found.logsumexp(-1))
