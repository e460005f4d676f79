"""The documents of a segment: parsing, decoding, and the rules for unusable text.

A reader yields either the UTF-8 bytes of a document or a `Skipped` with the reason. Prose files
over CUT_BYTES become several documents, cut at blank lines about PIECE_BYTES apart, so that a
single book contributes to both splits; smaller files, and all code, stay whole. In prose, a line
that consists of `<|endoftext|>` separates two documents, as in published collections.
"""

import codecs
import csv
import errno
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sota_transformer.data.sources import TABLES, Skipped
from sota_transformer.data.streams import NOTHING, UTF16, recoded
from sota_transformer.data.tables import Tables, having
from sota_transformer.data.tokenizer import utf8
from sota_transformer.data.units import Segment

DOCUMENT_BYTES = 16 << 20
LINE_BYTES = 64 << 20
CUT_BYTES, PIECE_BYTES = 64 << 10, 8 << 10
BINARY = "NUL bytes, probably not text"
_ESCAPES = "ISO-2022 escapes, not Unicode"  # Japanese mail and old pages; ASCII by every byte
_AT_ONCE, _BLOCK = 8 << 20, 1 << 20
_DEEP_PAGE = 5000
_END = "\0sota: the end of the table\0"  # if a quote is still open, it becomes part of a cell
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_DIVIDER = b"<|endoftext|>"
_DIVIDING_LINE = re.compile(rb"^%b[ \t\r]*(?:\n[\r\n]*|\Z)" % re.escape(_DIVIDER), re.MULTILINE)
_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)\s[^>]{,200}?(?:charset|encoding)\s*=\s*["']?([\w.:-]{1,40})""", re.I
)
_WIDER = {"shift_jis": "cp932", "gbk": "gb18030", "euc_kr": "cp949", "big5": "big5hkscs"}
# Python rejects integers with thousands of digits; their value does not matter here.
_LENIENT = json.JSONDecoder(parse_int=lambda _: 0)

Document = bytes | Skipped


def documents(segment: Segment, field: str, tables: Tables) -> Iterator[Document]:
    """Documents of a segment in order; `field` names the text in records and tables."""
    found: Iterator[Document]
    if segment.kind == "jsonl":
        found = _records(segment, field)
    elif segment.kind in TABLES:
        found = _cells(segment, field, tables)
    elif segment.kind in ("csv", "tsv"):
        found = _csv(segment, field)
    else:
        found = _text(segment)
    if segment.whole:  # a piece may be empty because other pieces hold all the documents
        found = chain([next(found, Skipped(NOTHING, segment.name))], found)
    return found


def as_document(text: str, where: str, data: bytes | None = None) -> Document:
    """The text as a document, or the reason to skip it; `data` is its UTF-8, if available."""
    if not text or text.isspace():
        return Skipped("empty document", where)
    try:
        data = text.encode() if data is None else data
    except UnicodeEncodeError:
        mended = as_document(utf8(text).decode(), where)
        return _repaired("lone surrogates, not valid Unicode", where, mended)
    if len(data) > DOCUMENT_BYTES:
        return Skipped(f"document over {DOCUMENT_BYTES >> 20} MiB", where)
    if b"\0" in data:
        return Skipped(BINARY, where)
    if b"\x1b" in data and b"\x1b$" in data:  # a search for one byte takes a tenth of the time
        return Skipped(_ESCAPES, where)
    return data


def _repaired(reason: str, where: str, document: Document) -> Skipped:
    """Skipped for its encoding, along with the repaired document for --bad-text replace."""
    return Skipped(reason, where, b"" if isinstance(document, Skipped) else document)


def _text(segment: Segment) -> Iterator[Document]:
    """The documents of a prose, code or HTML file: one, or the pieces of a long text."""
    if segment.kind != "text" and segment.stop > DOCUMENT_BYTES:
        yield Skipped(f"document over {DOCUMENT_BYTES >> 20} MiB", segment.name)
        return
    data = _read(segment)
    if segment.start == 0:
        data = without_mark(data)
    if b"\0" in data:
        yield Skipped(BINARY, segment.name)
    elif segment.kind == "html":
        yield _html(data, segment.name)
    elif segment.kind == "code":
        yield _decoded(data, segment.name)
    else:
        texts = separate(data)
        for first, last in texts:
            short = last - first <= CUT_BYTES and (segment.whole or len(texts) > 1)
            for start, stop in [(0, last - first)] if short else _pieces(data[first:last]):
                where = f"{segment.name}: byte {segment.start + first + start}"
                alone = short and len(texts) == 1
                yield _decoded(data[first + start : first + stop], segment.name if alone else where)


