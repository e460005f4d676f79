"""Finds the files that the inputs name, in an order independent of listing, machine and worker.

An input is a file, a folder, a glob, `python:` or `-` (standard input). Every file gets a name
relative to its input; files are read in the order of (input, name). Whatever is skipped is reported
with a reason, never silently. Links to folders, and links that leave a folder, are not followed.
"""

import os
import re
import stat
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sota_transformer.errors import NO_INPUT, SotaError

PYTHON, STDIN = "python:", "-"
_TEXT = ("txt", "text", "md", "markdown", "mdx", "rst", "adoc", "asciidoc", "tex", "org")
_CODE = """
py pyi pyx c h cc cpp cxx hpp hh cu cuh m mm rs go java kt kts scala swift js mjs cjs jsx ts tsx rb
php pl pm lua r jl hs ml mli clj ex exs erl sh bash zsh fish ps1 sql cs fs vb f f90 zig nim dart css
scss toml yaml yml ini cfg cmake make mk dockerfile proto
"""
KINDS = {
    **dict.fromkeys(_TEXT, "text"),
    **dict.fromkeys(_CODE.split(), "code"),
    **dict.fromkeys(("htm", "html", "xhtml"), "html"),
    **dict.fromkeys(("jsonl", "ndjson"), "jsonl"),
    **dict.fromkeys(("arrow", "feather", "ipc"), "arrow"),
    "csv": "csv",
    "tsv": "tsv",
    "parquet": "parquet",
}
CODECS = ("gz", "zst", "bz2", "xz")
ARCHIVES = ("zip", "tar")
TABLES = ("parquet", "arrow")
_DOCUMENT = """
doc docx odt pages rtf epub mobi azw3 pdf djvu xls xlsx ods ppt pptx odp ipynb eml mbox msg
warc wet wat
"""
_PACKED = ("7z", "rar", "lz4", "br", "sz", "snappy", "zstd", "z", "lz", "lzma")
_ADVICE = {  # what is inside would be taken for text, for JSON lines or for damage
    **dict.fromkeys(_DOCUMENT.split(), "; convert it to text first, as with pandoc or pdftotext"),
    **dict.fromkeys(_PACKED, "; unpack it first"),
}
_CACHED = re.compile(r"cache-[0-9a-f]{16}[_.]")  # `map` writes its results beside the data set
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", range(120, 1024)
_IF_NAMED = "; if you name it, it is read as JSON lines"
_SHORT = {"tgz": "tar.gz", "tbz2": "tar.bz2", "txz": "tar.xz", "tzst": "tar.zst"}
KNOWN = (
    "txt md rst html py (and other source code) jsonl ndjson csv tsv parquet arrow, "
    "also in .gz .zst .bz2 .xz .zip .tar"
)


@dataclass(frozen=True)
class Source:
    """One file to read."""

    input: int
    """Index of the input it came with."""
    name: str
    """Its name inside that input."""
    path: str
    """Its path on disk."""
    kind: str
    """Its format: one of KINDS' values, or an archive; "" if the name does not tell and the file
    has to be unpacked to find out."""
    codec: str
    """Its compression: "" or one of CODECS; "stdin" for standard input."""
    size: int
    """Bytes on disk."""
    modified: int
    """Modification time in nanoseconds, to detect that a file changed between two attempts."""


