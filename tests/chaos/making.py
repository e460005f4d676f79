"""Random inputs of every kind that `sota prepare` reads, intact and damaged."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import random
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import zstandard
from pyarrow import feather, ipc, parquet

from . import pages

SMALL = 2000  # prose that even the smallest unit of work does not split
_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "text",
    "日本",
    "и",
    "über",
    "\U0001f600",
]
_ODD = ['"', '""', ",", "\t", "\n", "\r\n", "\r", "\u2028", "\x85", "\x0b", "\x1c", "\ufeff", "{}"]
_ODD += ["<|endoftext|>", "\\", "\\n", "'", ";", "é", " ", "\u3000", "\x7f", "[1]", "text"]


def words(source: random.Random, count: int = 12) -> str:
    """A text that is nearly always unique."""
    if source.random() < 0.04:
        return source.choice(["the same again", "twice\nthe same", "", " \n\t", "\u3000", "x\0y"])
    parts = [f"{source.getrandbits(48):x}", *source.choices(_WORDS, k=source.randint(1, count))]
    if source.random() < 0.4:
        parts.insert(source.randrange(len(parts) + 1), source.choice(_ODD))
    return source.choice(["", " ", ""]).join([source.choice(["", "", " ", "\n"]), " ".join(parts)])


def _count(source: random.Random) -> int:
    """How many records: mostly few, rarely more than a unit of work has."""
    return source.choices([0, 1, 4, 30, 300, 40_000], [2, 10, 40, 40, 8, 0.3])[0]


def _many(source: random.Random) -> list[str]:
    count = _count(source)
    if count <= 300:
        return [words(source) for _ in range(count)]
    some = [words(source) for _ in range(50)]
    return [f"{number} {source.choice(some)} {number * 7919}" for number in range(count)]


def lines(source: random.Random) -> bytes:
    """JSON lines, some of them malformed."""
    end = source.choice(["\n", "\n", "\n", "\r\n", "\n\n", " \r\n \n"])
    made = []
    for text in _many(source):
        line = json.dumps({"id": 1, "text": text}, ensure_ascii=source.random() < 0.5)
        if source.random() < 0.12:
            line = _other_line(source, text)
        made.append(line)
    data = end.join(made) + source.choice(["", end])
    return _coded(source, data)


def _other_line(source: random.Random, text: str) -> str:
    quoted = json.dumps(text)
    ways = [
        f'{{"text": 1, "text": {quoted}}}', f'{{"text": {quoted}, "text": null}}',
        f'{{"a": {{"text": "inner"}}, "b": [[[1]]], "text": {quoted}}}', f'{{"Text": {quoted}}}',
        f'{{"text": "{source.getrandbits(40)} \\ud83d\\ude00 whole"}}', '{"text": "\\ud800 alone"}',
        f'{{"text": {quoted}, "o": "\\udc00"}}', '{"a": {"text": "no"}}', f"[{quoted}]", quoted,
        "1", "null", '{"text": ["a"]}', f'{{"text": {quoted}', f'{{"text": {quoted}}}, ',
        f'{{"text": {quoted}, "n": NaN, "m": -Infinity, "l": 1e999}}',
        f'\ufeff{{"text": {quoted}}}',
        f'{{"text": {quoted}, "n": {"9" * 400}}}', f'{{"\\u0074ext": {quoted}}}', "\u00a0", "{}",
        f'{{"text": {quoted}}} {{"text": {quoted}}}', f'  {{ "text" :\t{quoted} }} ', "not json",
        f"{{'text': {quoted}}}", f'{{"text": {quoted},}}', '{"text": "a\tb"}', '{"text": "\\x"}',
    ]  # fmt: skip
    return source.choice(ways)


def _coded(source: random.Random, text: str) -> bytes:
    """UTF-8 or UTF-16, with or without a byte order mark; sometimes with bytes of neither."""
    way = source.random()
    if way < 0.08 and text:
        return text.encode("utf-16")
    if way < 0.12:
        return codecs.BOM_UTF16_BE + text.encode("utf-16-be")
    data = text.encode()
    if way < 0.2:
        data = codecs.BOM_UTF8 + data
    if way > 0.85 and len(data) < 1 << 20:
        data = flipped(source, data)
    return data


def flipped(source: random.Random, data: bytes, most: int = 4) -> bytes:
    """Some bytes changed."""
    changed = bytearray(data)
    for _ in range(source.randint(1, most) if data else 0):
        changed[source.randrange(len(data))] = source.choice(
            [0, 0x22, 0x80, 0xC3, 0xFF, 0x0A, 0x7B]
        )
    return bytes(changed)


def sheet(source: random.Random, separator: str) -> bytes:
    """A table of text, as written by programs and people."""
    heads = ["text", "id,text", "text,id", "a,text,b", "text,text", "Text,id", "TEXT,text", " text"]
    names = source.choice(heads).split(",")
    end = source.choice(["\n", "\n", "\r\n", "\r"])
    file, found = io.StringIO(), _many(source)
    how = source.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
    writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=how)
    writer.writerow(names)
    for text in found if "text" in names else found[:20]:
        row = [text if name.strip().lower() == "text" else "1" for name in names]
        if source.random() < 0.06:
            row = source.choice([row[:-1], [*row, "more"], [], [*row, words(source)]])
        writer.writerow(row)
        if source.random() < 0.05:
            by_hand = ['a "b" c', '"a"b', "", '""', '"x\ny"', "'q'", '"a""b"', '"', ' "a"', "\\"]
            file.write(
                separator.join(source.choice(by_hand) for _ in names)
                + source.choice([end, end, "\n"])
            )
    text = file.getvalue()
    text = text.rstrip("\r\n") if source.random() < 0.2 else text
    return _coded(source, source.choice(["", "", "", "", end]) + text)


def prose(source: random.Random) -> bytes:
    """A text file; a long one is valid, since damage would affect only one piece of it."""
    paragraphs = _many(source)
    if len(paragraphs) > 300 or source.random() < 0.1:
        size = source.choice([70, 200, 5000]) if len(paragraphs) > 300 else source.choice([20, 70])
        line = (f"{at} {source.getrandbits(60):x} " for at in range(size << 6))
        joint = source.choice(["\n", "\n\n", "\r\n", " ", "日\n\n"])
        return joint.join(line).replace("\0", "").encode()
    text = source.choice(["\n", "\n\n", " "]).join(paragraphs)
    data = text.encode()
    if len(data) > SMALL:
        return text.replace("\0", "").encode()
    return _coded(source, text)


TEXTS: dict[str, Callable[[random.Random], bytes]] = {
    "jsonl": lines,
    "ndjson": lines,
    "csv": lambda source: sheet(source, ","),
    "tsv": lambda source: sheet(source, "\t"),
    "txt": prose,
    "md": prose,
    "html": lambda source: pages.page(source, _many(source)[:300]),
    "htm": lambda source: pages.page(source, _many(source)[:300]),
    "py": lambda source: prose(source)[:60_000].decode(errors="ignore").encode(),
}


def text_file(source: random.Random) -> tuple[str, bytes]:
    """(ending, content) of a text file."""
    ending = source.choice(list(TEXTS))
    return ending, TEXTS[ending](source)


def pack(source: random.Random, codec: str, data: bytes) -> bytes:
    """In one or many streams, as written by various programs."""
    count = source.choice([1, 1, 1, 2, 3, 7])
    places = sorted(source.randrange(len(data) + 1) for _ in range(count - 1))
    made = b""
    for first, last in zip([0, *places], [*places, len(data)], strict=True):
        made += _stream(source, codec, data[first:last])
        if codec == "zst" and source.random() < 0.1:
            made += b"\x53\x2a\x4d\x18\x05\0\0\0frame"  # a skippable frame
    if codec in ("gz", "xz") and source.random() < 0.1:
        made += bytes(source.choice([4, 8, 512]))
    return made


def _stream(source: random.Random, codec: str, data: bytes) -> bytes:
    if codec == "gz":
        return gzip.compress(data, source.choice([0, 1, 9]))
    if codec == "bz2":
        return bz2.compress(data, source.choice([1, 9]))
    if codec == "xz":
        check = source.choice([lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_NONE])
        return lzma.compress(data, check=check, preset=1)
    options = {"write_checksum": source.random() < 0.5, "write_content_size": source.random() < 0.5}
    packer = zstandard.ZstdCompressor(level=source.choice([-7, 1, 9]), **options).compressobj()
    made = b""
    for first in range(0, len(data), step := source.choice([1 << 20, 1 + len(data) // 3])):
        made += packer.compress(data[first : first + step])
        if source.random() < 0.5:
            made += packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return made + packer.flush()


def _member(source: random.Random) -> tuple[str, bytes]:
    """(name, content) of an archive member."""
    ending, data = text_file(source)
    data = data[:300_000] if ending not in ("txt", "md") and len(data) > 300_000 else data
    stem = source.choice(
        ["a", "über", "d/e", "./f", "x" * 120, "d/" * 60 + "z", "日本" * 40, "o p"]
    )
    name = f"{stem}{source.getrandbits(16)}.{ending}"
    way = source.random()
    if way < 0.12:
        codec = source.choice(["gz", "bz2", "xz", "zst"])
        return f"{name}.{codec}", pack(source, codec, data)
    if way < 0.2:
        return (
            f"{stem}.{source.choice(['bin', 'png', 'zip', 'parquet', 'feather', 'tar.gz'])}",
            data,
        )
    if way < 0.25:
        return source.choice([f".{stem}.txt", ".git/a.txt", "__MACOSX/._a.txt", "README"]), data
    return name, b"" if way < 0.3 else data


def tar(source: random.Random) -> bytes:
    """A tar archive in one of the three formats; members, and entries that are not files."""
    file = io.BytesIO()
    form = source.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for _ in range(source.choice([0, 1, 3, 3, 8])):
            name, data = _member(source)
            info, way = tarfile.TarInfo(name), source.random()
            info.size, info.mtime = len(data), source.choice([0, 1.5, 9**11])
            if form != tarfile.GNU_FORMAT:
                info.mtime = int(info.mtime) % 8**11
            if form == tarfile.USTAR_FORMAT and len(name.encode()) > 90:
                info.name = name[-15:].lstrip("/")
            if form == tarfile.PAX_FORMAT and way < 0.2:
                info.pax_headers = {"comment": "é" * 300, "SCHILY.xattr.user.a": "b"}
            if way > 0.85:
                kinds = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
                info.type, info.size = source.choice([*kinds, tarfile.CHRTYPE]), 0
                info.linkname = "a.txt"
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return file.getvalue()


def sparse_tar(source: random.Random, folder: Path) -> bytes:
    """A sparse file archived by GNU tar; holes read as zeros."""
    (folder / "parts").mkdir()
    with (folder / "parts/holes.jsonl").open("wb") as file:
        for at in (0, 1 << 16, 1 << 18):
            file.seek(at)
            file.write(b"\n%b\n" % lines(source)[:4000])
    (folder / "parts/a.jsonl").write_bytes(lines(source)[:100_000])
    (folder / "parts/b.jsonl").write_bytes(lines(source)[:100_000])
    form = source.choice(["gnu", "posix", "oldgnu"])
    command = ["tar", "-C", folder / "parts", "--sort=name", f"--format={form}", "-S", "-cf", "-"]
    return subprocess.run([*command, "."], stdout=subprocess.PIPE, check=True).stdout


def zipped(source: random.Random) -> bytes:
    """A zip archive, as written by various programs."""
    file: io.BytesIO = io.BytesIO() if source.random() < 0.7 else _Pipe()
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    with zipfile.ZipFile(file, "w") as archive:
        for _ in range(source.choice([0, 1, 3, 3, 8])):
            name, data = _member(source)
            info = zipfile.ZipInfo(name + "/" * (source.random() < 0.05))
            info.compress_type = source.choice(methods)
            if info.is_dir():
                data = b""
            elif source.random() < 0.05:
                info.external_attr, data = (stat.S_IFLNK | 0o777) << 16, b"a.txt"
            if source.random() < 0.3:
                info.extra, info.comment = b"UT\5\0\3abcd", b"a comment"
            with archive.open(info, "w", force_zip64=source.random() < 0.3) as raw:
                raw.write(data)
        archive.comment = source.choice([b"", b"PK\5\6", b"c" * 999])
    data = file.getvalue()
    if source.random() < 0.1:
        data = b"#!/bin/sh\n" * source.randint(1, 99) + data  # self-extracting
    return data


class _Pipe(io.BytesIO):
    """Unseekable, so that zipfile writes data descriptors."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