def separate(data: bytes) -> list[tuple[int, int]]:
    """(start, stop) of the texts between `<|endoftext|>` lines; without one, all of `data`."""
    # There is rarely one, and searching for the word is much faster than matching the line.
    lines = [m.span() for m in _DIVIDING_LINE.finditer(data)] if _DIVIDER in data else []
    if not lines:
        return [(0, len(data))]
    starts, stops = (0, *(stop for _, stop in lines)), (*(start for start, _ in lines), len(data))
    kept = ((a, a + len(data[a:b].rstrip(b"\r\n"))) for a, b in zip(starts, stops, strict=True))
    return [(start, stop) for start, stop in kept if start < stop]


def _html(data: bytes, where: str) -> Document:
    """The main text of the page, without menus and scripts where they can be recognized."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
    except ImportError:
        return Skipped("HTML needs `pip install 'sota-transformer[html]'`", where)
    document = _decoded(data, where)
    if isinstance(document, Skipped) and (text := _declared(data)):
        document = as_document(text, where)
    whole = document.repaired if isinstance(document, Skipped) else document
    page = HTMLTree.parse(whole.decode())
    deep = whole.count(b"<") >= _DEEP_PAGE and _deep(page)
    text = "" if deep else extract_plain_text(page, main_content=True)
    text = text or extract_plain_text(page)
    if isinstance(document, Skipped):
        return _repaired(document.reason, where, as_document(text, where))
    return as_document(text, where)


def _declared(data: bytes) -> str:
    """A page that is not UTF-8, by the encoding that it declares for itself; or ""."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    declared = _CHARSET.search(data, 0, 1024)  # browsers look no further
    name = map_encoding_to_html5(declared[1].decode(), fallback_utf8=False) if declared else None
    if not name or name.startswith("utf"):
        return ""
    try:  # what browsers read under these names is more than Python does
        return data.decode(_WIDER.get(name, name))
    except (UnicodeDecodeError, LookupError):
        return ""


def _deep(page: Any) -> bool:
    """Whether elements are nested so deeply that finding the main content, which is quadratic in
    the depth, would be slow: 12 s at 20,000. Only a program writes such a page.
    """
    from resiliparse.parse.html import traverse_dom

    deepest = 0

    def visit(place: Any) -> None:
        nonlocal deepest
        deepest = max(deepest, place.depth)

    # In the parser's output every element is closed except the void ones, and nothing else is.
    codes = np.frombuffer(page.document.html.encode(), np.uint8)
    follows = codes[np.flatnonzero(codes[:-1] == ord("<")) + 1]
    open_tags = np.cumsum(np.where(follows == ord("/"), -1, 1))
    if len(open_tags) and np.ptp(open_tags) >= _DEEP_PAGE:  # rules most pages out: visits are slow
        traverse_dom(page.document, visit)
    return deepest >= _DEEP_PAGE


def _decoded(data: bytes, where: str) -> Document:
    """Bytes of text as a document, or the reason to skip them."""
    try:
        return as_document(data.decode(), where, data)
    except UnicodeDecodeError:
        return _repaired(
            "not valid UTF-8", where, as_document(data.decode(errors="replace"), where)
        )


def without_mark(data: bytes) -> bytes:
    """The start of a text as UTF-8 without a byte order mark; UTF-16 must be the whole text."""
    if data.startswith(UTF16):
        data = b"".join(recoded(iter([data])))
    return data.removeprefix(codecs.BOM_UTF8)


