"""Random small corpora for `policies.py`: the contents of each file in order, and their outcomes.

Documents are copied, altered to a similarity just below or above a threshold, given a piece of an
evaluation text, and broken in every way that has its own reason.
"""

import gzip
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from blake3 import blake3

from .inputs import decoder

# OpenAI's pattern, as published with GPT-2.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EXCLUDE_GRAM, EOT = 13, 50256
SPLITS = ("train", "val")
MIB = 1 << 20
PIECE = 2800  # bytes of a text file that even the smallest unit of work does not split
UTF8, SURROGATES = "not valid UTF-8", "lone surrogates, not valid Unicode"
_SYLLABLES = [
    "ka", "lo", "mi", "ter", "un", "ra", "sil", "do", "e", "vor", "han", "el", "is", "the", "of",
]  # fmt: skip
ODD = ["日本語", "über", "и это", "naïve", "<|endoftext|>", "\U0001f600", "e\u0301", "1,234", "::="]


@dataclass
class Item:
    """One document of a file, or what is in its place."""

    text: str
    """The text as kept; "" if it never is."""
    reason: str = ""
    """Why it is skipped, or only repaired."""
    place: str = ""
    """How an example in the manifest may name it."""
    origin: int = 0
    """The index of its input."""


@dataclass
class Round:
    """The inputs of one command, in order."""

    arguments: list[str]
    items: list[Item]
    files: list[int]
    """Counts for each input."""


@dataclass
class Asked:
    """Options of one command that affect decisions."""

    share: float
    near: float
    exclude: list[str]
    replace: bool
    field: str

    def words(self) -> list[str]:
        """As command-line words."""
        made = ["--val-fraction", str(self.share), "--text-field", self.field]
        made += ["--near-dedup", str(self.near)] * bool(self.near)
        made += ["--exclude", *self.exclude] * bool(self.exclude)
        return made + ["--bad-text", "replace"] * self.replace


@cache
def encoding() -> tiktoken.Encoding:
    """GPT-2's encoding from OpenAI's program."""
    ranks = decoder()._mergeable_ranks
    return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})


@cache
def ids(text: str) -> tuple[int, ...]:
    """Tokens of a document, without end-of-text."""
    return tuple(encoding().encode_ordinary(text))


@cache
def grams(text: str, size: int) -> frozenset[tuple[int, ...]]:
    """The distinct runs of `size` tokens of a document."""
    own = ids(text)
    return frozenset(own[at : at + size] for at in range(len(own) - size + 1))


def jaccard(a: str, b: str) -> float:
    """Of the 5-grams: size of the intersection over size of the union; 0 if there are none."""
    first, second = grams(a, 5), grams(b, 5)
    both = len(first & second)
    return both / (len(first) + len(second) - both) if both else 0.0


def digest(text: str) -> bytes:
    """By the rule stated in the manifest."""
    return blake3(text.encode(), key=b"sota_transformer document hash 1").digest(16)


def is_val(text: str, share: float) -> bool:
    """The split follows from the text alone."""
    return int.from_bytes(digest(text)[:8], "little") < int(share * 2**64)


def shards(out: Path, manifest: dict[str, Any], split: str) -> tuple[list[str], list[str]]:
    """Documents of a split in order; what is wrong with its files."""
    found, wrong = list[str](), list[str]()
    for name in manifest["splits"][split]["shards"]:
        tokens, stem = np.load(out / name), name.removesuffix(".npy")
        ends = [0, *np.load(out / f"{stem}.ends.npy").tolist()]
        hashes = np.load(out / f"{stem}.hashes.npy")
        if ends[1:] != (np.flatnonzero(tokens == EOT) + 1).tolist():
            wrong.append(f"{name}: 50256 does not follow each document once")
        whole = [tokens[first : last - 1].tolist() for first, last in pairwise(ends)]
        texts = [encoding().decode_bytes(each).decode() for each in whole]
        found += texts
        wrong += [f"{name}: wrong ids" for a, b in zip(whole, texts, strict=True) if a != [*ids(b)]]
        if [row.tobytes() for row in hashes] != [digest(text) for text in texts]:
            wrong.append(f"{name}: wrong hashes")
    return found, wrong


def documents(out: Path) -> set[str]:
    """All documents in a folder of prepared data."""
    if not (out / "manifest.json").exists():
        return set()
    manifest = json.loads((out / "manifest.json").read_text())
    return {text for split in SPLITS for text in shards(out, manifest, split)[0]}


