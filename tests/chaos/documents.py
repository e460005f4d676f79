"""Malformed documents and files through `sota prepare`, under a memory limit.

Nearly all are JSON lines, most with a known outcome, so that counts have to add up exactly. One in
25 is a file of its own: damaged, a bomb, a pipe, a name that no program expects.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import socket
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard
from pyarrow import parquet

from sota_transformer.data.tokenizer import EOT
from sota_transformer.errors import BAD_DATA, NO_INPUT
from tests.preparing import everything, jsonl, texts
from tests.test_data_hostile import seeds

from .commands import Finished, sota

CAP = ["bash", "-c", 'ulimit -v 4000000; exec "$0" "$@"']
SECONDS, FILES_SHARE, ALONE_SHARE = 1800.0, 25, 2500
KEPT, ANY = "", "*"  # outcomes other than a reason
_NOT_JSON, _NO_UTF8, _DEEP = "not a JSON line", "not valid UTF-8", "nested too deep"
_NO_TEXT, _SURROGATE = "field 'text' is not text", "lone surrogates, not valid Unicode"

Line = tuple[bytes, str, str]  # the line, its outcome, its text if kept


@dataclass
class Tried:
    """Counts, and a description of everything that went wrong."""

    documents: int = 0
    files: int = 0
    kept: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, good: bool, what: str) -> None:
        """Record and print a broken promise."""
        if not good:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)


def _good(text: str, **more: Any) -> Line:
    return json.dumps({"text": text, **more}).encode(), KEPT, text


def _cut(text: str, source: random.Random) -> Line:
    line = _good(text)[0]
    return line[: source.randrange(1, len(line))], _NOT_JSON, ""


def _flipped(text: str, source: random.Random) -> Line:
    line = bytearray(_good(text)[0])
    for _ in range(source.randint(1, 4)):
        line[source.randrange(len(line))] = source.choice([b for b in range(33, 256)])
    return bytes(line), ANY, ""


def _bytes(text: str, source: random.Random) -> Line:
    parts = [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x82", b"\xf5\x80\x80\x80", b"\x80"]
    return b'{"text": "%s%s"}' % (text.encode(), source.choice(parts)), _NO_UTF8, ""


def _typed(text: str, source: random.Random) -> Line:
    value = source.choice([text[:3].encode().hex(), None, True, 1.5, [text], {"text": text}])
    value = int(value, 16) if isinstance(value, str) else value
    return json.dumps({"text": value}).encode(), _NO_TEXT, ""


def _other(text: str, source: random.Random) -> Line:
    value = source.choice([[text], text, 12, None, False, [{"text": text}]])
    return json.dumps(value).encode(), "JSON, but not an object", ""


def _broken(text: str, source: random.Random) -> Line:
    plain = json.dumps(text)
    ways = ["{'text': %s}", '{"text": %s,}', '{"text": %s}{"text": "b"}', "text: %s", "\ufeff[%s]"]
    ways += ['{"text": %s, "a": \x01}', '{"text": %s "b": 1}', '{"a": "\\x41", "text": %s}']
    ways += ['{"text": %s, "a": "\x00"}', '{"text": %s, "a": 01}', '<doc text="%s">', "\\ %s"]
    return (source.choice(ways) % plain).encode(), _NOT_JSON, ""


def _numbers(text: str, source: random.Random) -> Line:
    digits = "9" * source.randint(400, 9000)
    number = source.choice([digits, f"-{digits}", "1e999", "-1e999", "NaN", "Infinity", "1e-999"])
    return f'{{"n": {number}, "text": {json.dumps(text)}}}'.encode(), KEPT, text


def _nested(text: str, source: random.Random) -> Line:
    depth = source.randint(4000, 40_000)
    opened = source.choice(["[", '{"a":', '[{"text":'])
    inner = source.choice(["", f'{{"text": "{text}", "a": '])
    return f"{inner}{opened * depth}".encode(), _DEEP, ""


def _strange(text: str, source: random.Random) -> Line:
    parts = ["<|endoftext|>", "\u202e", "\U0001f469\u200d\U0001f680", "\uffff", "\ufeff", "a\u0301"]
    parts += ["\U0010ffff", "\x7f\x1b[2J", "\r\n\r\n", "\ue000", "e\u0301" * 300, " " * 5000]
    mixed = f"{source.choice(parts)}{text}{source.choice(parts)}"
    return _good(mixed, id=[1, {}], text_="x")


KINDS: list[Callable[[str, random.Random], Line]] = [
    lambda text, _: _good(text),
    lambda text, _: (_good(text)[0] + b"\r", KEPT, text),
    lambda text, _: (b'{"text": 3, "text": %s}' % json.dumps(text).encode(), KEPT, text),
    lambda text, _: (_good(text.split()[0] + "\0")[0], "NUL bytes, probably not text", ""),
    lambda text, _: (b'{"text": "%s\\ud800"}' % text.encode(), _SURROGATE, ""),
    lambda text, _: (_good(" \n\t\u3000")[0], "empty document", ""),
    lambda text, _: (json.dumps({"Text": text}).encode(), "no field 'text'", ""),
    lambda *_: (_good("the same again")[0], "exact duplicate", ""),
    _cut, _flipped, _bytes, _typed, _other, _broken, _numbers, _nested, _strange,
]  # fmt: skip


def lines(folder: Path, count: int, source: random.Random, result: Tried) -> set[str]:
    """JSON lines in a few dozen files; returns the texts that have to be kept."""
    kept, fates, some = {"the same again"}, Counter[str](), texts(50, seed=1)
    for at in range(0, count, 2500):
        made = [_good("the same again")] if not at else [_good(f"first line of {at}")]
        while len(made) < min(2500, count - at):
            text = f"{at + len(made)} {source.choice(some).strip()}"
            made.append(source.choice(KINDS)(text.replace("日本", "x"), source))
        if at == 2500:
            made[1] = (b'{"text": "' + b"x" * (65 << 20) + b'"}', "line over 64 MiB", "")
            made[2] = (_good("y" * (17 << 20))[0], "document over 16 MiB", "")
        kept |= {text for _, fate, text in made if fate == KEPT}
        fates.update(fate for _, fate, _ in made)
        name, data = f"{at:06d}.jsonl", b"\n".join(line for line, _, _ in made) + b"\n\n \n"
        packers = {
            "": bytes,
            ".gz": gzip.compress,
            ".zst": zstandard.compress,
            ".xz": lzma.compress,
        }
        ending = source.choice(list(packers))
        (folder / (name + ending)).write_bytes(packers[ending](data))
    result.documents, result.rejects = count, fates
    return kept


def files(folder: Path, count: int, source: random.Random) -> None:
    """Damaged files of every kind, bombs, and entries that are not files."""
    (folder / "seeds").mkdir(parents=True)
    good = {path.name[1:]: path.read_bytes() for path in seeds(folder / "seeds")}
    for path in (folder / "seeds").iterdir():
        path.unlink()
    table, sink = pa.table({"text": texts(40), "n": list(range(40))}), io.BytesIO()
    parquet.write_table(table, sink, row_group_size=15)
    good[".parquet"] = sink.getvalue()
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=15)
    good[".arrow"] = sink.getvalue()
    good |= {".py": good[".txt"], ".html": b"<p>" + good[".txt"], ".tsv": good[".csv"]}
    for number in range(count):
        ending, data = source.choice(sorted(good)), b""
        data = bytearray(good[ending])
        match source.randrange(5):
            case 0:
                data = data[: source.randrange(len(data))]
            case 1:
                for _ in range(source.randint(1, 9)):
                    data[source.randrange(len(data))] ^= source.randint(1, 255)
            case 2:
                data[(at := source.randrange(len(data))) : at] = source.randbytes(99)
            case 3:
                data = bytearray(source.randbytes(source.randint(1, 5000)))
            case _:
                ending = source.choice(sorted(good))  # a name that contradicts the content
        below = folder / f"{number % 40:02d}"
        below.mkdir(exist_ok=True)
        (below / f"{number}{ending}").write_bytes(data)
    _traps(folder / "traps")


def _traps(folder: Path) -> None:
    """Bombs, strange names, links, pipes."""
    folder.mkdir()
    bomb = b"\n" * (1 << 30)
    for ending, pack in {"gz": gzip.compress, "zst": zstandard.compress}.items():
        (folder / f"bomb.txt.{ending}").write_bytes(pack(bomb))
        (folder / f"bomb.jsonl.{ending}").write_bytes(pack(pack(bomb[: 1 << 28])))
    (folder / "bomb.csv.bz2").write_bytes(bz2.compress(bomb))
    (folder / "bomb.md.xz").write_bytes(lzma.compress(bomb, preset=0))
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../out.txt", "/etc/x.txt", "a\nb.txt", "inner.zip", "x" * 300 + ".txt"):
            archive.writestr(name, bomb[: 1 << 20])
        archive.writestr("bomb.txt", bomb)
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    wide = zstandard.ZstdCompressor(compression_params=parameters).compress(os.urandom(1 << 20))
    (folder / "window.txt.zst").write_bytes(wide)
    for name in (b"a\nb.txt", b"\xff\xfe.txt", "\U0001f600.txt".encode(), b"n" * 250 + b".txt"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(b"text in a file with a strange name " + name)
    for name, target in {"loop": "loop", "up": "..", "passwd.txt": "/etc/passwd"}.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "folder.jsonl").mkdir()
    (folder / "empty.jsonl").touch()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "s.txt")[:100])


def _once(out: Path, manifest: dict[str, Any], result: Tried) -> None:
    """Id 50256 follows each document and occurs nowhere else."""
    for split in manifest["splits"].values():
        for name in split["shards"]:
            ids = np.load(out / name)
            ends = np.load(out / name.replace(".npy", ".ends.npy")).astype(np.int64)
            found = np.flatnonzero(ids == EOT) + 1
            result.check(np.array_equal(found, ends), f"{name}: 50256 not once per document")


def _prepare(root: Path, source: Path, out: Path, result: Tried) -> Finished:
    """Run the command under the limit; it must not crash, hang, or be unclear."""
    words = ["prepare", str(source), "--out", str(out), "--val-fraction", "0.1", "--workers", "2"]
    done = sota(words, root, SECONDS, CAP)
    result.check(not done.crashed, f"{source}: {done.output[-3000:]}")
    result.check(
        done.code in (0, BAD_DATA, NO_INPUT), f"{source}: {done.code} {done.output[-900:]}"
    )
    return done


def hostile(root: Path, count: int, seed: int = 0) -> Tried:
    """`count` documents and files; one in 2,500 of them is also prepared alone."""
    source, result = random.Random(seed), Tried()
    (root / "lines").mkdir()
    kept = lines(root / "lines", count - count // FILES_SHARE, source, result)
    result.files = count // FILES_SHARE
    files(root / "files", result.files, source)
    good = texts(200, seed=9)
    (root / "files" / "good.jsonl").write_bytes(jsonl(good))
    expected, result.rejects = result.rejects, Counter()
    for name, must in (("lines", kept), ("files", set(good))):
        done = _prepare(root, root / name, root / f"data-{name}", result)
        if done.code:
            result.check(False, done.output[-2000:])
            return result
        manifest = json.loads((root / f"data-{name}" / "manifest.json").read_text())
        _once(root / f"data-{name}", manifest, result)
        found = everything(root / f"data-{name}")
        result.check(must <= set(found), f"{name}: {len(must - set(found))} good ones are missing")
        refused = Counter({why: each["count"] for why, each in manifest["rejects"].items()})
        if name == "lines":
            total = len(found) + refused.total()
            result.check(total == result.documents, f"{total} of {result.documents} counted")
            short = {
                why: n for why, n in expected.items() if why not in (KEPT, ANY, "exact duplicate")
            }
            short = {why: n - refused[why] for why, n in short.items() if refused[why] < n}
            result.check(not short, f"counted too few: {short}")
        result.kept += len(found)
        result.rejects += refused
    singles = sorted(path for path in (root / "files").rglob("*") if path.is_file())
    for number, path in enumerate(source.sample(singles, min(len(singles), count // ALONE_SHARE))):
        _prepare(root, path, root / f"alone-{number}", result)
    result.check(not (root / "out.txt").exists(), "an archive member escaped")
    return result