def _pieces(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces of a long text; depends on the text alone."""
    start = 0
    while len(data) - start > 2 * PIECE_BYTES:
        earliest, latest = start + PIECE_BYTES, start + 4 * PIECE_BYTES
        if blank := _BLANK_LINE.search(data, earliest, latest):
            stop = blank.end()
        elif (line := data.find(b"\n", earliest, latest)) >= 0:
            stop = line + 1
        elif (space := data.find(b" ", earliest, latest)) >= 0:
            stop = space
        else:
            stop = min(latest, len(data))
            while stop < len(data) and data[stop] & 0xC0 == 0x80:
                stop += 1
        yield start, stop
        start = stop
    if start < len(data):
        yield start, len(data)


def _read(segment: Segment) -> bytes:
    """All bytes of the segment."""
    with Path(segment.path).open("rb") as file:
        file.seek(segment.offset)
        size = segment.stop - segment.start
        data = file.read(size)
        if len(data) < size:
            raise _truncated()
        return data


def _truncated() -> OSError:
    """The error for a file that has become shorter since it was cut into segments."""
    return OSError(errno.EIO, "truncated while being read")


def _blocks(segment: Segment) -> Iterator[tuple[int, bytes | None]]:
    """(position, whole lines); None instead of a line over LINE_BYTES."""
    if segment.stop - segment.start <= _AT_ONCE:
        yield segment.start, _read(segment)
        return
    with Path(segment.path).open("rb", buffering=_BLOCK) as file:
        file.seek(segment.offset)
        position = segment.start
        while position < segment.stop:
            line = file.readline(min(LINE_BYTES + 1, segment.stop - position))
            end, over = position + len(line), len(line) > LINE_BYTES and not line.endswith(b"\n")
            while end < segment.stop and not line.endswith(b"\n"):  # skip the rest of a long line
                if not (line := file.readline(min(_BLOCK, segment.stop - end))):
                    raise _truncated()
                end += len(line)
            yield position, None if over else line
            position = end


def _records(segment: Segment, field: str) -> Iterator[Document]:
    """Text fields of JSON lines. `json` accepts everything that the stricter orjson accepts."""
    for position, block in _blocks(segment):
        if block is None:
            yield Skipped(f"line over {LINE_BYTES >> 20} MiB", f"{segment.name}: byte {position}")
            continue
        if position == 0:
            block = without_mark(block)
        view, at, size = memoryview(block), 0, len(block)
        while at < size:
            end = block.find(b"\n", at)
            end = size if end < 0 else end
            start, at = at, end + 1
            try:
                text = orjson.loads(view[start:end])[field]
                if type(text) is str:
                    document = as_document(text, "")
                    if type(document) is bytes:
                        yield document
                        continue
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                pass
            if (line := block[start:end]) and not line.isspace():
                yield _slow_record(line, field, f"{segment.name}: byte {start + position}")


def _slow_record(line: bytes, field: str, where: str) -> Document:
    """A line that the fast path did not accept: its document after all, or the reason."""
    try:
        value = _LENIENT.decode(line.decode())
    except UnicodeDecodeError:
        document = _slow_record(line.decode(errors="replace").encode(), field, where)
        return _repaired("not valid UTF-8", where, document)
    except RecursionError:
        return Skipped("nested too deep", where)
    except ValueError:
        return Skipped("not a JSON line", where)
    if not isinstance(value, dict):
        return Skipped("JSON, but not an object", where)
    if field not in value:
        return Skipped(f"no field {field!r}", having(where, value))
    if not isinstance(value[field], str):
        return Skipped(f"field {field!r} is not text", where)
    return as_document(value[field], where)


def _cells(segment: Segment, field: str, tables: Tables) -> Iterator[Document]:
    """Text column of a parquet or Arrow file."""
    for item in tables.rows(segment, field):
        if isinstance(item, Skipped):
            yield item
            continue
        row, value = item
        where = f"{segment.name}: row {row}"
        if isinstance(value, str | bytes):  # some programs write text as bytes
            yield _decoded(value, where) if isinstance(value, bytes) else as_document(value, where)
        else:
            what = "is empty" if value is None else "is not text"
            yield Skipped(f"field {field!r} {what}", where)


def _csv(segment: Segment, field: str) -> Iterator[Document]:
    """Text column of a CSV or TSV file with a header."""
    if not segment.whole and not segment.header:
        where = f"{segment.name}: from byte {segment.start}"
        yield Skipped("piece of a table whose header is over 1 MiB", where)
        return
    csv.field_size_limit(2**31 - 1)  # stopping inside a cell would read its rest as rows
    over = segment.stop - segment.start > LINE_BYTES  # no row ends before that
    data = _read(replace(segment, stop=min(segment.stop, segment.start + LINE_BYTES)))
    data = without_mark(data if segment.start == 0 else segment.header + data)
    text = io.BytesIO(data + _END.encode() * over)
    lines = io.TextIOWrapper(text, "utf-8", "surrogateescape", newline="")
    rows = csv.reader(chain(lines, [_END]), delimiter="\t" if segment.kind == "tsv" else ",")
    column = -1
    for row in count(1):
        where = f"{segment.name}: row {row} from byte {segment.start}"
        try:
            cells = next(rows)
        except csv.Error as error:
            yield Skipped(f"not a {segment.kind} row ({error}), and everything after it", where)
            return
        if cells and cells[-1].endswith(_END):
            if over:
                why = "perhaps a quote is never closed; nothing after it was kept"
                yield Skipped(f"no row ends within {LINE_BYTES >> 20} MiB; {why}", where)
            elif cells != [_END]:
                yield Skipped("quote that is never closed, and everything after it", where)
            return
        if row == 1:
            if field not in cells:
                if not segment.start:  # otherwise the first piece reports it
                    yield Skipped(f"no column {field!r}", having(segment.name, cells))
                return
            column = cells.index(field)
        elif column < len(cells):
            yield _decoded(cells[column].encode("utf-8", "surrogateescape"), where)
        elif cells:
            yield Skipped("row without the text column", where)
