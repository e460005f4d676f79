"""Random inputs through the real `sota prepare`, compared with what plain readers find in them.

Several inputs go into one command, as users give them. Each batch is prepared by one worker, and
again by two (which gives the same bytes) or in small units of work. Intact inputs have to come out
exactly, with the exact count of each reason; from damaged ones what precedes the damage has to come
out, and the damage has to be reported.
"""

import base64
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from sota_transformer.data.sources import EXAMPLES
from sota_transformer.data.tokenizer import _rank_file
from sota_transformer.errors import BAD_DATA, NO_INPUT

from . import making, plain
from .commands import Finished, contents, sota
from .plain import BROKEN, DAMAGED, NUL, Plain

WHOLE, LOOSE = 24, 4  # inputs per command
EOT, SECONDS = 50256, 300.0
FATES = {  # kind of input, and its weight
    "text": 6, "packed": 8, "tar": 4, "packed tar": 4, "sparse tar": 1, "zip": 5, "table": 7,
    "folder": 4, "glob": 2, "stdin": 2,
}  # fmt: skip


@dataclass
class Made:
    """One input, and what a plain reader finds in it."""

    number: int
    argument: str
    given: Path | None
    """The content of standard input."""
    plain: Plain


@dataclass
class Result:
    """Counts, and a description of everything that went wrong."""

    inputs: int = 0
    damaged: int = 0
    documents: int = 0
    commands: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.inputs:,} inputs, {self.damaged:,} of them damaged, {self.documents:,} "
        text += f"documents, {self.commands:,} commands; skipped:"
        return text + "".join(f"\n{n:>8,}  {why}" for why, n in self.losses.most_common())


def make(number: int, seed: int, root: Path) -> Made:
    """Input `number` of a seed, independent of the others, in its own folder."""
    source, place = random.Random(f"{seed} {number}"), root / f"i{number:05d}"
    place.mkdir()
    kind = source.choices(list(FATES), list(FATES.values()))[0]
    if kind in ("folder", "glob"):
        making.folder(source, place / "in")
        pattern = source.choice(["*", "**/*", "*.*"])
        if kind == "folder":
            return Made(number, str(place / "in"), None, plain.read(place / "in"))
        paths = sorted((place / "in").glob(pattern))
        return Made(number, str(place / "in" / pattern), None, _matched(paths))
    path = _file(source, kind, place, f"i{number:05d}")
    if source.random() < 0.25 and kind != "text":
        path.write_bytes(_damaged(source, path.read_bytes(), again=path.suffix == ".tar"))
    found = plain.read(path)
    given = path if kind == "stdin" else None
    return Made(number, "-" if given else str(path), given, found)


def _matched(paths: list[Path]) -> Plain:
    """What a glob matches: each file once, nothing hidden."""
    found, taken = Plain(), set[Path]()
    for path in paths:
        below = path.relative_to(path.parents[len(path.parts) - 2]).parts
        if taken & set(path.parents):
            continue
        taken.add(path)
        if any(part.startswith(".") for part in below):
            found.lose("hidden")
        elif not path.exists():
            found.lose("cannot be read")
        else:
            found.add(plain.read(path))
    return found


def _file(source: random.Random, kind: str, place: Path, name: str) -> Path:
    """A file of some kind."""
    codec = source.choice(["gz", "zst", "bz2", "xz"])
    if kind == "table":
        path = place / f"{name}.{source.choice(['parquet', 'parquet', 'arrow', 'feather'])}"
        making.table(source, path)
        return path
    if kind == "stdin":
        data = source.choice([making.lines, making.prose])(source) or b"nothing"
        path = place / name
    elif kind == "zip":
        path, data = place / f"{name}.zip", making.zipped(source)
    elif kind == "sparse tar":
        path, data = place / f"{name}.tar", making.sparse_tar(source, place)
    elif kind.endswith("tar"):
        path, data = place / f"{name}.tar", making.tar(source)
        if kind == "packed tar":
            path = place / (f"{name}.tgz" if codec == "gz" else f"{name}.tar.{codec}")
            data = making.pack(source, codec, data)
    else:
        ending, data = making.text_file(source)
        if ending in ("jsonl", "txt") and source.random() < 0.3:
            ending = source.choice(["JSON", "dat"])
        path = place / f"{name}.{ending}"
        if kind == "packed":
            path, data = place / f"{name}.{ending}.{codec}", making.pack(source, codec, data)
    path.write_bytes(data)
    return path