_RECORD = re.compile(  # or an array of them, which no one takes for prose; NUL: UTF-16
    rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\s\0]*(?:\[[\s\0]*)?\{"
)
_MADE = (  # folders written by `sota train`, `sota export` and similar tools
    (("config.json", "run.json", "metrics.jsonl"), "a run; its samples were written by a model"),
    (("tokenizer_config.json", "merges.txt"), "a model; its merges are not text"),
)

EXAMPLES = 5  # skipped items to list per reason
REPAIRED = "; kept, with U+FFFD for the invalid parts"  # appended to the reason of repaired text


@dataclass(frozen=True)
class Skipped:
    """An input that was skipped."""

    reason: str
    where: str
    repaired: bytes = b""
    """The text with U+FFFD for encoding errors, if those are its only problem."""


def find(inputs: tuple[str, ...]) -> tuple[list[Source], list[Skipped]]:
    """The files of all inputs in order, and what was skipped.

    SotaError 66 if an input is missing, or if there is nothing to read at all.
    """
    sources: list[Source] = []
    skipped: list[Skipped] = []
    for index, text in enumerate(inputs):
        if text == STDIN:
            sources.append(Source(index, "stdin", text, "", "stdin", 0, time.time_ns()))
            continue
        only = ".py" if text == PYTHON else ""
        found = list[Source | Skipped]()
        for root, name, reason in _roots(text):
            found += [Skipped(reason, name)] if reason else _walk(index, root, name, only)
        sources += sorted(
            (item for item in found if isinstance(item, Source)),
            key=lambda source: (os.fsencode(source.name), os.fsencode(source.path)),
        )
        skipped += sorted(
            (item for item in found if isinstance(item, Skipped)), key=lambda item: item.where
        )
    if not sources:
        hint = "".join(f"; {item.where}: {item.reason}" for item in skipped[:3])
        others = "; text with another ending is read if you name the files, such as logs/*.log"
        if any(advice in item.reason for item in skipped for advice in _ADVICE.values()):
            others = ""  # of these, the reason says what to do
        raise SotaError(
            f"no text found in {', '.join(inputs)}{hint}; supported formats: {KNOWN}{others}",
            NO_INPUT,
        )
    return sources, skipped


def find_excluded(inputs: tuple[str, ...]) -> tuple[list[Source], list[Skipped]]:
    """The same for the files of --exclude, which an error names."""
    try:
        return find(inputs)
    except SotaError as error:
        raise SotaError(f"--exclude: {error}", error.code) from error


def _roots(text: str) -> Iterator[tuple[str, str, str]]:
    """(path, name, reason to skip it or "") of the files and folders that an input stands for."""
    if text == PYTHON:
        paths = sysconfig.get_paths()
        roots = {"stdlib": "stdlib", "purelib": "site-packages", "platlib": "site-packages"}
        seen = set()
        for key, name in roots.items():
            if (real := os.path.realpath(paths[key])) not in seen:
                seen.add(real)
                yield paths[key], name, ""
        return
    if os.path.lexists(text):
        yield text, Path(text).absolute().name, ""
        return
    matches = _matches(text)
    if not matches:
        what = "matches nothing" if any(sign in text for sign in "*?[") else "does not exist"
        raise SotaError(f"input {text!r} {what}; check the path", NO_INPUT)
    taken, made = set[str](), cache(_made)
    wanted = any(map(is_hidden, Path(text).parts))  # the pattern itself names something hidden
    for match in matches:  # `**` matches a folder and also everything inside it
        if not any(parent in taken for parent in map(str, Path(match).parents)):
            taken.add(match)
            unseen = any(map(is_hidden, Path(match).parts)) and not wanted
            above = next(filter(None, map(made, Path(match).parents)), "")
            yield match, match, "hidden" if unseen else above


def _matches(pattern: str) -> list[str]:
    """The paths that match a glob, sorted."""
    if not any(sign in pattern for sign in "*?["):
        return []
    path = Path(pattern)
    try:
        return sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))
    except ValueError:
        return []


def is_hidden(name: str) -> bool:
    """Whether to skip the file or folder because of its name."""
    return name == "__pycache__" or (name.startswith(".") and name not in (".", ".."))


def _made(folder: Path) -> str:
    """The reason to skip a whole folder, if it is a run or a model, or ""."""
    whys = (why for names, why in _MADE if all(os.path.lexists(folder / name) for name in names))
    return next(whys, "")