def column(source: random.Random, texts: list[str]) -> pa.Array:
    """Texts in one of the types that hold text, or in one that does not."""
    some = [None if source.random() < 0.05 else text for text in texts]
    data = [None if text is None else text.encode() for text in some]
    if data and source.random() < 0.3:
        data = [
            flipped(source, each, 1) if each and source.random() < 0.1 else each for each in data
        ]
    ways: list[Callable[[], pa.Array]] = [
        lambda: pa.array(some, pa.string()), lambda: pa.array(some, pa.large_string()),
        lambda: pa.array(some, pa.string_view()), lambda: pa.array(data, pa.binary()),
        lambda: pa.array(data, pa.large_binary()), lambda: pa.array(data, pa.binary_view()),
        lambda: pa.array(data, pa.binary()).view(pa.string()),
        lambda: pa.array(data, pa.large_binary()).view(pa.large_string()),
        lambda: pa.array(some, pa.string()).dictionary_encode(),
        lambda: pa.DictionaryArray.from_arrays(
            pa.array([None if at % 9 == 8 else at for at in range(len(data))], pa.int32()),
            pa.array([each or b"" for each in data], pa.binary()).view(pa.string())),
        lambda: pa.array([{"text": text} for text in some], pa.struct([("text", pa.string())])),
        lambda: pa.array([[text] for text in some], pa.list_(pa.string())),
        lambda: pa.array(range(len(some)), pa.int64()),
        lambda: pa.nulls(len(some)),
    ]  # fmt: skip
    return source.choices(ways, [3, 3, 2, 2, 1, 1, 2, 2, 2, 1, 0.5, 0.5, 0.5, 0.5])[0]()


