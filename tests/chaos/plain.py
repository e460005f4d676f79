"""What plain readers find in an input: the standard library, zstandard and plain pyarrow calls.

Uses no code of the program and ignores speed. Problems are named in the program's words.
"""

import codecs
import csv
import io
import json
import re
import stat
import tarfile
import zipfile
import zlib
from bz2 import BZ2Decompressor
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from lzma import FORMAT_XZ, LZMADecompressor, LZMAError
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard
from pyarrow import ipc, parquet

from . import pages

KINDS = {
    "txt": "text", "md": "text", "py": "code", "jsonl": "jsonl", "ndjson": "jsonl", "csv": "csv",
    "tsv": "tsv", "parquet": "table", "arrow": "table", "feather": "table", "tar": "tar",
    "zip": "zip", "html": "html", "htm": "html",
}  # fmt: skip
CODECS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(31),
    "bz2": BZ2Decompressor,
    "xz": lambda: LZMADecompressor(FORMAT_XZ),
    "zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
NOTHING, EMPTY, DAMAGED = "no document inside", "empty file", "damaged"
LINK = "link or device inside an archive"
BROKEN, NUL = "not valid UTF-8", "NUL bytes, probably not text"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BLANK = (*UTF16, b"")
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)


@dataclass
class Plain:
    """The contents of an input."""

    documents: list[str] = field(default_factory=list)
    """Each has to come out."""
    texts: list[tuple[str, str]] = field(default_factory=list)
    """Prose, which may come out in pieces: the part that has to, and the most that may."""
    perhaps: list[str] = field(default_factory=list)
    """What may come out of a damaged file."""
    losses: Counter[str] = field(default_factory=Counter)
    blind: bool = False
    """Whether there may be more than a plain reader finds."""
    loose: bool = False
    """Whether damage costs more than a plain reader can count."""

    def add(self, other: "Plain") -> None:
        """Add the contents of another input."""
        self.documents += other.documents
        self.texts += other.texts
        self.perhaps += other.perhaps
        self.losses += other.losses
        self.loose |= other.loose
        self.blind |= other.blind

    def lose(self, reason: str, *, loose: bool = False) -> "Plain":
        """Count one more item that is skipped."""
        self.losses[reason] += 1
        self.loose |= loose
        return self

    def judge(self, text: str | bytes, *, prose: bool = False) -> None:
        """Keep a text, or count why not."""
        try:
            text = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError:
            self.lose(BROKEN)
            return
        if not text.strip():
            self.lose("empty document")
        elif any("\ud800" <= letter <= "\udfff" for letter in text):
            self.lose("lone surrogates, not valid Unicode")
        elif "\0" in text:
            self.lose(NUL)
        elif prose:
            self.texts.append((text, text))
        else:
            self.documents.append(text)


def split_name(name: str) -> tuple[str, str]:
    """(codec, kind) of a name; "" for none."""
    parts = name.lower().replace(".tgz", ".tar.gz").split("/")[-1].split(".")
    codec = parts.pop() if parts[-1] in CODECS else ""
    return codec, KINDS.get(parts[-1], "") if len(parts) > 1 else ""


def read(path: Path) -> Plain:
    """A file given by name, or a folder."""
    if path.is_dir():
        return folder(path, path.resolve())
    data, (codec, kind) = path.read_bytes(), split_name(path.name)
    if not data:
        return Plain().lose(EMPTY)
    if kind == "table":
        return table(path)
    if kind == "zip":
        return zipped(path)
    return packed(data, codec, kind)


def folder(path: Path, root: Path) -> Plain:
    """All files below a folder, without following links out of it or to folders."""
    plain = Plain()
    for entry in path.iterdir():
        real = entry.resolve()
        if entry.name.startswith("."):
            plain.lose("hidden")
        elif entry.is_symlink() and not (real.exists() and real.is_relative_to(root)):
            plain.lose("broken link, or a link out of the folder")
        elif entry.is_dir():
            plain.add(
                Plain().lose("link to a folder") if entry.is_symlink() else folder(entry, root)
            )
        elif not split_name(entry.name)[1]:
            ending = f"{entry.suffix} file" if entry.suffix else "file without an extension"
            plain.lose(f"{ending} is not a text format")
        else:
            plain.add(read(entry))
    return plain