def _walk(index: int, root: str, name: str, only: str) -> Iterator[Source | Skipped]:
    """Every file at or below `root`; `name` stands for the root in names and reports.

    `only` restricts the search to one file extension: `python:` means the sources alone.
    """
    if not Path(root).is_dir():
        yield _file(index, root, name, named=True)
        return
    real_root = os.path.realpath(root)
    waiting = [(root, name)]
    while waiting:
        folder, below = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            yield Skipped(f"cannot be read ({error.strerror})", below)
            continue
        if made := _made(Path(folder)):
            yield Skipped(made, below)
            continue
        for entry in entries:
            inside = f"{below}/{entry.name}"
            if is_hidden(entry.name):
                if not only:
                    yield Skipped("hidden", inside)
            elif only and entry.name == "site-packages":
                continue  # inside the standard library's folder, but a root of its own
            elif entry.is_symlink() and not _stays(entry.path, real_root):
                yield Skipped("broken link, or a link out of the folder", inside)
            elif entry.is_symlink() and entry.is_dir():
                yield Skipped("link to a folder", inside)
            elif entry.is_dir():
                waiting.append((entry.path, inside))
            elif entry.name.endswith(only):
                yield _file(index, entry.path, inside, named=False)


def _stays(path: str, real_root: str) -> bool:
    """Whether a link points to something that exists below the root."""
    real = os.path.realpath(path)
    return Path(real).exists() and os.path.commonpath((real, real_root)) == real_root


def _file(index: int, path: str, name: str, *, named: bool) -> Source | Skipped:
    """The file as a source, or the reason to skip it.

    A file given by name may have any extension but one of _ADVICE; its content then determines
    its kind.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        return Skipped(f"cannot be read ({error.strerror})", name)
    if not stat.S_ISREG(status.st_mode):
        return Skipped("not a regular file", name)
    if not os.access(path, os.R_OK):
        return Skipped("cannot be read (no permission)", name)
    base = os.path.basename(path)  # noqa: PTH119  faster, and there may be a million
    codec, kind = format_of(base)
    if not kind:
        suffix = _endings(base)[1]
        advice = _ADVICE.get(suffix, "") if f".{suffix}" in base.lower() else ""
        if not named:
            advice = _IF_NAMED if suffix == "json" else advice
            return Skipped(f"{_described(path)} is not a text format{advice}", name)
        if advice:  # to --exclude an error, where one in a folder is a note
            return Skipped(f"{_described(path)}{advice}", name)
    if kind == "arrow" and not named and _CACHED.match(base):
        return Skipped("cached by `datasets`; read only if you name it", name)
    if codec and kind in TABLES:
        return Skipped(f"compressed {kind}; unpack it first", name)
    if not status.st_size:
        return Skipped("empty file", name)
    if status.st_size in _POINTER_BYTES and _head(path).startswith(_POINTER):
        return Skipped("Git LFS pointer; get the file itself with git lfs pull", name)
    if not kind and not codec:
        kind = looks_like(_head(path))
    return Source(index, name, path, kind, codec, status.st_size, status.st_mtime_ns)


def _head(path: str) -> bytes:
    """The start of a file; b"" if it cannot be read, which is reported on reading."""
    with suppress(OSError), open(path, "rb", buffering=0) as file:
        return file.read(4096)
    return b""


def looks_like(head: bytes) -> str:
    """The kind of a text whose name does not tell: JSON lines, or else prose."""
    return "jsonl" if _RECORD.match(head) else "text"


def format_of(name: str) -> tuple[str, str]:
    """(codec, kind) according to a file name; the kind is "" if unknown."""
    codec, suffix = _endings(name)
    return codec, KINDS.get(suffix, suffix if suffix in ARCHIVES else "")


def _endings(name: str) -> tuple[str, str]:
    """(codec, extension below it) of a file name, in lower case; the name itself if it has none."""
    stem, _, suffix = name.lower().rpartition(".")
    if suffix in _SHORT:
        stem, _, suffix = f"{stem}.{_SHORT[suffix]}".rpartition(".")
    codec = suffix if suffix in CODECS else ""
    if codec:
        suffix = stem.rpartition(".")[2]
    return codec, suffix


def _described(path: str) -> str:
    """The extension of a file, as part of a reason that many files share."""
    name = Path(path)
    suffix = name.suffix.lower()
    if suffix.removeprefix(".") in CODECS:  # .gz alone would name a supported one as the reason
        inner = Path(name.stem).suffix.lower()
        return f"{inner[:12]}{suffix} file" if inner else f"file without an extension, in {suffix}"
    return f"{suffix[:12]} file" if suffix else "file without an extension"
