"""Real text found on this machine, each document once, in an order that depends only on the files.

There are three tiers, each sorted by the documents' SHA-256, so a small corpus is a prefix of a
larger one:

1. Python sources of this interpreter and its packages, and books in pieces of about 5 kB
2. other programs and documents: sources in 25 languages under /usr, /root/.pyenv and /root/.rustup,
   manual pages in 20 languages, Markdown, reStructuredText, and HTML without its tags and scripts
3. near-copies of these or of each other: the libraries of older Pythons, a second Rust's documents,
   and reference pages generated from one template (Rust's API, Google Cloud's)

Skipped: files under 200 or over 400,000 characters, files that are not UTF-8, contain NUL or have a
line of over 5,000 characters (minified programs, tables, embedded data); JSON, XML, CSV, SVG.
"""

import gzip
import hashlib
import html
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

PROSE_BYTES = 5000
LEAST, MOST, LINE = 200, 400_000, 5000
ROOTS = ("/usr", "/opt", "/root/.pyenv", "/root/.rustup", "/root/.cargo")
COPIES = re.compile(
    r"/versions/(?!3\.11\.)|/toolchains/nightly|/rust/html/(core|std|alloc)/|/man1/gcloud"
)
_ENDINGS = """
py pyi pyx c h cc cpp cxx hpp hh cu cuh inl inc td def rs go java js mjs cjs ts rb php pm pl pod t
vim el lua tcl sh cmake m4 css sql f90 md markdown rst txt html proto cmd 1 2 3 4 5 6 7 8
"""
ENDINGS = {f".{ending}" for ending in _ENDINGS.split()}
DROPPED = re.compile(r"<(script|style|head|nav)\b.*?</\1>|<!--.*?-->|<[^>]+>", re.DOTALL)
BLANKS = re.compile(r"\n\s*\n\s*")


def sources(books: Path | None) -> Iterator[str]:
    """All documents, tier by tier."""
    seen: set[bytes] = set()
    for tier in (_first(books), _texts(second=True), _texts(second=False)):
        unique: dict[bytes, bytes] = {}
        for text in tier:
            data = text.encode("utf-8", "surrogatepass")
            key = hashlib.sha256(data).digest()
            if key not in seen:
                seen.add(key)
                unique[key] = zlib.compress(data, 1)  # a tier is too large to keep as it is
        for key in sorted(unique):
            yield zlib.decompress(unique[key]).decode("utf-8", "surrogatepass")


def _first(books: Path | None) -> Iterator[str]:
    """Python and books."""
    for root in {sysconfig.get_path(name) for name in ("stdlib", "purelib")}:
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if LEAST < len(text) < MOST:
                yield text
    if not books:
        return
    import zstandard

    with zstandard.open(books, "rt", encoding="utf-8") as file:
        for line in file:
            piece = ""
            for paragraph in json.loads(line)["text"].split("\n\n"):
                piece += paragraph + "\n\n"
                if len(piece) > PROSE_BYTES:
                    yield piece
                    piece = ""


def _texts(*, second: bool) -> Iterator[str]:
    """Text files under ROOTS that belong to the second tier, or to the third."""
    for root in ROOTS:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
                if ending not in ENDINGS or bool(COPIES.search(str(path))) == second:
                    continue
                if text := _text(path, ending):
                    yield text


def _text(path: Path, ending: str) -> str:
    """The text of a file, or "" if it is skipped."""
    try:
        if path.is_symlink() or not 100 < path.stat().st_size < 4 * MOST:
            return ""
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""
    if ending == ".html":
        text = BLANKS.sub("\n\n", html.unescape(DROPPED.sub("", text)))
    if not LEAST < len(text) < MOST or "\0" in text or max(map(len, text.split("\n"))) > LINE:
        return ""
    return text
