"""Random models, and all that the commands say of them, held against `verdicts.py`.

A case is a folder of random weights, perhaps a run that was trained on from it for a step or two,
and random options of `sota evaluate` (also --against, --lambada, --hellaswag), `generate`, `report`
of several runs, and of the server's /v1/completions.
"""

import csv
import io
import json
import math
import os
import random
import re
import shutil
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file

from sota_transformer.commands.common import open_to_generate
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.serve.engine import Engine
from sota_transformer.serve.guard import Guard
from sota_transformer.serve.schema import Curve
from sota_transformer.serve.server import build_app, content_policy

from . import verdicts
from .commands import Finished
from .folders import TRAINING, command
from .twin import EOT, Array, stream
from .twins import texts
from .verdicts import (
    DRAWN, NEAR, Said, Subject, chances, fits, make_subject, pearson, rank, said,
)  # fmt: skip

ALLOWED = 1e-4  # of a loss, relative to a size of at least 1
SELDOM = 1e-8  # a test of draws that is as unlikely as this is wrong
DRAWS = 400
WORDS = ["def f(x):", "\n", "  ", "the", " cat", "Ünïcödé", "日本語", "🦊🦊", "x" * 9, "\t", "1234", "<b>",
         "<|endoftext|>", " a", ".", ", and", "it's", "\n\n", "Ωmega", " return None", "🏳️‍🌈"]  # fmt: skip


