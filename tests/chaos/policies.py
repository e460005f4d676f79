"""Decisions of `sota prepare` about documents, compared with brute force on random small corpora.

Each case is one folder: some inputs, then perhaps more by `--append`, all with random options. The
shards are read by plain numpy and OpenAI's tiktoken. Which documents have to be in them, in which
split and order, and why the others were dropped, follows from the guide and docs/format.md by set
operations and by comparing every pair. Then the same is done again by other workers, in parts, or
in a separate process: the bytes have to be the same.
"""

import ast
import hashlib
import json
import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sota_transformer.errors import BAD_DATA, USAGE

from .commands import Finished, contents, sota
from .corpora import (
    EXCLUDE_GRAM,
    SPLITS,
    SURROGATES,
    UTF8,
    Asked,
    Item,
    Maker,
    Round,
    documents,
    encoding,
    grams,
    ids,
    is_val,
    jaccard,
    shards,
)  # fmt: skip

EXAMPLES, SMALL = 5, 3000  # small.UNIT_BYTES
COUNTED = 2048  # 5-grams; longer documents are compared by samples
DUPLICATE, NEAR = "exact duplicate", "near-duplicate"
EXCLUDED = "shares text with an excluded file"
TAKEN = "; kept, with U+FFFD for the invalid parts"