def unpack(data: bytes, codec: str, step: int = 1 << 13) -> tuple[bytes, bytes, bool]:
    """(what is certain, everything readable, whether the stream is damaged).

    If a stream is truncated, everything readable is certain; if it is damaged, only the complete
    streams before the damage.
    """
    if not codec:
        return data, data, False
    begin, whole, found, at = CODECS[codec], 0, bytearray(), 0
    while at < len(data):
        if codec == "zst" and int.from_bytes(data[at : at + 4], "little") in _SKIPPABLE:
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if not data[at] and codec != "zst":  # padding
            at += 1
            continue
        stream = begin()
        try:
            while not stream.eof and at < len(data):
                found += stream.decompress(data[at : at + step])
                at += step
        except (zlib.error, OSError, LZMAError, EOFError, zstandard.ZstdError):
            if step > 1:
                return unpack(data, codec, 1)
            return bytes(found[:whole]), bytes(found), True
        if not stream.eof:
            return bytes(found), bytes(found), True
        at = min(at, len(data)) - len(stream.unused_data)
        whole = len(found)
    return bytes(found), bytes(found), at > len(data)


def packed(data: bytes, codec: str, kind: str) -> Plain:
    """A file that may be compressed; without a kind, its start decides."""
    certain, found, damaged = unpack(data, codec)
    if kind == "tar":
        plain, more = tar(certain, damaged), tar(found, damaged)
        if certain != found:
            plain.perhaps += more.documents + more.perhaps
            plain.texts += [("", most) for _, most in more.texts]
        return plain
    kind = kind or ("jsonl" if re.match(rb"[\s\0]*(\[[\s\0]*)?\{", decoded(found)) else "text")
    if not damaged:
        return Plain().lose(EMPTY) if found in BLANK and codec else content(found, kind)
    return started(certain, found, kind).lose(DAMAGED, loose=True)


def started(certain: bytes, found: bytes, kind: str) -> Plain:
    """What precedes damage: complete records have to come out, a partial one may."""
    if kind == "html":  # a parser accepts any part of a page
        return Plain(blind=True, loose=True)
    if found.startswith(UTF16):
        found = found[: len(found) & ~1]
    least, most = content(certain[: len(found)], kind), content(found, kind)
    if kind in ("text", "code"):
        must = least.texts[0][0] if least.texts and most.texts and most.texts[0][0] else ""
        may = most.texts[0][1] if most.texts else decoded(found).decode(errors="ignore")
        return Plain(texts=[(must, may)], loose=True)
    known = least.documents if certain.endswith(b"\n") else least.documents[:-1]
    return Plain(documents=known, perhaps=most.documents, loose=True)


def decoded(data: bytes) -> bytes:
    """UTF-8 without a byte order mark; invalid bytes stay."""
    if data.startswith(UTF16):
        data = data.decode("utf-16", "one-bad-byte").encode("utf-8", "surrogateescape")
    return data.removeprefix(codecs.BOM_UTF8)


codecs.register_error("one-bad-byte", lambda error: ("\udcff", error.end))


def content(data: bytes, kind: str) -> Plain:
    """All documents in a text of some kind."""
    data, plain = decoded(data), Plain()
    if kind == "jsonl":
        for line in data.split(b"\n"):
            if line.strip():
                record(plain, line)
    elif kind in ("csv", "tsv"):
        rows(plain, data, "," if kind == "csv" else "\t", kind)
    elif kind == "html" and b"\0" not in data:
        plain.judge(pages.text_of(data))
    else:
        plain.judge(data, prose=True) if b"\0" not in data else plain.lose(NUL)
        if plain.losses.keys() & {NUL, BROKEN}:  # valid pieces of a long text may come out
            plain.texts = [("", data.decode(errors="replace"))] * (kind == "text")
    return plain if plain.documents or plain.texts or plain.losses else plain.lose(NOTHING)


