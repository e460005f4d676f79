"""Random models, and everything the commands report about them, compared with `verdicts.py`.

A case is a folder of random weights, perhaps a run that was trained from it for a step or two, and
random options of `sota evaluate` (also --against, --lambada, --hellaswag), `generate`, `report` on
several runs, and the server's /v1/completions.
"""

import csv
import json
import math
import os
import random
import re
import shutil
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file

from . import verdicts
from .commands import Finished
from .folders import TRAINING, command
from .twin import EOT, Array, stream
from .twins import texts
from .verdicts import DRAWN, Subject, make_subject
from .writing import ALLOWED, SELDOM, WORDS, Result, Writing, some_text

SUM = 1e-5  # the same for a mean over many tokens
PROTOCOLS = {  # and the first token of the last word that counts
    "text": [("lambada_paper", -1), ("lambada_openai", 0)],
    "standard": [("lambada_standard", 0)],
}
FIGURES = ("mean", "spread", "difference", "seeds", "text")  # columns of a report's second table


class Judge(Writing):
    """Asks and compares, case by case."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.bytes = self.tokenizer.token_bytes
        self.data = root / "data"
        words = ("prepare", texts(root / "texts")[2], "--out", self.data, "--val-fraction", "0.3")
        done = command(*words, "--workers", "1")
        assert done.code == 0, done.output

    def case(self, number: int, source: random.Random) -> None:
        """One model, often trained further, and what is reported about it."""
        place, name = self.root / f"case-{number}", f"case {number}"
        place.mkdir()
        one = self._subject(source, place, "one")
        self._evaluate(name, one, place, source)
        self._against(name, one, self._subject(source, place, "other"), place, source)
        self._benchmarks(name, one, place, source)
        for _ in range(2):
            self.generate(name, one, place, source)
        self.distribution(name, one, source)
        self.serve(name, one, source)
        if one.held_out is not None:
            for number in range(3):
                self._report(name, one, place / f"report-{number}", source)
        shutil.rmtree(place)

    def _subject(self, source: random.Random, place: Path, name: str) -> Subject:
        """A folder as written by transformers, or a run started from it."""
        if source.random() < 0.4:
            return make_subject(source, place / name, [DRAWN, DRAWN + 1, 50_304])
        made = make_subject(source, place / f"{name}-first", [DRAWN + 1, 50_304])
        out, steps = place / name, source.choice([1, 2, 3])
        words = ("import", made.folder, "--out", out, "--data", self.data)
        done = command(*words)
        assert done.code == 0, done.output
        told = done.output.partition("train it further:")[2].split()[2:]
        masked = source.random() < 0.4
        told += [*TRAINING.split(), f"--train.steps={steps}", "--train.batch-rows=2"]
        done = command("train", *told, *(["--data.document-mask"] if masked else []))
        assert done.code == 0, done.output
        stored = load_file(out / f"checkpoints/step-{steps:08d}/model.safetensors")
        weights = {key: value.double() for key, value in stored.items()}
        return Subject(out, made.model, weights, masked, stream(self.data, "val"))

    def _texts(
        self, place: Path, context: int, source: random.Random
    ) -> tuple[list[str], str, list[Array]]:
        """Arguments after --text, what is piped in, and the tokens of each text."""
        names, piped, found = list[str](), "", list[str]()
        for number in range(source.choice([1, 1, 2, 3])):
            kind = source.choice(["txt", "py", "utf-16", "jsonl", "csv", "tsv", "-", "folder"])
            text = some_text(source, source.choice([1, 2, context // 2, context, 3 * context]))
            if source.random() < 0.3:  # a length that just fits or just does not
                ids = self.tokenizer.encode(text)
                at = context * source.choice([1, 2]) + source.choice([-1, 0, 1])
                text = self.tokenizer.decode(ids[:at]) or "x"
            path = place / f"text-{number}.{kind}"
            many = [text, *(some_text(source, source.randint(1, 9)) for _ in range(3))]
            many = [each for each in many if each.strip()] or ["x"]
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
        self,
        name: str,
        one: Subject,
        place: Path,
        source: random.Random,
        other: Subject | None = None,
    ) -> None:
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
            most = 10 * context  # to limit the time
        words += ["--tokens", most] if most else []
        if other is not None:
            words += ["--against", other.folder]
        told = self.ask(name, "evaluate", one.folder, *words, given=piped)
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
        figures = verdicts.figures(rows[0])
        for key, value in figures.items():
            same(case, key, found[key], value, 10 * SUM if key == "perplexity" else SUM)
        if other:
            there = found["against"]
            difference, error = verdicts.paired(rows[0], rows[1])
            nats = verdicts.figures(rows[1])["nats"]
            same(case, "difference", there["difference"], difference, SUM)
            same(case, "paired error", there["paired_error"], error, SUM)
            same(case, "nats of the other", there["nats"], nats, SUM)
            figures |= {"difference": difference, "paired_error": error}
        if not piped and source.random() < 0.2:
            self._table(case, [one.folder, *words[1:]], figures)

    def _table(self, case: str, words: list[Any], figures: dict[str, Any]) -> None:
        """The printed table: the same figures, and a statement of which model is better."""
        output, same = command("evaluate", *words).output, self.result.same
        found = re.findall(r"^  (?:loss|perplexity|bits per byte) +(\S+)", output, re.M)
        for key, shown in zip(("nats", "perplexity", "bits_per_byte"), found, strict=True):
            wanted = math.nan if figures[key] is None else figures[key]
            if wanted == wanted or shown != "nan":
                same(case, f"{key} in the table", float(shown), wanted, 100 * ALLOWED)
        if figures.get("paired_error"):
            sure = abs(figures["difference"]) / figures["paired_error"]
            told = "worse" if figures["difference"] > 0 else "better"
            if abs(sure - 2) > 0.01:
                ends = (told if sure > 2 else "no significant difference on this text") + "\n"
                same(case, "words", output.endswith(f"(paired standard error): {ends}"), True)

    def _against(
        self, name: str, one: Subject, other: Subject, place: Path, source: random.Random
    ) -> None:
        """Two models on one text."""
        shutil.rmtree(place / "against", ignore_errors=True)
        (place / "against").mkdir()
        self._evaluate(f"{name} against", one, place / "against", source, other)

    def _benchmarks(self, name: str, one: Subject, place: Path, source: random.Random) -> None:
        """LAMBADA and HellaSwag, both in two forms."""
        lines, pairs = list[dict[str, str]](), {"text": [], "standard": []}
        for _ in range(source.randint(1, 8)):
            kind = source.choice(["text", "text", "standard"])
            text = some_text(source, source.randint(1, 12)) + "end " + source.choice(WORDS[3:9])
            lines.append({kind: text})
            pairs[kind].append((text[: text.rindex(" ")], text[text.rindex(" ") :]))
        path = place / "lambada.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = self.ask(
            name, "evaluate", one.folder, "--json", "--device", "cpu", "--lambada", path
        )
        if isinstance(told, Finished):
            return
        figures = {row["name"]: (row["value"], row["error"]) for row in told[0]["benchmarks"]}
        expected = dict[str, tuple[float, float | None]]()
        for kind, both in pairs.items():
            scored = [verdicts.asked(one, self.tokenizer, *pair) for pair in both]
            for protocol, begin in PROTOCOLS[kind] if both else ():
                right, name_of = [right[begin:] for _, right in scored], f"{protocol} accuracy"
                expected[name_of] = _mean([all(each) for each in right])
                if any(None in each for each in right):  # a tie may be right or wrong
                    expected[name_of] = figures.get(name_of, (0, None))
                mean, error = _mean([sum(nats[begin:]) for nats, _ in scored])
                share = error and error * math.exp(mean)
                expected[f"{protocol} perplexity"] = (math.exp(mean), share)
        self._rows(f"{name} lambada", figures, expected)
        self._hellaswag(name, one, place, source)

    def _rows(self, case: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Figures with their errors."""
        self.result.same(case, "rows", sorted(found), sorted(wanted))
        for row in set(found) & set(wanted):
            for which, value, other in zip(
                ("value", "error"), found[row], wanted[row], strict=True
            ):
                self.result.same(case, f"{row} {which}", value, other, ALLOWED)

    def _hellaswag(self, name: str, one: Subject, place: Path, source: random.Random) -> None:
        """Endings of several lengths, with WikiHow's markup."""
        marks, lines, right, normed = [" [title]", "[step]", " [header] a", "  "], [], [], []
        limit = source.choice([0, 0, 2])
        for number in range(source.randint(1, 12)):

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
            asked = [verdicts.asked(one, self.tokenizer, context, " " + e) for e in endings]
            nats = [sum(each) for each, _ in asked]
            by_length = [n / len(e) for n, e in zip(nats, endings, strict=True)]
            if source.random() < 0.7:  # a different winner is reported
                label = int(np.argmin(by_length))
                told["label"] = str(label)
            right.append(int(np.argmin(nats)) == label)
            normed.append(int(np.argmin(by_length)) == label)
        path = place / "hellaswag.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["--json", "--device", "cpu", "--hellaswag", path, "--limit", limit]
        told = self.ask(name, "evaluate", one.folder, *words)
        if not isinstance(told, Finished):
            figures = {row["name"]: (row["value"], row["error"]) for row in told[0]["benchmarks"]}
            wanted = {"hellaswag acc": _mean(right), "hellaswag acc_norm": _mean(normed)}
            self._rows(f"{name} hellaswag", figures, wanted)

    def _report(self, name: str, one: Subject, place: Path, source: random.Random) -> None:
        """Runs that differ in seed or rate, with made-up losses."""
        lines = (one.folder / "metrics.jsonl").read_text().splitlines()
        settings: dict[float, list[tuple[float, float]]] = {}
        folders, rates = list[Path](), [1e-3, 2e-3, 3e-3][: source.choice([1, 2, 2, 3])]
        for seed in range(source.randint(2, 8)):
            rate, nats, error = source.choice(rates), source.gauss(4, 0.5), source.random() / 9
            settings.setdefault(rate, []).append((nats, error))
            folders.append(place / f"seed-{seed}")
            folders[-1].mkdir(parents=True)
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
        with patch.dict(os.environ, COLUMNS="10000"):  # tables are not truncated
            done = command("report", *folders, "--out", place / "page.html")
        rows = re.findall(r"^((?:seed-\d(?:, )?)+) {2,}(.*)$", done.output, re.M)
        told = [[float(c.strip("<=+ ")) if c != "-" else None for c in re.split(" {2,}", row)[2:]]
                for _, row in rows]  # fmt: skip
        self.result.same(f"{name} report", "settings", len(told), len(settings))
        first = np.array(next(iter(settings.values())))
        for row, values in zip(told, map(np.array, settings.values()), strict=True):
            sizes = (len(values), len(first))
            spreads = [float(v[:, 0].std(ddof=1)) if len(v) > 1 else None for v in (values, first)]
            wanted = [float(values[:, 0].mean()), spreads[0], None, None, None]
            if row is not told[0]:
                wanted[2] = float(values[:, 0].mean() - first[:, 0].mean())
                if None not in spreads:
                    wanted[3] = math.sqrt(
                        sum(s**2 / n for s, n in zip(spreads, sizes, strict=True))
                    )
                wanted[4] = float(values[:, 1].mean() + first[:, 1].mean())
            for key, value, other in zip(FIGURES, row, wanted, strict=True):
                self.result.same(f"{name} report", key, value, other, ALLOWED)


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
        except Exception as error:  # anything unexpected; go on with the next case
            at = traceback.extract_tb(error.__traceback__)[-1]
            judge.result.wrong.append(f"case {number}: {type(error).__name__}: {error} at {at}")
    if judge.result.even() < SELDOM:
        judge.result.wrong.append("tokens are not drawn from their distribution")
    return judge.result