@dataclass
class Result:
    """Counts, and a description of everything that went wrong."""

    cases: int = 0
    commands: int = 0
    documents: int = 0
    refused: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    sides: Counter[str] = field(default_factory=Counter)
    alike: Counter[bool] = field(default_factory=Counter)
    missed: Counter[bool] = field(default_factory=Counter)
    may_miss: Counter[bool] = field(default_factory=Counter)
    """By whether their similarity is just at the threshold."""
    expected_val: float = 0.0
    doubt_val: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.cases:,} folders, {self.commands:,} commands ({self.refused:,} refused, as "
        text += f"they should be), {self.documents:,} documents taken; {self.alike.total():,} were "
        text += f"alike an earlier one, {self.missed.total()} not found "
        text += f"({self.may_miss.total():.1f} expected); validation {self.sides['val']:,} "
        text += f"({self.expected_val:,.0f} expected)"
        return text + "".join(f"\n{n:>8,}  {why}" for why, n in self.rejects.most_common())

    def count(self, sides: dict[str, list[str]], rejects: Counter[str], share: float) -> None:
        """Count one more folder."""
        self.documents += (every := sum(map(len, sides.values())))
        self.rejects.update(rejects)
        if every > 60:  # small folders appear only if neither split is empty
            self.sides.update({split: len(texts) for split, texts in sides.items()})
            self.expected_val += share * every
            self.doubt_val += share * (1 - share) * every

    def overall(self) -> list[str]:
        """Deviations that show only over many cases."""
        wrong = []
        for just, missed in self.missed.items():
            if missed > (mean := self.may_miss[just]) + 5 * mean**0.5 + 2:
                what = f"of {self.alike[just]} near-duplicates{' just at the threshold' * just}"
                wrong.append(f"{what} {missed} missed, {mean:.1f} expected")
        if abs(self.sides["val"] - self.expected_val) > 5 * self.doubt_val**0.5 + 3:
            wrong.append(f"validation has {self.sides['val']}, not {self.expected_val:.0f}")
        return wrong


@dataclass
class Step:
    """One command of a case, and the evaluation texts that it names."""

    asked: Asked
    round: Round
    evals: list[str]


@dataclass
class Folder:
    """What has to be in a prepared folder, and the counts in its manifest."""

    share: float
    documents: dict[str, list[str]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    rejects: Counter[str] = field(default_factory=Counter)
    places: dict[str, set[str]] = field(default_factory=dict)
    near: list[str] = field(default_factory=list)
    inputs: list[list[int]] = field(default_factory=list)
    """Files, documents, bytes and tokens of each."""

    @property
    def every(self) -> list[str]:
        """All documents."""
        return self.documents["train"] + self.documents["val"]


def expect(before: Folder, step: Step, came: set[str], result: Result) -> tuple[Folder, list[str]]:
    """What is in the folder after a command, and wrong decisions about near-duplicates; since some
    of these may be missed, the reference follows what the command kept.
    """
    after, wrong, asked = Folder(before.share), list[str](), step.asked
    after.documents = {split: [*texts] for split, texts in before.documents.items()}
    after.rejects, after.near = before.rejects.copy(), [*before.near]
    after.places = {reason: {*places} for reason, places in before.places.items()}
    rows = [[count, 0, 0, 0] for count in step.round.files]
    evals = {gram for text in step.evals for gram in grams(text, EXCLUDE_GRAM)}
    seen, stayed = set(before.every), before.every

    def lose(reason: str, item: Item) -> None:
        after.rejects[reason] += 1
        if reason in (DUPLICATE, EXCLUDED):  # of the first one, its file or its first words
            told = {item.place.split(": byte")[0], f"begins {_start(item.text)!r}"}
        else:
            told = {item.place}
        after.places.setdefault(reason, set()).update(told)

    for item in step.round.items:
        text = item.text
        if item.reason:
            mended = asked.replace and item.reason in (UTF8, SURROGATES)
            lose(item.reason + TAKEN * mended, item)
            if not mended:
                continue
        if text in seen:
            lose(DUPLICATE, item)
            continue
        seen.add(text)
        if evals & grams(text, EXCLUDE_GRAM):
            lose(EXCLUDED, item)
            continue
        if asked.near and (said := _near(text, stayed, text in came, asked.near, result)):
            wrong += [said] * (said != NEAR)
            lose(NEAR, item)
            after.near.append(text)
            continue
        stayed.append(text)
        after.documents["val" if is_val(text, before.share) else "train"].append(text)
        rows[item.origin] = [*map(sum, zip(rows[item.origin], (0, *_size(text)), strict=True))]
    after.inputs = before.inputs + rows
    return after, wrong


def _near(text: str, stayed: list[str], kept: bool, threshold: float, result: Result) -> str:
    """NEAR if a document was rightly dropped, "" if it may stay, otherwise what is wrong."""
    best = max((jaccard(text, other) for other in stayed), default=0.0)
    if len(grams(text, 5)) > COUNTED:  # decided by a sample: allow for its error
        return NEAR if not kept and best >= threshold - 0.12 else ("" if kept else "too unlike")
    alike = best >= threshold
    if not kept and not alike:
        return f"dropped, though at most {best:.4f} similar, not {threshold}: {text[:60]!r}"
    if alike:
        result.alike[best == threshold] += 1
        result.missed[best == threshold] += kept
        result.may_miss[best == threshold] += (1 - best**4) ** 16  # 16 keys of 4 numbers each
        if kept and best == 1:
            return f"kept, though it has the 5-grams of an earlier one: {text[:60]!r}"
    return NEAR if alike and not kept else ""


def judge(out: Path, folder: Folder, steps: list[Step]) -> list[str]:
    """Differences between a folder and what it has to be."""
    manifest, wrong = json.loads((out / "manifest.json").read_text()), list[str]()
    for split, expected in folder.documents.items():
        found, broken = shards(out, manifest, split)
        wrong += broken
        if found != expected:
            lost, strange = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
            what = f"{len(lost)} lost {[*lost][:2]!r:.200}, {len(strange)} too many "
            what += f"{[*strange][:2]!r:.200}" if lost or strange else "(another order)"
            wrong.append(f"{split}: {len(found)} documents for {len(expected)}: {what}")
        figures = manifest["splits"][split]
        sums = tuple(map(sum, zip((0, 0, 0), *map(_size, expected), strict=True)))
        if sums != tuple(figures[key] for key in ("documents", "text_bytes", "tokens")):
            wrong.append(f"{split}: {figures} says the manifest, {sums} it is")
    files = set(contents(out)) - {"manifest.json"}
    if files != set(manifest["files"]):
        wrong.append(f"files {files ^ set(manifest['files'])}")
    for name in files & set(manifest["files"]):
        data, entry = (out / name).read_bytes(), manifest["files"][name]
        if entry != {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
            wrong.append(f"{name}: not what the manifest says")
    keys = ("files", "documents", "text_bytes", "tokens")
    if (rows := [[row[key] for key in keys] for row in manifest["inputs"]]) != folder.inputs:
        wrong.append(f"inputs {rows} for {folder.inputs}")
    first = manifest["options"]
    if (first["near_dedup"], first["exclude"]) != (steps[0].asked.near, steps[0].asked.exclude):
        wrong.append(f"options {first}")
    return wrong + _reasons(manifest["rejects"], folder)


def _reasons(rejects: dict[str, Any], folder: Folder) -> list[str]:
    """Wrong counts and examples of what was dropped."""
    counts, wrong = Counter({why: each["count"] for why, each in rejects.items()}), list[str]()
    expected = folder.rejects.copy()
    # A repeated document with an excluded text may count as either.
    again = counts[EXCLUDED] - expected[EXCLUDED]
    if 0 < again <= expected[DUPLICATE]:
        expected[EXCLUDED] += again
        expected[DUPLICATE] -= again
    for reason in sorted(expected | counts):
        if counts[reason] != expected[reason]:
            wrong.append(f"{reason}: counted {counts[reason]}, not {expected[reason]}")
    places = folder.places
    places = places | {EXCLUDED: places.get(EXCLUDED, set()) | places.get(DUPLICATE, set())}
    for reason, each in rejects.items():
        told = each["examples"]
        if not 0 < len(told) <= min(EXAMPLES, each["count"]):
            wrong.append(f"{reason}: {len(told)} examples of {each['count']}")
        if reason == NEAR:
            wrong += [f"example {one}" for one in told if not _pair(one, folder)]
        elif odd := {one.partition(" (has ")[0] for one in told} - places.get(reason, set()):
            wrong.append(f"{reason}: examples {odd} of {sorted(places.get(reason, set()))[:9]}")
    return wrong


def _pair(told: str, folder: Folder) -> bool:
    """Whether an example shows a dropped document, a kept one, and their similarity."""
    found = re.fullmatch(r"(\d\.\d\d): (.*) is like (.*)", told, re.DOTALL)
    return found is not None and any(
        f"{jaccard(a, b):.2f}" == found[1] or max(len(ids(a)), len(ids(b))) > COUNTED
        for a in folder.near
        if _start(a) == ast.literal_eval(found[2])
        for b in folder.every
        if _start(b) == ast.literal_eval(found[3])
    )


def _size(text: str) -> tuple[int, int, int]:
    """Documents, bytes and tokens."""
    return 1, len(text.encode()), len(ids(text)) + 1


def _start(text: str) -> str:
    return encoding().decode(list(ids(text)[:16]))


class Case:
    """Random rounds and options in their own folder."""

    def __init__(self, root: Path, number: int, seed: int, result: Result) -> None:
        self.source, self.root = random.Random(f"{seed} {number}"), root / f"c{number:05d}"
        self.root.mkdir()
        self.name, self.result = f"seed {seed} case {number}", result
        self.unit = self.source.choice([SMALL, 4 << 20])
        source = self.source
        near = source.choice([0, 0.5, 0.6, 0.7, 0.8, 0.8, 0.9, 1.0])
        maker = Maker(source, near or 0.8, source.choice(["text", "text", "body"]))
        exclude = maker.exclude(self.root / "eval") if source.random() < 0.5 else []
        share = source.choice([0, 0.05, 0.1, 0.3, 0.5, 0.9])
        first = asked = Asked(share, near, exclude, source.random() < 0.5, maker.field)
        self.steps: list[Step] = []
        for number in range(source.choice([1, 1, 2, 3])):
            if number:
                asked = self._more(first, maker)
            made = maker.round(self.root / f"r{number}")
            self.steps.append(Step(asked, made, maker.said(asked.exclude)))

    def _more(self, old: Asked, maker: Maker) -> Asked:
        """Options of an append: sometimes stricter, sometimes such that it has to be refused."""
        source, near, exclude = self.source, old.near, old.exclude
        if source.random() < 0.3:
            near = source.choice([0, 0.5, 0.7, 0.9])
        if source.random() < 0.2:
            exclude = [] if exclude else maker.exclude(self.root / f"eval{len(self.steps)}")
        share = source.choice([old.share, 0.2])
        return Asked(share, near, exclude, source.random() < 0.5, old.field)

    def run(self, words: list[str], *, alone: bool = False) -> Finished:
        """Run the command, here or in its own process."""
        self.result.commands += 1
        if alone:
            module = "tests.chaos.small" if self.unit == SMALL else "sota_transformer"
            return sota(words, self.root, module=module)
        from . import small  # imported late: it makes all units of work small

        return small.here(words, self.unit)

    def prepare(self, step: Step, out: Path, append: bool, how: list[str]) -> Finished:
        """One step, perhaps in parts."""
        words = ["prepare", *step.round.arguments, "--out", str(out), *step.asked.words()]
        words += ["--append"] * append
        if "parts" not in how:
            return self.run(words + [w for w in how if w != "alone"], alone="alone" in how)
        count = self.source.randint(2, 3)
        for part in self.source.sample(range(1, count + 1), count):
            done = self.run([*words, "--workers", "1", "--part", f"{part}/{count}"])
            if done.code:
                return done
        last = ["merge", str(out), "--workers", "1"]
        return self.run(last if self.source.random() < 0.7 else [*words, "--workers", "1"])

    def judge(self) -> list[str]:
        """Run all steps one way, with a check after each; then all of them another way."""
        one, two, wrong = self.root / "one", self.root / "two", list[str]()
        folder, done_steps = Folder(self.steps[0].asked.share), list[Step]()
        other = self.source.choice([["--workers", "2"], ["--workers", "2", "--memory-mb", "500"],
                                    ["parts"], ["parts"], ["alone"]])  # fmt: skip
        for step in self.steps:
            before = contents(one) if one.exists() else {}
            done = self.prepare(step, one, bool(done_steps), ["--workers", "1"])
            if why := self._refused(step, done_steps):
                self.result.refused += 1
                now = contents(one) if one.exists() else {}
                if done.code != USAGE or len(done.output.splitlines()) != 1 or before != now:
                    wrong.append(f"{why} is not refused: {done.code} {done.output[-300:]}")
                continue
            after, bad = expect(folder, step, documents(one), self.result)
            sides = after.documents
            few = not (sides["train"] and (sides["val"] or not after.share)) and not done_steps
            if done.code != (BAD_DATA if few else 0) or done.crashed:
                what = "too few" if few else "enough"
                return [*wrong, f"exit {done.code}, {what} documents: {done.output[-600:]}"]
            if few:
                self.result.refused += 1
                return wrong
            done_steps.append(step)
            wrong += bad + judge(one, after, done_steps)
            now = contents(one)
            if moved := [n for n in before if n != "manifest.json" and now.get(n) != before[n]]:
                wrong.append(f"--append changed {moved}")
            again = self.prepare(step, two, len(done_steps) > 1, other)
            if again.code != 0 or contents(two) != now:
                wrong.append(f"{other}: exit {again.code}, different bytes: {again.output[-300:]}")
                return wrong
            folder = after
        if done_steps:
            self.result.count(folder.documents, folder.rejects, folder.share)
            wrong += self._leak(one, folder)
        return wrong

    def _refused(self, step: Step, before: list[Step]) -> str:
        """Why an append has to be refused: it would add what the folder excludes."""
        if not before:
            return ""
        first, asked = before[0].asked, step.asked
        if first.near and not 0 < asked.near <= first.near:
            return f"--near-dedup {asked.near} after {first.near}"
        if set(first.exclude) - set(asked.exclude):
            return "an --exclude file that is gone"
        return ""

    def _leak(self, out: Path, folder: Folder) -> list[str]:
        """What is wrong with the leakage reported by `sota data`."""
        done = self.run(["data", str(out), "--leakage", "--show", "0"])
        sides = (folder.documents[split] for split in SPLITS)
        train, val = (
            {gram for text in side for gram in grams(text, EXCLUDE_GRAM)} for side in sides
        )
        share = 100 * len(train & val) / len(val) if val else 0.0
        told = re.search(r"^leakage: ([\d.]+)% of validation's 13-grams", done.output, re.MULTILINE)
        if done.code or not told or abs(float(told[1]) - share) > 0.00051:
            return [f"leakage {told and told[0]!r}, {share:.4f}% it is; exit {done.code}"]
        return []


def policies(root: Path, count: int, seed: int = 0) -> Result:
    """`count` folders; problems are named by their case."""
    result = Result()
    for number in range(count):
        case = Case(root, number, seed, result)
        if wrong := case.judge():
            result.wrong += [f"{case.name}: {each}" for each in wrong]
            kept = root.parent / f"wrong-{seed}-{number}"
            shutil.copytree(case.root, kept, dirs_exist_ok=True)
        shutil.rmtree(case.root)
        for cached in (ids, grams):
            cached.cache_clear()
        result.cases += 1
    result.wrong += result.overall()
    return result