def record(plain: Plain, line: bytes) -> None:
    """A JSON line."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        plain.lose(BROKEN)
        return
    except ValueError:
        plain.lose("not a JSON line")
        return
    if not isinstance(value, dict):
        plain.lose("JSON, but not an object")
    elif "text" not in value:
        plain.lose("no field 'text'")
    elif not isinstance(value["text"], str):
        plain.lose("field 'text' is not text")
    else:
        plain.judge(value["text"])


def rows(plain: Plain, data: bytes, delimiter: str, kind: str) -> None:
    """Rows of a text table, as the standard library reads them."""
    text = data.decode("utf-8", "surrogateescape")
    csv.field_size_limit(1 << 30)
    found = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    behind = csv.reader(io.StringIO(f"{text}\nbehind", newline=""), delimiter=delimiter)
    if list(behind)[-1] != ["behind"] and any(found.pop()):  # an open quote
        plain.lose("quote that is never closed, and everything after it")
    if not found:
        return
    if "text" not in found[0]:
        plain.losses = Counter(["no column 'text'"])
        return
    column = found[0].index("text")
    for row in found[1:]:
        if column < len(row):
            plain.judge(row[column].encode("utf-8", "surrogateescape"))
        elif row:
            plain.lose("row without the text column")


def tar(data: bytes, damaged: bool) -> Plain:
    """Members of a tar archive; one not closed properly counts as damaged."""
    plain, members, end = Plain(), 0, len(data)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            while info := archive.next():
                if not info.isdir():
                    members += 1
                    plain.add(_tar_member(archive, info, data))
            end = archive.offset
    except (tarfile.TarError, ValueError):
        pass
    if damaged or end >= len(data) or data[end:].strip(b"\0"):
        return plain.lose(DAMAGED, loose=True)
    return plain if members else plain.lose(NOTHING)


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo, data: bytes) -> Plain:
    """A complete member, or what is left of it."""
    file = archive.extractfile(info) if info.isreg() else None
    try:
        return member(info.name, file and file.read())
    except tarfile.ReadError:
        codec, kind = split_name(info.name)
        return started(b"", unpack(data[info.offset_data :], codec)[1], kind)


def member(name: str, body: bytes | None) -> Plain:
    """A member of an archive; links and devices have no body."""
    codec, kind = split_name(name)
    if body is None:
        return Plain().lose(LINK)
    if any(part.startswith(".") and part not in (".", "..") for part in re.split(r"[\\/]", name)):
        return Plain().lose("hidden")
    if kind in ("zip", "tar"):
        return Plain().lose("archive inside an archive")
    if kind == "table":
        return Plain().lose(f"{name.split('.')[-1].replace('feather', 'arrow')} inside an archive")
    if not kind:
        return Plain().lose("not a text format inside an archive")
    return packed(body, codec, kind) if body not in BLANK else Plain().lose(EMPTY)


def zipped(path: Path) -> Plain:
    """Members of a zip archive."""
    plain = Plain()
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if stat.S_ISLNK(info.external_attr >> 16):
                    plain.lose(LINK)
                    continue
                if member(info.filename, b"{}").losses.keys() & ODD:
                    plain.add(member(info.filename, b"{}"))
                    continue
                plain.add(_zip_member(archive, info))
            if all(info.is_dir() for info in archive.infolist()):
                plain.lose(NOTHING)
    except UnicodeDecodeError:  # in a name; the program reads those
        return Plain(blind=True, loose=True)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        plain.lose(DAMAGED, loose=True).blind = True
    return plain


ODD = {"hidden", "archive inside an archive", "not a text format inside an archive"}
ODD |= {f"{ending} inside an archive" for ending in ("parquet", "arrow")}


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Plain:
    """A readable member, or what is left of it."""
    try:
        return member(info.filename, archive.read(info))
    except (NotImplementedError, RuntimeError):
        return Plain().lose(DAMAGED)  # unknown method or encrypted: nothing was read
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error, LZMAError):
        found, (codec, kind) = b"", split_name(info.filename)
        try:
            with archive.open(info) as file:
                vars(file)["_expected_crc"] = None
                while data := file.read(1):
                    found += data
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, zlib.error, LZMAError):
            pass
        return started(b"", unpack(found, codec)[1], kind).lose(DAMAGED, loose=True)


def _columns(path: Path) -> Iterator[pa.Array]:
    """The first column `text` of each batch, to keep those before a damaged one."""
    if path.suffix == ".parquet":
        file = parquet.ParquetFile(path)
        file.schema_arrow.names.index("text")
        for number in range(file.num_row_groups):
            for batch in file.read_row_group(number, ["text"], use_threads=False).to_batches():
                yield batch.column(batch.schema.get_all_field_indices("text")[0])
    else:
        data = path.read_bytes()
        how = ipc.open_file if data.startswith(b"ARROW1") else ipc.open_stream
        with how(pa.BufferReader(data)) as reader:
            names = reader.schema.names
            count = getattr(reader, "num_record_batches", None)
            for batch in map(reader.get_batch, range(count)) if count is not None else reader:
                yield batch.column(names.index("text"))


def table(path: Path) -> Plain:
    """Cells of a table."""
    plain = Plain()
    try:
        for cells in _columns(path):
            cells = cells.dictionary_decode() if isinstance(cells, pa.DictionaryArray) else cells
            cells = cells.view(TEXT.get(cells.type, cells.type))
            cells.validate(full=True)
            for value in cells.to_pylist():
                if isinstance(value, bytes | str):
                    plain.judge(value)
                else:
                    plain.lose(f"field 'text' is {'empty' if value is None else 'not text'}")
    except (OSError, ValueError, pa.ArrowException) as error:
        if str(error) == "'text' is not in list":
            return plain.lose("no column 'text'")
        damaged = Plain(plain.documents[:-ROWS], perhaps=plain.documents, blind=True)
        return damaged.lose(DAMAGED, loose=True)
    return plain if plain.documents or plain.losses else plain.lose(NOTHING)


ROWS = 32  # read at a time: damage also loses the rows before it
TEXT = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
TEXT |= {pa.string_view(): pa.binary_view()}