@dataclass
class Maker:
    """State shared by the rounds of one case."""

    source: random.Random
    threshold: float
    field: str
    texts: list[str] = field(default_factory=list)
    """Texts made so far, to be repeated."""
    evals: dict[str, list[str]] = field(default_factory=dict)
    """The text of each evaluation file."""

    def __post_init__(self) -> None:
        pick = self.source.choices
        self._words = ["".join(pick(_SYLLABLES, k=self.source.randint(1, 4))) for _ in range(500)]
        self._page = self.words(self.source.choice([40, 150]))

    def words(self, count: int) -> str:
        """Some words, rarely odd ones."""
        made = self.source.choices(self._words, k=count)
        if self.source.random() < 0.2:
            made[self.source.randrange(count)] = self.source.choice(ODD)
        return " ".join(made)

    def text(self) -> str:
        """A document that is not empty."""
        while not (text := self._text()).strip():
            pass
        return text

    def _text(self) -> str:
        """Often derived from an earlier one."""
        kind = self.source.choices(["new", "copy", "near", "eval", "page"], [40, 12, 30, 10, 8])[0]
        old = self.source.choice(self.texts) if self.texts else ""
        if kind == "copy" and old:
            return old
        if kind == "near" and old:
            return self.near(old)
        if kind == "eval" and self.evals:
            return self._tainted()
        if kind == "page":
            page = self._page.split()
            for _ in range(self.source.randint(1, 12)):
                page[self.source.randrange(len(page))] = self.source.choice(self._words)
            return " ".join(page)
        sizes = [(1, 4), (5, 30), (30, 150), (150, 400), (900, 1400)]
        return self.words(self.source.randint(*self.source.choices(sizes, [2, 8, 10, 3, 0.2])[0]))

    def near(self, old: str) -> str:
        """A text about as similar to an earlier one as the threshold."""
        own, source = list(ids(old)), self.source
        wanted = self.threshold + source.choice([-0.1, -0.03, -0.01, 0, 0, 0.01, 0.03, 0.1])
        count = max(1, len(own) - 4)
        match source.randrange(4):
            case 0:  # a part of it, with an exact share of its 5-grams
                left = max(1, round(count * wanted) + 4)
                at = source.choice([0, len(own) - left]) if left < len(own) else 0
                return encoding().decode(own[at : at + left])
            case 1:  # with something appended
                more = round(count / max(wanted, 0.1)) - count
                return f"{old} {self.words(max(1, more // 3))}"
            case 2:  # words changed here and there
                parts = old.split(" ")
                for _ in range(max(1, round(len(parts) * (1 - wanted) / 9))):
                    parts[source.randrange(len(parts))] = source.choice(self._words)
                return " ".join(parts)
            case _:  # the same 5-grams in another number or form
                return source.choice(
                    [f"{old} {old} {old}", old + "\n", old.capitalize(), f" {old}"]
                )

    def _tainted(self) -> str:
        """With 12, 13 or more consecutive tokens of an evaluation text."""
        test = ids(self.source.choice(self.said(self.evals)))
        size = self.source.choice([11, 12, 12, 13, 13, 14, 20])
        at = self.source.randrange(max(1, len(test) - size + 1))
        sizes = (self.source.choice([0, 1, 8, 40]) for _ in range(2))  # 0: at its very end
        before, behind = (self.words(size) if size else "" for size in sizes)
        piece = encoding().decode(list(test[at : at + size]))
        return self.source.choice(
            [f"{before}{piece}{behind}", f"{before} {piece.strip()} {behind}"]
        )

    def line(self) -> tuple[bytes, Item]:
        """A JSON line, and its outcome."""
        text, source = self.text(), self.source
        plain = json.dumps({self.field: text}, ensure_ascii=source.random() < 0.5).encode()
        if source.random() > 0.12:
            self.texts.append(text)
            return plain, Item(text)
        mended = f"{text} \ufffd."
        key = self.field
        made = [
            (json.dumps({key: source.choice(["", " \n", "\u3000"])}), Item("", "empty document")),
            (json.dumps({key: f"{text}\0"}), Item("", "NUL bytes, probably not text")),
            (json.dumps({"other": text}), Item("", f"no field '{key}'")),
            (json.dumps({key: [text]}), Item("", f"field '{key}' is not text")),
            (json.dumps([text]), Item("", "JSON, but not an object")),
            (plain.decode()[:-1], Item("", "not a JSON line")),
            (json.dumps({key: f"{text} \ud83d."}), Item(mended, SURROGATES)),
            (json.dumps({key: f"{text} ?!."}), Item(mended, UTF8)),
            (json.dumps({key: "too long"}), Item("", "document over 16 MiB")),
        ]
        data, item = source.choices(made, [3, 3, 3, 3, 3, 3, 6, 6, 0.2])[0]
        if item.reason == UTF8:
            return data.encode().replace(b"?!.", b"\xff."), item
        if item.reason.endswith("MiB"):
            data = data.replace("too long", "too long " * (MIB * 16 // 9 + 1))
        return data.encode(), item

    def file(self, folder: Path, number: int) -> tuple[Path, list[Item]]:
        """A file of some kind, its items with their places below the file name."""
        source = self.source
        kind = source.choice(["jsonl"] * 4 + ["jsonl.gz", "txt", "md", "py", "html", "utf-16"])
        stem = folder / f"{source.choice('abcZ')}{source.choice(['', '-', '_', ' é'])}{number}"
        if kind.startswith("jsonl"):
            path = stem.with_name(f"{stem.name}.{kind}")
            items, data = [], b""
            for _ in range(source.choice([1, 5, 20, 60])):
                line, item = self.line()
                item.place = f"{path.name}: byte {len(data)}"
                items.append(item)
                data += line + source.choice([b"\n", b"\n", b"\r\n", b"\n\n"])
            data = data if source.random() < 0.5 else data.rstrip()
            path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
            return path, items
        text = self.text()
        while len(text.encode()) > PIECE:
            text = text[: len(text) // 2]
        path = stem.with_name(f"{stem.name}.{'txt' if kind == 'utf-16' else kind}")
        item, data = Item(text, place=path.name), text.encode()
        if kind == "html":  # plain words, so that all readers agree on the text
            item.text = text = self.words(40)
            data = f"<html><head><title>x</title></head><body><p>{text}</p></body></html>".encode()
            if "<|" in text:
                data = data.replace(b"<|endoftext|>", b"&lt;|endoftext|&gt;")
        elif kind == "utf-16":
            data = b"\xff\xfe" + text.encode("utf-16-le")
        elif source.random() < 0.15:
            item, data = Item(f"{text} \ufffd", UTF8, path.name), data + b" \xc3"
        elif source.random() < 0.1:
            item, data = Item("", "empty document", path.name), b" \n\t\n"
        self.texts += [item.text] * (not item.reason)
        path.write_bytes(data)
        return path, [item]

    def round(self, place: Path) -> Round:
        """Folders and files, given in any order."""
        made = Round([], [], [])
        for number in range(self.source.randint(1, 3)):
            folder = place / f"in{number}"
            folder.mkdir(parents=True)
            count = self.source.randint(1, 6)
            files = [self.file(folder, n) for n in range(count)]
            alone = count == 1 and self.source.random() < 0.5
            files.sort(key=lambda each: str(each[0]).encode())
            made.arguments.append(str(files[0][0] if alone else folder))
            made.files.append(count)
            for _, items in files:
                for item in items:
                    item.place = item.place if alone else f"{folder.name}/{item.place}"
                    item.origin = number
                made.items += items
        return made

    def exclude(self, place: Path) -> list[str]:
        """Evaluation files: records with a text field or other fields, or plain text."""
        place.mkdir()
        named = []
        for number in range(self.source.randint(1, 2)):
            texts = [self.words(self.source.randint(3, 40)) for _ in range(4)] + [self.words(20)]
            path = place / f"eval{number}.{self.source.choice(['jsonl', 'txt'])}"
            if path.suffix == ".txt":
                texts = [" ".join(texts)]
                path.write_text(texts[0])
            else:
                rows = [{self.field: texts[0], "note": self.words(30)}]
                rows += [{"question": a, "answers": [b]} for a, b in [texts[1:3], texts[3:5]]]
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            self.evals[str(path)] = texts
            named.append(str(path))
        return named

    def said(self, files: Iterable[str]) -> list[str]:
        """The evaluation texts in these files."""
        return [text for path in files for text in self.evals[path]]
