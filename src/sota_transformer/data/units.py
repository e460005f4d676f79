"""Cuts the sources into units of work: a function of the files, never of workers or memory.

A unit is a list of segments with about UNIT_BYTES of text in total. Small files are grouped; large
files of lines or plain text are cut at line ends. Compressed files, archives and large UTF-16 files
are unpacked once, here, into spool files that are cut at the same places, so that `x.jsonl` and
`x.jsonl.zst` give the same documents. Formats that a hostile file could exploit are parsed only in
the workers.
"""

import codecs
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from sota_transformer.data.sources import ARCHIVES, TABLES, Skipped, Source
from sota_transformer.data.streams import UTF16, Refused, streams
from sota_transformer.options import Prepare

UNIT_BYTES = 4 << 20
_UNIT_FILES = 500
_CUT_KINDS = ("jsonl", "text", "csv", "tsv")  # other kinds stay whole
_TEXT_SLACK = 64 << 10  # how far a cut of plain text looks for a line end
_HEADER_BYTES = 1 << 20  # size of a first chunk
_ROW_ENDS = re.compile(rb"[\r\n]")  # in \r\n the \n is an empty row, or ends the header
_INSIDE_QUOTES = re.compile(rb'[^"]*+(?:""[^"]*+)*+')


@dataclass(frozen=True)
class Segment(Source):
    """A piece of one source: bytes start..stop, or rows for a table."""

    start: int
    stop: int
    taken: int
    """Input bytes of this piece, for the progress display; approximate for a table."""
    whole: bool
    """Whether this is the entire source."""
    offset: int = 0
    """Byte offset of the piece in the file at `path`; for a table, its first row group."""
    header: bytes = b""
    """Header row of a CSV or TSV file, needed to read any piece of it; b"" if it is too long."""
    spooled: bool = False
    """Whether the path is a spool file, to be removed once read."""


@dataclass(frozen=True)
class Unit:
    """The work of one task, and a key that changes whenever its input may have changed."""

    index: int
    segments: tuple[Segment, ...]
    key: str


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    folder: Path
    """Folder for results."""
    options: Prepare
    excluded: Path | None = None
    """File of n-gram hashes; documents that contain one of them are dropped."""


Probe = Callable[[Source], list[tuple[int, int, int]]]


def cut(
    sources: list[Source], folder: Path, refused: Refused, probe: Probe
) -> Iterator[tuple[Segment, ...]]:
    """The segments of each unit in order.

    `folder` is for spool files; `refused` is called for streams that cannot be read; `probe` gives
    the (group, first row, end row) pieces of a table.
    """
    spool = _Spool(folder)
    group: list[Segment] = []
    for source in sources:
        packed = bool(source.codec) or source.kind in ARCHIVES or _recode(source)
        splits = source.size > UNIT_BYTES and source.kind in (*_CUT_KINDS, *TABLES)
        size = sum(segment.size for segment in group)
        full = size + source.size > UNIT_BYTES or len(group) >= _UNIT_FILES
        if group and (packed or splits or full):
            yield tuple(group)
            group = []
        if packed:
            yield from spool.unpack(source, refused)
        elif splits:
            rows = source.kind in TABLES
            for segment in _tables(source, probe) if rows else _lines(source, refused):
                yield (segment,)
        else:
            group.append(whole(source))
    if group:
        yield tuple(group)


def _recode(source: Source) -> bool:
    """Whether the file is UTF-16 and may exceed one unit as UTF-8."""
    if source.size <= UNIT_BYTES // 2 or source.kind in TABLES:
        return False
    with suppress(OSError), Path(source.path).open("rb", buffering=0) as file:
        return file.read(2) in UTF16
    return False  # an unreadable file is reported when it is read


def whole(source: Source) -> Segment:
    """An entire source as one segment."""
    size = source.size
    return Segment(**vars(source), start=0, stop=size, taken=size, whole=True)


def remove_spooled(segments: tuple[Segment, ...]) -> None:
    """Delete the spool files of a unit that nothing will read any more."""
    for path in {segment.path for segment in segments if segment.spooled}:
        Path(path).unlink(missing_ok=True)


def _tables(source: Source, probe: Probe) -> Iterator[Segment]:
    """Row ranges of a large table."""
    pieces = probe(source)
    rows = sum(stop - start for _, start, stop in pieces)
    for group, start, stop in pieces:
        taken = source.size * (stop - start) // max(1, rows)
        where = {"start": start, "stop": stop, "offset": group}
        yield Segment(**vars(source), **where, taken=taken, whole=False)


def _lines(source: Source, refused: Refused) -> Iterator[Segment]:
    """Ranges of a large plain file; a file that is gone or fails is reported as skipped."""
    try:
        yield from _ranges(source)
    except OSError as error:
        refused(Skipped(f"cannot be read ({error.strerror})", source.name))


def _ranges(source: Source) -> Iterator[Segment]:
    """Ranges of a large plain file, cut where `_Cutter` cuts."""
    start, cutter = 0, _Cutter(source.kind)
    piece = replace(whole(source), whole=False)
    with Path(source.path).open("rb", buffering=0) as file:
        if cutter.rows:
            piece = replace(piece, header=cutter.rows.first(file.read(_HEADER_BYTES)))
        while start + UNIT_BYTES < source.size:
            cutter.reset(start)
            file.seek(start if cutter.rows else max(start, cutter.target - 1))
            position, end = file.tell(), None
            while end is None and (chunk := file.read(64 << 10)):
                end = cutter.find(chunk, position)
                position += len(chunk)
            if end is None:
                break
            yield replace(piece, start=start, stop=end, taken=end - start, offset=start)
            start = end
    if start < source.size:
        rest = source.size - start
        yield replace(piece, start=start, taken=rest, offset=start, whole=start == 0)