def _damaged(source: random.Random, data: bytes, *, again: bool) -> bytes:
    """Truncated, changed, padded, or with something appended."""
    at = source.randrange(len(data) + 1)
    match source.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return making.flipped(source, data, 1)
        case 2:
            return making.flipped(source, data, 9)
        case 3:
            return data[: at & ~511]
        case 4:
            behind = [bytes(1024) + data, data] if again else [b"what is this?", bytes(8) + b"?"]
            return data + source.choice(behind)
        case _:
            return data[:at] + source.randbytes(source.randint(1, 600)) + data[at:]


def batches(made: Iterator[Made]) -> Iterator[list[Made]]:
    """Batches of intact inputs; at most one from standard input."""
    waiting: dict[bool, list[Made]] = {False: [], True: []}
    for item in made:
        batch = waiting[item.plain.loose]
        if item.given and any(other.given for other in batch):
            yield batch
            waiting[item.plain.loose] = batch = []
        batch.append(item)
        if len(batch) >= (LOOSE if item.plain.loose else WHOLE):
            yield batch
            waiting[item.plain.loose] = []
    yield from filter(None, waiting.values())


def prepare(batch: list[Made], out: Path, workers: int, *, small: bool = False) -> Finished:
    """Run the real command; `small` splits its work into small units."""
    module = "tests.chaos.small" if small else "sota_transformer"
    words = ["prepare", *(item.argument for item in batch), "--out", str(out)]
    words += ["--val-fraction", "0", "--workers", str(workers)]
    given = next((item.given for item in batch if item.given), Path(os.devnull))
    return sota(words, out.parent, SECONDS, given=given, module=module)


@cache
def decoder() -> tiktoken.Encoding:
    """GPT-2's tokenizer from OpenAI's program, its vocabulary checked by SHA-256."""
    pairs = (line.split() for line in _rank_file().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})