def table(source: random.Random, path: Path) -> None:
    """A parquet or Arrow file with other columns, in row groups of any size."""
    texts = [*_many(source), words(source)]
    texts = texts[:-1] if source.random() < 0.9 else []
    columns = {"text": column(source, texts), "id": pa.array(range(len(texts)))}
    if source.random() < 0.2:
        columns = {"text.x": pa.array(["no"] * len(texts)), **columns}
    if source.random() < 0.1:
        columns["Text"] = columns.pop("text")
    made = pa.table(columns)
    rows = source.choice([1, 3, 10, 64, 5000])
    if path.suffix == ".parquet":
        if pa.types.is_dictionary(made.column(0).type) or pa.types.is_null(made.column(0).type):
            rows = max(rows, 64)
        how = {
            "use_dictionary": source.random() < 0.5,
            "data_page_size": source.choice([64, 1 << 20]),
        }
        how["compression"] = source.choice(["none", "snappy", "zstd", "gzip"])
        if source.random() < 0.2:
            with parquet.ParquetWriter(path, made.schema, **how) as file:
                for first in range(0, len(texts) + 1, rows * 3):
                    file.write_table(made.slice(first, rows * 3), row_group_size=rows)
                    file.write_table(made.slice(0, 0))
            return
        parquet.write_table(made, path, row_group_size=rows, **how)
    elif path.suffix == ".feather":
        feather.write_feather(made, str(path), source.choice(["lz4", "zstd", "uncompressed"]))
    else:
        begin = source.choice([ipc.new_file, ipc.new_stream])
        codec = ipc.IpcWriteOptions(compression=source.choice([None, "lz4", "zstd"]))
        with begin(str(path), made.schema, options=codec) as file:
            for batch in made.combine_chunks().to_batches(max_chunksize=rows):
                file.write_batch(batch)
                if source.random() < 0.1:
                    file.write_batch(batch.slice(0, 0))


def folder(source: random.Random, path: Path) -> None:
    """Files, folders, links to both, and hidden entries."""
    path.mkdir()
    for number in range(source.choice([1, 3, 6])):
        ending, data = text_file(source)
        name = source.choice(["a", ".b", "c d", "é", "X"]) + f"{number}.{ending}"
        if source.random() < 0.2:
            codec = source.choice(["gz", "zst"])
            name, data = f"{name}.{codec}", pack(source, codec, data)
        (path / name).write_bytes(b"" if source.random() < 0.05 else data)
        way, other = source.random(), path / f"again{number}{name[name.index('.', 1) :]}"
        if way < 0.15 and ending not in ("txt", "md"):
            other.symlink_to(name)
        elif way < 0.25 and ending not in ("txt", "md"):
            os.link(path / name, other)
        elif way < 0.32:
            (path / "dead.txt").unlink(missing_ok=True)
            (path / "dead.txt").symlink_to("/nowhere")
        elif way < 0.4:
            (path / f"noise{number}").write_bytes(b"x")
            (path / f"noise{number}.bin").write_bytes(b"x")
    if source.random() < 0.3:
        folder(source, path / source.choice(["sub", ".hidden", "n.jsonl"]))
        (path / "linked").symlink_to("sub")
