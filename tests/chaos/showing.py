"""Output of `sota data` on a folder of tokens, compared with the tokens as read by `cutting.py`.

Text is decoded by OpenAI's tiktoken; lengths, shares and histograms are counted one by one.
"""

import codecs
import json
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .commands import Finished
from .corpora import EOT, SPLITS, digest, encoding
from .cutting import Array, Side, stream
from .reckoning import things

Command = Callable[..., Finished]


def text_of(ids: Array) -> bytes:
    """Text of ids; end-of-text and padding have none."""
    return encoding().decode_bytes([each for each in ids.tolist() if each < EOT])


def beginning(one: Array, most: int) -> str:
    """Text of a document's first tokens, without a character that is cut there."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(text_of(one[:most]), final=len(one) <= most)


def clean(text: str) -> str:
    """Control characters except tabs and line ends are shown as question marks."""
    return "".join(
        "?" if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 else c
        for c in text.replace("\r\n", "\n")
    )


def lengths(side: Side) -> list[int]:
    """Tokens of each document without its end-of-text."""
    return [len(one) - int(one[-1] == EOT) for one in side.documents]


def shown(folder: Path, sides: dict[str, Side], here: Command, source: random.Random) -> list[str]:
    """Everything that is wrong."""
    count = source.choice([0, 1, 2, 5])
    out = folder.parent / "bins"
    done, wrong = here("data", str(folder), "--show", str(count)), list[str]()
    wrong += [f"data: exit {done.code}: {done.output[-300:]}"] * bool(done.code)
    exported = here("data", str(folder), "--export-bin", str(out))
    wrong += [f"--export-bin: {exported.output[-300:]}"] * bool(exported.code)
    for split in SPLITS:
        side = sides[split]
        wrong += [f"data, {split}: {each}" for each in _figures(split, side, done.output)]
        samples = re.findall(rf"^--- {split} document ([\d,]+)$", done.output, re.MULTILINE)
        wanted = min(count, len(side.ends))
        if len({*samples}) != wanted:
            wrong.append(f"--show {count}: {samples} of {split}")
        for each in samples:
            text = clean(beginning(side.documents[int(each.replace(",", ""))], 2000)[:600])
            if f"--- {split} document {each}\n{text}\n" not in done.output:
                wrong.append(f"--show: wrong text of {split} document {each}")
        wrong += _listed(folder, split, side, here)
        wrong += _window(folder, split, side, here, source)
        data = (out / f"{split}.bin").read_bytes() if (out / f"{split}.bin").exists() else b""
        if data != side.tokens.astype("<u2").tobytes():
            wrong.append(f"--export-bin: wrong ids of {split}")
    return wrong


def _figures(split: str, side: Side, said: str) -> Iterator[str]:
    """The lines about one split."""
    if not len(side.tokens):
        if f"{split}: empty\n" not in said:
            yield "is empty"
        return
    each = lengths(side)
    each = sorted([n for n in each if n] or each)
    ratio = len(text_of(side.tokens)) / max(1, sum(each))
    line = f"{split}: {things(len(each), 'document')}, {things(len(side.tokens), 'token')}, "
    if (line := f"{line}{ratio:.2f} bytes per token; letters by script: ") not in said:
        yield f"does not say {line!r}, but {re.findall(f'^{split}: .*', said, re.MULTILINE)}"
        return
    below = said[said.index(line) :].splitlines()[1:]
    found = re.fullmatch(
        r"  tokens per document: min ([\d,]+), 10% ([\d,]+), median ([\d,]+), "
        r"90% ([\d,]+), max ([\d,]+)",
        below[0],
    )
    for number, percent in enumerate((0, 10, 50, 90, 100), 1):
        at = Fraction(percent * (len(each) - 1), 100)
        low, high = each[int(at)], each[min(int(at) + 1, len(each) - 1)]
        exact = low + (at - int(at)) * (high - low)
        told = int(found[number].replace(",", "")) if found else -1
        if told not in (int(exact), int(float(exact) - 1e-9)):
            yield f"the length at {percent}% is {told}, not {float(exact)}"
    edges = [2**n for n in range(40)]
    counts = [0] * 40
    for n in each:
        counts[bisect_right(edges, max(1, n)) - 1] += 1
    wanted = {edge: n for edge, n in zip(edges, counts, strict=True) if n}
    if (told := {edge: n for edge, n in _histogram(below[1:]).items() if n}) != wanted:
        yield f"histogram {told}, not {wanted}"


def _histogram(lines: list[str]) -> dict[int, int]:
    """The first histogram: documents by their minimum length."""
    found = dict[int, int]()
    for line in lines:
        if not (bar := re.fullmatch(r" +([\d,]+)\+ +([\d,]+) (#*)", line)):
            break
        found[int(bar[1].replace(",", ""))] = int(bar[2].replace(",", ""))
    return found


def _listed(folder: Path, split: str, side: Side, here: Command) -> Iterator[str]:
    """--list-split."""
    done = here("data", str(folder), "--list-split", split)
    rows = [json.loads(line) for line in done.output.splitlines()] if not done.code else []
    wanted = list[dict[str, Any]]()
    for number, (one, length) in enumerate(zip(side.documents, lengths(side), strict=True)):
        text = beginning(one, 16)
        wanted.append({"document": number, "tokens": length, "text": text})
        if (folder / "manifest.json").exists():
            wanted[-1]["hash"] = digest(text_of(one).decode()).hex()
    if rows != wanted:
        differ = [pair for pair in zip(rows, wanted, strict=False) if pair[0] != pair[1]]
        yield f"--list-split {split}: {len(rows)} rows of {len(wanted)}, {done.code}: {differ[:1]}"


def _window(
    folder: Path, split: str, side: Side, here: Command, source: random.Random
) -> Iterator[str]:
    """--window, for any window and for one past the last."""
    length = source.choice([1, 7, 64, 512])
    cut, asked = stream(side, length), f"{split}:%d" + f":{length}" * (length != 512)
    done = here("data", str(folder), "--window", asked % len(cut.windows))
    if done.code not in (2, 65) or len(done.output.splitlines()) != 1:
        yield f"--window {asked % len(cut.windows)}: {done.code}, {done.output[-200:]}"
    if not len(cut.windows):
        return
    at = source.randrange(len(cut.windows))
    window = cut.windows[at]
    parts = np.split(window, np.flatnonzero(window == EOT) + 1)
    texts = (clean(text_of(part).decode("utf-8", "replace")) for part in parts)
    done = here("data", str(folder), "--window", asked % at)
    if done.code or done.output != "\n--- end of text ---\n".join(texts) + "\n":
        yield f"--window {asked % at}: {done.code}, {done.output[:300]!r}"