def taken(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Every document in order; ValueError unless 50256 follows each exactly once."""
    found = []
    for name in manifest["splits"]["train"]["shards"]:
        ids = np.load(out / name)
        ends = [0, *np.load(out / name.replace(".npy", ".ends.npy")).tolist()]
        if ends[1:] != (np.flatnonzero(ids == EOT) + 1).tolist():
            raise ValueError("50256 does not follow each document once")
        whole = [ids[first : last - 1].tolist() for first, last in pairwise(ends)]
        found += [decoder().decode_bytes(each).decode() for each in whole]
    return found


def short(reason: str) -> str:
    """A reason without the parts that vary between files."""
    return re.sub(r"^damaged .*", DAMAGED, re.split(r"; | \(", reason)[0])


def pieces(least: str, most: str, found: list[str]) -> list[str]:
    """The consecutive documents that a text was split into; [] if it was not found."""
    best: list[str] = []
    for first, document in enumerate(found):
        if most.startswith(document):
            last, size = first + 1, len(document)
            while last < len(found) and most.startswith(found[last], size):
                size += len(found[last])
                last += 1
            if size > sum(map(len, best)):
                best = found[first:last]
    whole = sum(map(len, best)) >= len(least) and "".join(best) == most[: sum(map(len, best))]
    return best if whole else []


def problems(found: list[str], rejects: dict[str, Any], batch: list[Made]) -> list[str]:
    """Differences between a command's documents and reasons and what its inputs hold."""
    every, wrong = Plain(), list[str]()
    for item in batch:
        every.add(item.plain)
    came, total, known = set(found), len(every.documents), set(every.documents)
    for least, most in sorted(every.texts, key=lambda text: not text[0]):
        if least:
            parts = [most] if most in came else pieces(least, most, found)
        else:
            parts = [one for one in came - known if one in most]
        total += len(parts)
        known |= set(parts)
        if least.strip() and not parts:
            wrong.append(f"lost: the text {least[:80]!r}")
    if len(came) < len(found):
        wrong.append(f"twice: {(Counter(found) - Counter(came)).most_common(1)}")
    if missing := set(every.documents) - came:
        wrong.append(f"lost: {len(missing)} documents, {min(missing)[:80]!r}")
    strange = came - known - set(every.perhaps)
    if every.loose:  # cut where another reader reads on
        every.perhaps += every.documents
        strange = {one for one in strange if not any(x.startswith(one) for x in every.perhaps)}
    if strange and not every.blind:
        wrong.append(f"not in the input: {len(strange)} documents, {min(strange)[:80]!r}")
    if not every.loose:
        every.losses["exact duplicate"] = total - len(found)
    return wrong + _miscounted(every, rejects, batch)


def _miscounted(every: Plain, rejects: dict[str, Any], batch: list[Made]) -> list[str]:
    """Reasons with too low or too high a count."""
    wrong, expected, counted = [], Counter[str](), Counter[str]()
    for reason, count in every.losses.items():
        expected[short(reason)] += count
    for reason, each in rejects.items():
        counted[short(reason)] += each["count"]
    broken = any(not least for least, _ in every.texts)
    for reason in sorted(expected | counted):
        few, many = counted[reason] < expected[reason], counted[reason] > expected[reason]
        by_piece = broken and reason in (BROKEN, NUL)
        if few or (many and not every.loose and not by_piece):
            wrong.append(f"{reason}: counted {counted[reason]}, not {expected[reason]}")
    told = [
        place
        for reason, each in rejects.items()
        if reason.startswith(DAMAGED)
        for place in each["examples"]
    ]
    crowd = any(len(each["examples"]) == EXAMPLES for each in rejects.values())
    for item in () if crowd else batch:
        name = "stdin" if item.given else f"i{item.number:05d}"
        if item.plain.losses[DAMAGED] and not any(place.startswith(name) for place in told):
            wrong.append(f"{name}: its damage is not reported")
    return wrong


def judge(root: Path, batch: list[Made], other: str, result: Result) -> list[str]:
    """Prepare a batch by one worker, and by two or in small units; what is wrong."""
    wrong, batch = list[str](), [*batch, _anchor(root)]
    for way, workers in (("one", 1), (other, 2)):
        done = prepare(batch, root / way, workers, small=way == "small")
        result.commands += 1
        if done.crashed or done.code != 0:  # None: it hung
            wrong.append(f"{way}: exit {done.code} {done.output[-600:]}")
        else:
            manifest = json.loads((root / way / "manifest.json").read_text())
            found = taken(root / way, manifest)
            wrong += [f"{way}: {each}" for each in problems(found, manifest["rejects"], batch)]
    if not wrong:
        manifest = json.loads((root / "one/manifest.json").read_text())
        result.documents += manifest["splits"]["train"]["documents"]
        for reason, each in manifest["rejects"].items():
            result.losses[short(reason)] += each["count"]
    if other == "two" and _same(root / "one") != _same(root / "two"):
        wrong.append("one worker and two gave different bytes")
    for way in ("one", other):
        shutil.rmtree(root / way, ignore_errors=True)
        shutil.rmtree(root / f".{way}.preparing", ignore_errors=True)
    return wrong


def _anchor(root: Path) -> Made:
    """A good file, so that there is always a result."""
    path = root / "anchor.txt"
    path.write_text("held fast")
    return Made(-1, str(path), None, Plain(documents=["held fast"]))


def alone(root: Path, item: Made, result: Result) -> list[str]:
    """What is wrong with the outcome of a single input."""
    done = prepare([item], root / "alone", 1)
    result.commands += 1
    some, texts = bool(item.plain.documents), bool(item.plain.texts or item.plain.loose)
    good = (0,) if some else (0, BAD_DATA, NO_INPUT) if texts else (BAD_DATA, NO_INPUT)
    lines = done.output.splitlines()
    shutil.rmtree(root / "alone", ignore_errors=True)
    shutil.rmtree(root / ".alone.preparing", ignore_errors=True)
    if done.crashed or done.code not in good or (done.code and len(lines) != 1):
        return [f"alone: exit {done.code} {done.output[-600:]}"]
    return []


def _same(out: Path) -> Any:
    """What does not depend on the workers; standard input has another date each time."""
    if not out.exists():
        return None
    files, manifest = contents(out), json.loads((out / "manifest.json").read_text())
    files.pop("manifest.json")
    return files, {k: v for k, v in manifest.items() if k not in ("requests", "self_sha256")}


def inputs(root: Path, count: int, seed: int = 0) -> Result:
    """`count` inputs in batches; for a wrong batch the first wrong input is named."""
    result = Result()
    (root / "made").mkdir()
    made = (make(number, seed, root / "made") for number in range(count))
    for turn, batch in enumerate(batches(made)):
        result.inputs += len(batch)
        result.damaged += sum(item.plain.loose for item in batch)
        other = ("two", "small")[turn % 2]
        if wrong := judge(root, batch, other, result):
            for item in batch:
                if single := judge(root, [item], other, result):
                    name = f"seed {seed} input {item.number} {item.given or item.argument}"
                    wrong = [f"{name}: {each}" for each in single]
                    place = root / "made" / f"i{item.number:05d}"
                    kept = root.parent / f"wrong-{seed}-{item.number}"
                    shutil.copytree(place, kept, symlinks=True, dirs_exist_ok=True)
                    break
            result.wrong += wrong
        if turn % 4 == 0:
            result.wrong += alone(root, batch[0], result)
        for item in batch:
            shutil.rmtree(root / "made" / f"i{item.number:05d}")
    return result