@dataclass
class Result:
    """What was asked and compared, and what is wrong."""

    asked: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    largest: Counter[str] = field(default_factory=Counter)
    ranks: list[float] = field(default_factory=list)
    """Of every token that was drawn its place in the distribution: even, all together."""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        asked = ", ".join(f"{number:,} {name}" for name, number in sorted(self.asked.items()))
        far = ", ".join(f"{name} {value:.1e}" for name, value in sorted(self.largest.items()))
        text = f"{asked}; {self.compared:,} figures, largest differences: {far}"
        return f"{text}; the ranks of {len(self.ranks):,} draws are even: p = {self.even():.2g}"

    def even(self) -> float:
        """How likely ranks are this uneven."""
        bins = max(2, min(50, len(self.ranks) // 10))
        counts = np.histogram(self.ranks, bins, (0, 1))[0]
        return pearson(counts, np.full(bins, max(1, len(self.ranks)) / bins))

    def same(self, case: str, name: str, value: Any, wanted: Any, allowed: float = 0.0) -> None:
        """Hold one figure, or anything, against the reference."""
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
    """Words, signs and space of every kind."""
    return "".join(source.choice(WORDS) + source.choice(["", " "]) for _ in range(words))


class Judge:
    """Asks and compares, case by case."""

    def __init__(self, root: Path) -> None:
        self.root, self.result, self.tokenizer = root, Result(), Tokenizer()
        self.bytes = self.tokenizer.token_bytes
        self.noise = random.Random(0)
        self.names = {self._shown(token): token for token in range(DRAWN)}
        self.data = root / "data"
        words = ("prepare", texts(root / "texts")[2], "--out", self.data, "--val-fraction", "0.3")
        done = command(*words, "--workers", "1")
        assert done.code == 0, done.output
        os.environ["COLUMNS"] = "10000"  # a table is not cut

    def case(self, number: int, source: random.Random) -> None:
        """One model, often trained on, and what is said of it."""
        place, name = self.root / f"case-{number}", f"case {number}"
        place.mkdir()
        one = self._subject(source, place, "one")
        self._evaluate(name, one, place, source)
        self._against(name, one, self._subject(source, place, "other"), place, source)
        self._benchmarks(name, one, place, source)
        for _ in range(2):
            self._generate(name, one, place, source)
        self._distribution(name, one, source)
        self._serve(name, one, source)
        if one.held_out is not None:
            self._report(name, one, place, source)
        shutil.rmtree(place)

    def _shown(self, token: int) -> str:
        """A token's name in OpenAI's lists."""
        data = self.tokenizer.decode_bytes([token])
        try:
            return data.decode() or "<|endoftext|>"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _ask(self, name: str, verb: str, *words: object, given: str = "") -> list[Any] | Finished:
        """The JSON lines of a command, or how it ended if that was no success."""
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

    def _subject(self, source: random.Random, place: Path, name: str) -> Subject:
        """A folder as transformers has them, or a run from it."""
        if source.random() < 0.4:
            return make_subject(source, place / name, [DRAWN, DRAWN + 1, 50_304])
        made = make_subject(source, place / f"{name}-first", [DRAWN + 1, 50_304])
        out, steps = place / name, source.choice([1, 2, 3])
        words = ("import", made.folder, "--out", out, "--data", self.data)
        done = command(*words)
        assert done.code == 0, done.output
        told, masked = done.output.partition("train on:")[2].split()[2:], source.random() < 0.4
        told += [*TRAINING.split(), f"--train.steps={steps}", "--train.batch-rows=2"]
        done = command("train", *told, *(["--data.document-mask"] if masked else []))
        assert done.code == 0, done.output
        stored = load_file(out / f"checkpoints/step-{steps:08d}/model.safetensors")
        weights = {key: value.double() for key, value in stored.items()}
        return Subject(out, made.model, weights, masked, stream(self.data, "val"))

    def _texts(self, place: Path, context: int, source: random.Random) -> tuple[list[str], str,
                                                                                list[Array]]:  # fmt: skip
        """Arguments behind --text, what is piped in, and the tokens of each text."""
        names, piped, found = list[str](), "", list[str]()
        for number in range(source.choice([1, 1, 2, 3])):
            kind = source.choice(["txt", "py", "utf-16", "jsonl", "csv", "tsv", "-", "folder"])
            text = some_text(source, source.choice([1, 2, context // 2, context, 3 * context]))
            if source.random() < 0.3:  # a length that just fits, or just does not
                ids = self.tokenizer.encode(text)
                at = context * source.choice([1, 2]) + source.choice([-1, 0, 1])
                text = self.tokenizer.decode(ids[:at])
            path = place / f"text-{number}.{kind}"
            many = [text, *(some_text(source, source.randint(1, 9)) for _ in range(3))]
            many = [each for each in many if each.strip()]
            if kind == "-" and not piped and not text.startswith("{") and text.strip():
                path, piped, many = Path("-"), text, [text]
            elif kind == "folder":
                path.mkdir()
                for n, each in enumerate(many):
                    (path / f"{n}.md").write_bytes(each.encode())
            elif kind == "jsonl":
                path.write_text("".join(json.dumps({"text": each}) + "\n" for each in many))
            elif kind in ("csv", "tsv"):
                with path.open("w", newline="") as file:
                    table = csv.writer(file, delimiter="," if kind == "csv" else "\t")
                    table.writerows([["id", "text"], *enumerate(many)])
            else:
                code = "utf-16" if kind == "utf-16" else "utf-8"
                path = path.with_suffix(".txt" if kind != "py" else ".py")
                path.write_bytes(text.encode(code))
                many = [text]
            names.append(str(path))
            found += many
        return names, piped, [np.array([EOT, *self.tokenizer.encode(t)]) for t in found]

    def _evaluate(
        self, name: str, one: Subject, place: Path, source: random.Random, other: Subject | None = None
    ) -> None:  # fmt: skip
        """Loss, error, perplexity and bits per byte of a text or of the validation split."""
        longest = min(each.context for each in (one, other or one))
        context = source.choice([0, 0, source.randint(1, longest), longest + 3])
        stride = source.choice([0, 0, source.randint(1, longest), longest + 3])
        words = ["--json", "--device", "cpu", "--context", context, "--stride", stride]
        context = min(context or longest, longest)
        stride, piped = min(stride or context, context), ""
        if one.held_out is None or source.random() < 0.5:
            names, piped, tokens = self._texts(place, context, source)
            words += ["--text", *names]
        else:
            tokens = [one.held_out]
        size = sum(len(each) - 1 for each in tokens)
        most = source.choice([0, 1, context, context + 1, source.randint(1, max(1, size)), 60])
        if not most and size > 30 * context and stride < context / 2:
            most = 10 * context  # or a slow case
        words += ["--tokens", most] if most else []
        if other is not None:
            words += ["--against", other.folder]
        told = self._ask(name, "evaluate", one.folder, *words, given=piped)
        if isinstance(told, Finished) or not size:
            return
        kept, left = list[Array](), most or size
        for each in tokens:
            kept.append(each[: left + 1])
            left -= len(kept[-1]) - 1
            if left <= 0:
                break
        rows = [np.concatenate([verdicts.sums(subject, each, context, stride, self.bytes)
                for each in kept]) for subject in ([one, other] if other else [one])]  # fmt: skip
        case = f"{name}: evaluate {' '.join(map(str, words))}"
        same, found = self.result.same, told[0]
        same(case, "context", found["context"], context)
        same(case, "stride", found["stride"], stride)
        for key, value in verdicts.figures(rows[0]).items():
            same(case, key, found[key], value, 100 * ALLOWED if key == "perplexity" else ALLOWED)
        if other:
            there = found["against"]
            difference, error = verdicts.paired(rows[0], rows[1])
            same(case, "difference", there["difference"], difference, ALLOWED)
            same(case, "paired error", there["paired_error"], error, ALLOWED)
            same(
                case, "nats of the other", there["nats"], verdicts.figures(rows[1])["nats"], ALLOWED
            )

    def _against(
        self, name: str, one: Subject, other: Subject, place: Path, source: random.Random
    ) -> None:
        """Two models on one text."""
        shutil.rmtree(place / "against", ignore_errors=True)
        (place / "against").mkdir()
        self._evaluate(f"{name} against", one, place / "against", source, other)

    def _benchmarks(self, name: str, one: Subject, place: Path, source: random.Random) -> None:
        """LAMBADA in both forms, HellaSwag in both."""
        lines, pairs = list[dict[str, str]](), {"text": [], "standard": []}
        for _ in range(source.randint(1, 6)):
            kind = source.choice(["text", "text", "standard"])
            text = some_text(source, source.randint(1, 12)) + "end " + source.choice(WORDS[3:9])
            lines.append({kind: text})
            pairs[kind].append((text[: text.rindex(" ")], text[text.rindex(" ") :]))
        path = place / "lambada.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = self._ask(
            name, "evaluate", one.folder, "--json", "--device", "cpu", "--lambada", path
        )
        if isinstance(told, Finished):
            return
        wanted = dict[str, tuple[list[bool], list[float]]]()
        try:
            for kind, both in pairs.items():
                scored = [verdicts.asked(one, self.tokenizer, *pair) for pair in both]
                whole = [bool(r.all()) for _, r in scored], [n.sum().item() for n, _ in scored]
                last = [bool(r[-1]) for _, r in scored], [n[-1].item() for n, _ in scored]
                if both and kind == "text":
                    wanted |= {"lambada_paper": last, "lambada_openai": whole}
                elif both:
                    wanted["lambada_standard"] = whole
        except ArithmeticError:
            return
        figures = {row["name"]: (row["value"], row["error"]) for row in told[0]["benchmarks"]}
        expected = dict[str, tuple[float, float | None]]()
        for protocol, (right, nats) in wanted.items():
            expected[f"{protocol} accuracy"] = _mean(right)
            mean, error = _mean(nats)
            expected[f"{protocol} perplexity"] = (math.exp(mean), error and error * math.exp(mean))
        self._rows(f"{name} lambada", figures, expected)
        self._hellaswag(name, one, place, source)

    def _rows(self, case: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Figures with their errors."""
        self.result.same(case, "rows", sorted(found), sorted(wanted))
        for row in set(found) & set(wanted):
            for which, value, other in zip(
                ("value", "error"), found[row], wanted[row], strict=True
            ):
                self.result.same(case, f"{row} {which}", value, other, 100 * ALLOWED)

    def _hellaswag(self, name: str, one: Subject, place: Path, source: random.Random) -> None:
        """Endings of several lengths, with the marks of WikiHow."""
        marks, lines, right, normed = [" [title]", "[step]", " [header] a", "  "], [], [], []
        limit = source.choice([0, 2])
        for number in range(source.randint(1, 4)):

            def text(words: int) -> str:
                return some_text(source, words) + source.choice(marks) + " end"

            endings = [text(source.randint(1, 5)) for _ in range(source.randint(2, 4))]
            label, plain = source.randrange(len(endings)), source.random() < 0.5
            told = {"endings": endings, "label": source.choice([label, str(label)])}
            if plain:
                told["ctx"] = context = some_text(source, source.randint(0, 6))
            else:
                told |= {
                    "activity_label": "Roof",
                    "ctx_a": text(3),
                    "ctx_b": source.choice(["", "she"]),
                }
                context = f"Roof: {told['ctx_a']} {told['ctx_b'].capitalize()}"
                context, endings = verdicts.hella(context), list(map(verdicts.hella, endings))
            lines.append(told)
            if limit and number >= limit:
                continue
            try:
                nats = [float(verdicts.asked(one, self.tokenizer, context, " " + e)[0].sum())
                        for e in endings]  # fmt: skip
            except ArithmeticError:
                return
            right.append(int(np.argmin(nats)) == label)
            normed.append(int(np.argmin([n / len(e) for n, e in zip(nats, endings)])) == label)
        path = place / "hellaswag.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["--json", "--device", "cpu", "--hellaswag", path, "--limit", limit]
        told = self._ask(name, "evaluate", one.folder, *words)
        if not isinstance(told, Finished):
            figures = {row["name"]: (row["value"], row["error"]) for row in told[0]["benchmarks"]}
            wanted = {"hellaswag acc": _mean(right), "hellaswag acc_norm": _mean(normed)}
            self._rows(f"{name} hellaswag", figures, wanted)

    def _options(self, source: random.Random) -> dict[str, float]:
        """How to draw."""
        pick = source.choice
        return {"temperature": pick([0, 0.3, 0.8, 1.0, 2.5]), "top-k": pick([0, 0, 1, 3, 40]),
                "top-p": pick([1.0, 1.0, 0.95, 0.5, 0.01]), "min-p": pick([0.0, 0.0, 0.1, 0.5]),
                "repetition-penalty": pick([1.0, 1.0, 1.3, 0.7])}  # fmt: skip

    def _prompt(self, source: random.Random, longest: int) -> str:
        """A text of at most about so many tokens, which may be none, or just fit."""
        ids = self.tokenizer.encode(some_text(source, longest))
        return self.tokenizer.decode(
            ids[: source.choice([0, 1, longest, source.randint(1, longest)])]
        )

    def _drawn(
        self, case: str, one: Subject, prompt: list[int], drawn: list[int], o: dict[str, float]
    ) -> None:
        """Whether each token may be drawn there, and where it lies among those that may."""
        history = list(prompt)
        for token, found in zip(drawn, one.along(prompt, drawn), strict=True):
            self.result.compared += 1
            place = rank(chances(found, history, o), token, self.noise.random())
            if place is None and not chances(found, history, o, NEAR)[token]:
                self.result.wrong.append(f"{case}: {token} behind {history} may not be drawn, {o}")
            if place is not None and o["temperature"]:
                self.result.ranks.append(place)
            history.append(token)

    def _ended(
        self, case: str, story: Said, tokens: list[int], reason: str, most: int
    ) -> list[int]:
        """Hold the end of a continuation against the rules; what was drawn, end-of-text included."""
        if story.stopped_after is not None:
            end = ("stop", story.stopped_after)
        else:
            end = ("length", most) if reason == "length" else ("stop", len(tokens))
        self.result.same(case, "end", (reason, len(tokens)), end)
        at_text_end = reason == "stop" and story.stopped_after is None
        return [*tokens, EOT] if at_text_end else tokens

    def _generate(self, name: str, one: Subject, place: Path, source: random.Random) -> None:
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
        told = self._ask(name, "generate", one.folder, "--file", path, "--seed", seed, *words)
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
        again = self._ask(name, "generate", one.folder, *alone, *words)
        if not isinstance(again, Finished) and o["temperature"]:
            same(case, "alone", again[0]["tokens"], told[which]["tokens"])

    def _likely(self, case: str, best: dict[int, float], found: torch.Tensor, count: int) -> None:
        """The likeliest tokens and their log-probabilities."""
        wanted = found.log_softmax(-1)[:DRAWN].topk(count).values.tolist()
        self.result.same(case, "alternatives", len(best), count)
        for (token, value), other in zip(best.items(), wanted):
            self.result.same(case, "alternative", value, other, ALLOWED)
            self.result.same(case, "alternative", value, _nats(found, token), ALLOWED)

    def _distribution(self, name: str, one: Subject, source: random.Random) -> None:
        """One token, drawn many times."""
        o, seed = self._options(source), source.randrange(10**9)
        o["temperature"], text = o["temperature"] or 1.0, self._prompt(source, one.context)
        words = [f"--{key}={value}" for key, value in o.items()] + ["--json", "--device", "cpu"]
        words += ["--max-tokens", 1, "--seed", seed, "--prompt", *[text] * DRAWS]
        told = self._ask(name, "generate", one.folder, *words)
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

    def _serve(self, name: str, one: Subject, source: random.Random) -> None:
        """Requests to the server's application."""
        model = open_to_generate(one.folder, "cpu", None, "float32").model
        engine = Engine(model, self.tokenizer, source.choice([1, 3, 8]), 16)
        app = build_app(model, self.tokenizer, "it", Curve(train=[], validation=[]), engine)
        guarded = Guard(app, "127.0.0.1", "", content_policy())
        with TestClient(guarded, base_url="http://127.0.0.1") as client:
            for _ in range(3):
                self._request(name, one, client, source)

    def _request(self, name: str, one: Subject, client: TestClient, source: random.Random) -> None:
        """One request in several forms: with probabilities, without, as a stream, stopped."""
        o, many = self._options(source), source.choice([1, 1, 2, 4])
        prompts: list[Any] = [self._prompt(source, one.context) for _ in range(many)]
        ids = [self.tokenizer.encode(each) or [EOT] for each in prompts]
        if source.random() < 0.4:  # as tokens, of which one ends a text
            ids = [
                [*each[: source.randint(1, 40)], *source.choice([[], [EOT, 318]])] for each in ids
            ]
            prompts = ids
        body = {key.replace("-", "_"): value for key, value in o.items()} | {
            "prompt": prompts if many > 1 or source.random() < 0.3 else prompts[0],
            "n": source.choice([1, 1, 3]), "seed": source.randrange(10**9),
            "max_tokens": source.choice([0, 1, 5, one.context]), "echo": source.random() < 0.5,
            "logprobs": source.choice([0, 1, 5, 20]),
        }  # fmt: skip
        fit = all(len(each) + min(body["max_tokens"], 1) <= one.context for each in ids)
        self.result.asked["requests"] += 1
        answer, case = client.post("/v1/completions", json=body), f"{name} {body} request"
        good = fit and (body["max_tokens"] or body["echo"])
        self.result.same(case, "status", answer.status_code, 200 if good else 422)
        if not good or answer.status_code != 200:
            return
        self._answered(case, one, ids, body, o, answer.json())
        plain = [choice["text"] for choice in answer.json()["choices"]]
        self._streamed(case, client, body, answer.json())
        text = source.choice(plain)
        at = source.randrange(len(text) + 1)
        body["stop"] = [
            text[at : at + source.choice([1, 2, 3, 5])] or "x",
            source.choice(["a", "\ufffd"]),
        ]
        answer, case = client.post("/v1/completions", json=body), f"{name} {body} request"
        self._answered(case, one, ids, body, o, answer.json())
        body["logprobs"] = None
        bare = client.post("/v1/completions", json=body).json()
        wanted = [choice | {"logprobs": None} for choice in answer.json()["choices"]]
        self.result.same(case, "choices without logprobs", bare["choices"], wanted)
        self._streamed(case, client, body, bare)

    def _answered(
        self, case: str, one: Subject, ids: list[list[int]], body: dict[str, Any], o: dict[str, float],
        answer: dict[str, Any],
    ) -> None:  # fmt: skip
        """Every token, its probability, text and end."""
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
            story = said(self.tokenizer, echoed, kept, body.get("stop", []))
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
        """The pieces of a stream, put together, are the whole answer."""
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

    def _report(self, name: str, one: Subject, place: Path, source: random.Random) -> None:
        """Runs that differ in seed or rate, as if each had come to another loss."""
        lines = (one.folder / "metrics.jsonl").read_text().splitlines()
        settings: dict[float, list[tuple[float, float]]] = {}
        folders, rates = list[Path](), [1e-3, 2e-3, 3e-3][: source.randint(1, 3)]
        for seed in range(source.randint(2, 6)):
            rate, nats, error = source.choice(rates), source.gauss(4, 0.5), source.random() / 9
            settings.setdefault(rate, []).append((nats, error))
            folders.append(place / f"seed-{seed}")
            folders[-1].mkdir()
            told = json.loads((one.folder / "config.json").read_text())
            told["run"]["seed"], told["optim"]["learning_rate"] = seed, rate
            (folders[-1] / "config.json").write_text(json.dumps(told))
            shutil.copy(one.folder / "run.json", folders[-1])
            judged = [json.loads(line) for line in lines]
            for line in judged:
                if "val_loss" in line:
                    line |= {"val_loss": nats, "val_error": error}
            text = "".join(json.dumps(line) + "\n" for line in judged)
            (folders[-1] / "metrics.jsonl").write_text(text)
        self.result.asked["report"] += 1
        done = command("report", *folders, "--out", place / "page.html")
        rows = re.findall(r"^((?:seed-\d(?:, )?)+) {2,}(.*)$", done.output, re.M)
        told = [[float(c.strip("<=+ ")) if c != "-" else None for c in re.split(" {2,}", row)[2:]]
                for _, row in rows]  # fmt: skip
        self.result.same(f"{name} report", "settings", len(told), len(settings))
        first = np.array(next(iter(settings.values())))
        for row, values in zip(told, map(np.array, settings.values())):
            sizes, spreads = (len(values), len(first)), [None, None]
            spreads = [float(v[:, 0].std(ddof=1)) if len(v) > 1 else None for v in (values, first)]
            wanted = [float(values[:, 0].mean()), spreads[0], None, None, None]
            if row is not told[0]:
                wanted[2] = float(values[:, 0].mean() - first[:, 0].mean())
                if None not in spreads:
                    wanted[3] = math.sqrt(sum(s**2 / n for s, n in zip(spreads, sizes)))
                wanted[4] = float(values[:, 1].mean() + first[:, 1].mean())
            for key, value, other in zip("mean spread difference seeds text".split(), row, wanted):
                self.result.same(f"{name} report", key, value, other, ALLOWED)


def _nats(found: torch.Tensor, token: int) -> float:
    """The log-probability of a token under logits (V,)."""
    return float(found[token] - found.logsumexp(-1))


def _mean(values: Any) -> tuple[float, float | None]:
    """A mean and its standard error."""
    each = np.array(values, float)
    return float(each.mean()), each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else None


def judging(root: Path, count: int, seed: int = 0) -> Result:
    """`count` models."""
    torch.set_num_threads(1)
    judge = Judge(root)
    for number in range(count):
        try:
            judge.case(number, random.Random(f"{seed} {number}"))
        except Exception as error:  # what nobody thought of, and then the next
            at = traceback.extract_tb(error.__traceback__)[-1]
            judge.result.wrong.append(f"case {number}: {type(error).__name__}: {error} at {at}")
    if judge.result.even() < SELDOM:
        judge.result.wrong.append("tokens are not drawn as they should be")
    return judge.result
