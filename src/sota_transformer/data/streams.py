"""Compressed files, archives, UTF-16 and standard input as bounded chunks of bytes.

Damaged data, decompression bombs and unreadable files are reported, never silently skipped.
Archive members are read as streams; nothing is extracted under a name chosen by the archive.
"""

import bz2
import codecs
import gzip
import io
import lzma
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, Self

from sota_transformer.data.sources import (
    ARCHIVES,
    KNOWN,
    TABLES,
    Skipped,
    Source,
    format_of,
    is_hidden,
    looks_like,
)

CHUNK = 1 << 20
_BOMB_BYTES, _BOMB_RATIO = 1 << 28, 500
NOTHING = "no document inside"
_DECOMPRESSORS = {"bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}
_PACKED = 8 << 10  # fed to a decompressor at a time: damage also loses what precedes it in a block
_WINDOW = 1 << 27  # as much as `zstd -d` allows by itself
_LINK = "link or device inside an archive"
_STARTED = "only its readable start was kept"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Refused = Callable[[Skipped], None]
Stream = tuple[str, str, Iterator[bytes]]  # name, kind, chunks


def streams(source: Source, refused: Refused) -> Iterator[Stream]:
    """Every text stream of a packed source, in order; each must be consumed before the next."""
    if source.kind == "zip":
        yield from _zip(source, refused)
    elif source.kind == "tar":
        yield from _tar(source, refused)
    else:
        chunks = _chunks(source, refused)
        if source.kind:
            yield source.name, source.kind, chunks
        elif first := next(chunks, b""):  # the kind shows in them
            yield source.name, looks_like(first), chain([first], chunks)


def _chunks(source: Source, refused: Refused) -> Iterator[bytes]:
    """The chunks of standard input or of a file that is a single stream."""
    if source.codec == "stdin":
        yield from _guarded(unpacked(sys.stdin.buffer, ""), source.name, 1 << 50, refused)
        return
    with Path(source.path).open("rb") as raw:
        yield from _guarded(unpacked(raw, source.codec), source.name, source.size, refused)


def _guarded(chunks: Iterator[bytes], name: str, packed: int, refused: Refused) -> Iterator[bytes]:
    """The chunks; stops and reports a reason if the stream is damaged or a bomb."""
    total = 0
    try:
        for chunk in recoded(chunks):
            yield chunk
            total += len(chunk)
            if total > _BOMB_BYTES and total > _BOMB_RATIO * max(1, packed):
                reason = f"expands over {_BOMB_RATIO} to 1; only its start was kept"
                refused(Skipped(reason, name))
                return
        if not total:
            refused(Skipped("empty file", name))
    except damage() as error:
        where = f"{name}: {(str(error).splitlines() or [''])[0][:80]}"
        refused(Skipped(f"damaged stream; {_STARTED}", where))


def recoded(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks of a text; UTF-16 with a byte order mark, in the first, becomes UTF-8 without one.

    Invalid UTF-16 becomes invalid UTF-8, so that both are handled in the same place.
    """
    first = next(chunks, b"")
    if not first.startswith(UTF16):
        yield from chain([first] if first else [], chunks)
        return
    decoder = codecs.getincrementaldecoder("utf-16")("sota-escape")
    for chunk in chain([first], chunks, [b""]):
        if text := decoder.decode(chunk, final=not chunk):
            yield text.encode("utf-8", "surrogateescape")


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Replace invalid UTF-16 by a character that `surrogateescape` encodes as one invalid byte."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("sota-escape", _escape)


def damage() -> tuple[type[BaseException], ...]:
    """The exceptions that a damaged stream or archive may raise."""
    errors = (OSError, EOFError, ValueError, RuntimeError)
    errors += (zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
    zstandard = sys.modules.get("zstandard")
    return (*errors, zstandard.ZstdError) if zstandard else errors


def unpacked(raw: IO[bytes], codec: str) -> Iterator[bytes]:
    """The decompressed stream `raw` in chunks of one to two CHUNKs; the last may be shorter."""
    if codec == "zst":
        yield from _filled(_zstandard(raw))
    elif codec == "gz":
        with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
            yield from _filled(iter(lambda: stream.read1(CHUNK), b""))
    elif codec:
        yield from _filled(_decompressed(raw, _DECOMPRESSORS[codec]))
    else:
        yield from _filled(iter(lambda: raw.read(_PACKED), b""))


def _decompressed(raw: IO[bytes], begin: Callable[[], Any]) -> Iterator[bytes]:
    """Pieces of any number of bz2 or xz streams. EOFError if the last one is truncated.

    The standard library's file classes silently stop at damage in the second or a later stream.
    """
    stream, data = begin(), b""
    while data or (data := raw.read(_PACKED)):
        if stream.eof:
            data = data.lstrip(b"\0")  # xz allows padding
            if not data:
                continue
            stream = begin()
        yield stream.decompress(data, CHUNK)
        # Drain it even if it asks for input: bz2 does so while it still holds data before a cut.
        while not stream.eof and (piece := stream.decompress(b"", CHUNK)):
            yield piece
        data = stream.unused_data
    if not stream.eof:
        raise EOFError("the stream ends before its end marker")


def _filled(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Chunks of about CHUNK bytes; unlike with `read`, data before damage is not lost."""
    held, size = list[bytes](), 0
    try:
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= CHUNK:
                yield b"".join(held)
                held, size = [], 0
    except damage():
        if size:
            yield b"".join(held)
        raise
    if size:
        yield b"".join(held)


def _zstandard(raw: IO[bytes]) -> Iterator[bytes]:
    """Pieces of a zstandard stream of any number of frames. EOFError if it is truncated."""
    import zstandard

    context, frame = zstandard.ZstdDecompressor(max_window_size=_WINDOW), None
    while data := raw.read(_PACKED >> 3):  # four bytes can expand to 128 KiB
        while data:
            frame = frame or context.decompressobj()
            try:
                piece = frame.decompress(data)
            except zstandard.ZstdError as error:
                if "too much memory" not in str(error):
                    raise
                text = f"its window is over {_WINDOW >> 20} MiB; unpack it with zstd -d --long=31"
                raise OSError(text) from error
            yield from (piece[at : at + CHUNK] for at in range(0, len(piece), CHUNK))
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the stream ends before its end marker")


def _member(archive: str, name: str, refused: Refused) -> tuple[str, str, str] | None:
    """(full name, codec, kind) of an archive member; None if it is refused, after reporting why."""
    full = f"{archive}!{name}"
    codec, kind = format_of(name)
    parts = name.replace("\\", "/").split("/")  # the former from older programs for Windows
    if any(map(is_hidden, parts)):  # as in a folder; covers macOS' `__MACOSX/.../._NAME`
        refused(Skipped("hidden", full))
    elif kind in ARCHIVES:
        refused(Skipped("archive inside an archive; unpack it first", full))
    elif kind in TABLES:
        refused(Skipped(f"{kind} inside an archive; unpack it first", full))
    elif not kind:
        refused(Skipped(f"not a text format inside an archive ({KNOWN.split(' (')[0]} ...)", full))
    else:
        return full, codec, kind
    return None


class _BareNames(io.FileIO):
    """A zip file with the "names are UTF-8" flags cleared."""

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes; clears the flag in the central directory and in a member's header."""
        data, at = bytearray(super().read(size) or b""), 0
        while data.startswith(b"PK\1\2", at) and len(data) >= at + 46:
            data[at + 9] &= ~8
            at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
        if size == 30 and data.startswith(b"PK\3\4"):
            data[7] &= ~8
        return bytes(data)


@contextmanager
def _unzipped(path: str) -> Iterator[zipfile.ZipFile]:
    """A zip archive; a name flagged as UTF-8 that is not gets escapes, and no text is lost."""
    try:
        archive = zipfile.ZipFile(path)
    except UnicodeDecodeError:
        with _BareNames(path) as raw, zipfile.ZipFile(raw, metadata_encoding="latin-1") as archive:
            for info in archive.infolist():
                name = info.filename.encode("latin-1")
                info.filename = name.decode(errors="backslashreplace")
            yield archive
        return
    with archive:
        yield archive


def _zip(source: Source, refused: Refused) -> Iterator[Stream]:
    """Members of a zip archive."""
    try:
        with _unzipped(source.path) as archive:
            if all(info.is_dir() for info in archive.infolist()):
                refused(Skipped(NOTHING, source.name))
            for info in archive.infolist():
                if stat.S_ISLNK(info.external_attr >> 16):  # its content is a path
                    refused(Skipped(_LINK, f"{source.name}!{info.filename}"))
                    continue
                if info.is_dir() or not (found := _member(source.name, info.filename, refused)):
                    continue
                name, codec, kind = found
                try:
                    with archive.open(info) as raw:
                        chunks = _guarded(unpacked(raw, codec), name, info.compress_size, refused)
                        yield name, kind, chunks
                except damage() as error:
                    refused(Skipped("damaged or encrypted member", f"{name}: {error}"[:200]))
    except damage() as error:
        refused(Skipped("damaged archive", f"{source.name}: {error}"[:200]))


def _tar(source: Source, refused: Refused) -> Iterator[Stream]:
    """Members of a tar archive, compressed or not, read in one pass."""
    try:
        with Path(source.path).open("rb") as file:
            raw: Any = _Reader(unpacked(file, source.codec))
            with tarfile.open(fileobj=raw, mode="r|", tarinfo=_Header) as archive:
                members, nothing = vars(archive)["members"], True
                for info in iter(archive.next, None):
                    members.clear()  # tarfile keeps every member in memory
                    if info.isdir():
                        continue
                    nothing = False
                    if not info.isreg():
                        refused(Skipped(_LINK, f"{source.name}!{info.name}"))
                        continue
                    found = _member(source.name, info.name, refused)
                    if found and (member := archive.extractfile(info)):
                        name, codec, kind = found
                        packed = min(info.size, source.size)
                        yield name, kind, _guarded(unpacked(member, codec), name, packed, refused)
                if nothing:
                    refused(Skipped(NOTHING, source.name))
                blocks, zeros = vars(archive)["fileobj"], bytes(CHUNK)
                padding = (blocks.read(CHUNK) for _ in range(_BOMB_BYTES // CHUNK))
                if next((data for data in padding if data != zeros), b"").strip(b"\0"):
                    raise tarfile.ReadError("data after its end, as in two concatenated archives")
    except damage() as error:
        refused(Skipped(f"damaged archive; {_STARTED}", f"{source.name}: {error}"[:200]))


class _Header(tarfile.TarInfo):
    """A member's header; tarfile treats a damaged or missing one as the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in a block. A file of the oldest kind is one even if its name ends in a slash:
        with content it is no directory, but a long name cut there (cpython#141707).
        """
        header = super().frombuf(buf, encoding, errors)
        if header.size and buf[156:157] == tarfile.AREGTYPE:
            header.type = tarfile.AREGTYPE
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:  # type: ignore[override]
        """The next header. ReadError if there is neither a header nor the end's zero blocks."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, expected a member or the end") from error


def _failing(error: BaseException) -> Iterator[bytes]:
    """An iterator that raises `error` instead of yielding a chunk."""
    raise error
    yield


class _Reader:
    """A file-like reader over chunks that raises EOFError on reads past the end: tarfile would
    otherwise read missing data block by block, up to whatever size a member claims.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._held, self._ended = chunks, bytearray(), False

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; fewer at the end, b"" once, or once before an error is raised."""
        try:
            while len(self._held) < size and (chunk := next(self._chunks, b"")):
                self._held += chunk
        except damage() as error:
            if not self._held:
                raise
            self._chunks = _failing(error)
        data = bytes(self._held[:size])
        del self._held[:size]
        if not data and self._ended:
            raise EOFError("unexpected end of data")
        self._ended = not data
        return data