class _Rows:
    """Finds the ends of CSV and TSV rows, exactly as the standard library's csv reader does.

    A quote opens a quoted cell only at its start; inside, two quotes are a literal one and a single
    quote closes the cell.
    """

    def __init__(self, kind: str) -> None:
        self._starts = b"\t\r\n" if kind == "tsv" else b",\r\n"
        self.reset()

    def first(self, data: bytes) -> bytes:
        """The first row of a table that begins with `data`; b"" if it is not complete."""
        end = self.end(data, 0, 0)
        self.reset()
        return data[: end + 1]

    def reset(self) -> None:
        """Start at the beginning of a row."""
        self._inside, self._opens = False, True

    def end(self, chunk: bytes, at: int, position: int) -> int:
        """Index of the first byte of `chunk` at or after `at` that ends a row, or -1.

        `chunk` directly follows the previous chunk; `position` is its offset in the file.
        """
        marked = position == 0 and chunk.startswith(codecs.BOM_UTF8)
        start = place = len(codecs.BOM_UTF8) if marked else 0
        while True:
            if self._inside:
                found = _INSIDE_QUOTES.match(chunk, place)
                place = found.end() if found else place
                if place == len(chunk):
                    return -1
                place += 1
                self._inside, self._opens = False, True  # if the next chunk begins with the other
            quote = chunk.find(b'"', place)
            stop = len(chunk) if quote < 0 else quote
            if stop > at and (line := _ROW_ENDS.search(chunk, max(place, at), stop)):
                return line.start()
            if quote < 0:
                if place < len(chunk):
                    self._opens = chunk[-1] in self._starts
                return -1
            self._inside = self._opens if quote == start else chunk[quote - 1] in self._starts
            self._opens, place = False, quote + 1


class _Cutter:
    """Finds where a unit ends: after the first line end at or past each multiple of UNIT_BYTES.

    Plain text without a line end is cut a little later, between two characters. In CSV and TSV a
    line end inside quotes does not end a row, so every byte has to be scanned.
    """

    def __init__(self, kind: str) -> None:
        self.rows = _Rows(kind) if kind in ("csv", "tsv") else None
        self._cuts = kind in _CUT_KINDS
        self._prose = kind == "text"
        self.reset(0)

    def reset(self, start: int) -> None:
        """Start looking for the end of the unit that begins at `start`."""
        self.target = (start // UNIT_BYTES + 1) * UNIT_BYTES
        if self.rows:
            self.rows.reset()

    def find(self, chunk: bytes, position: int) -> int | None:
        """Absolute end of the unit if it is in `chunk`, whose first byte is at `position`."""
        if not self._cuts:
            return None
        at = min(len(chunk), max(0, self.target - 1 - position))
        line = self.rows.end(chunk, at, position) if self.rows else chunk.find(b"\n", at)
        last = self.target + _TEXT_SLACK
        if not self._prose or 0 <= line < last - position:
            return position + line + 1 if line >= 0 else None
        at = max(0, last - position)
        while at < len(chunk) and chunk[at] & 0xC0 == 0x80:
            at += 1
        return position + at if at < len(chunk) else None


class _Spool:
    """Unpacks sources into files of about a unit; small members of an archive share one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = 0
        self._file: BinaryIO | None = None
        self._path = Path()
        self._written = 0
        self._segments: list[Segment] = []

    def unpack(self, source: Source, refused: Refused) -> Iterator[tuple[Segment, ...]]:
        """Units of a compressed source or an archive."""
        try:
            for name, kind, chunks in streams(source, refused):
                base = replace(whole(source), name=name, kind=kind, whole=False, spooled=True)
                yield from self._stream(base, chunks)
            if self._segments:
                yield self._unit()
        finally:
            if self._file:
                self._file.close()
            self._file = None

    def _stream(self, base: Segment, chunks: Iterator[bytes]) -> Iterator[tuple[Segment, ...]]:
        """Complete units of one stream; the remainder waits for the next stream."""
        cutter, start, position = _Cutter(base.kind), 0, 0
        for chunk in chunks:
            if cutter.rows and not position:
                base = replace(base, header=cutter.rows.first(chunk[:_HEADER_BYTES]))
            while (end := cutter.find(chunk, position)) is not None:
                self._write(chunk[: end - position])
                self._segment(base, start, end)
                yield self._unit()
                chunk, position, start = chunk[end - position :], end, end
                cutter.reset(end)
            self._write(chunk)
            position += len(chunk)
        if position > start:
            self._segment(base, start, position, whole=start == 0)
        if self._written >= UNIT_BYTES or len(self._segments) >= _UNIT_FILES:
            yield self._unit()

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._path = self._folder / f"{self._next:06d}"
            self._next += 1
            self._file = self._path.open("wb")
        self._file.write(data)
        self._written += len(data)

    def _segment(self, base: Segment, start: int, stop: int, *, whole: bool = False) -> None:
        """Record the bytes just written as a piece of a stream."""
        size, path = stop - start, os.fspath(self._path)
        place = {"start": start, "stop": stop, "path": path, "offset": self._written - size}
        self._segments.append(replace(base, taken=size, whole=whole, **place))

    def _unit(self) -> tuple[Segment, ...]:
        """Close the spool file; all segments since the last unit."""
        if self._file:
            self._file.close()
        segments = tuple(self._segments)
        self._file, self._written, self._segments = None, 0, []
        return segments
