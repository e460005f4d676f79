"""The n-grams of texts that must not be trained on: the evaluation files given by `--exclude`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sota_transformer.data.documents import BINARY, documents, without_mark
from sota_transformer.data.encode import EXCLUDE_GRAM
from sota_transformer.data.grams import distinct, gram_hashes
from sota_transformer.data.guards import ICONV, LINES
from sota_transformer.data.sources import ARCHIVES, Skipped, Source, find_excluded
from sota_transformer.data.streams import NOTHING
from sota_transformer.data.tables import Tables
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.data.units import whole
from sota_transformer.errors import BAD_DATA, USAGE, SotaError
from sota_transformer.words import counted, printable

_SHORT_PHRASE = 20  # characters; English has 55, German 33, Russian 11, Chinese 6, Tamil 4


def write_excluded(inputs: tuple[str, ...], text_field: str, path: Path) -> list[Source]:
    """Write the sorted n-gram hashes of all texts as .npy, and report how many are too short.

    Returns the files that were read. SotaError 66 for a missing file, 65 for an unreadable one or
    if no text is long enough.
    """
    sources, skipped = find_excluded(inputs)
    tokenizer, found, short, tokens, characters = Tokenizer(), [], 0, 0, 0
    for text in _texts(inputs, sources, skipped, text_field):
        ids = np.array(tokenizer.encode(text), np.uint16)
        hashes = gram_hashes(ids, EXCLUDE_GRAM)
        found.append(hashes)
        short += not len(hashes)
        tokens, characters = tokens + len(ids), characters + len(text)
    grams = distinct(np.concatenate(found)) if found else np.empty(0, np.uint64)
    if not len(grams):
        raise SotaError(
            f"--exclude {', '.join(inputs)}: no text has at least {EXCLUDE_GRAM} tokens", BAD_DATA
        )
    if short:
        verb = "is" if short == 1 else "are"
        print(
            f"note: {counted(short, 'excluded text')} {verb} shorter than {EXCLUDE_GRAM} tokens "
            "and cannot be matched"
        )
    if (phrase := EXCLUDE_GRAM * characters / tokens) < _SHORT_PHRASE:
        print(
            f"note: {EXCLUDE_GRAM} tokens of the excluded texts are only about {phrase:.0f} "
            "characters, since GPT-2's tokens are short in this language; one common phrase drops "
            "a document"
        )
    np.save(path, grams)
    return sources


def _texts(
    inputs: tuple[str, ...], sources: list[Source], skipped: list[Skipped], text_field: str
) -> Iterator[str]:
    """Texts of the excluded files; for records without the text field, every string.

    Unreadable input is an error: if it were silently skipped here, it would be trained on. Files
    of a folder that are not text are skipped with a note.
    """
    ignored, invalid = list[Skipped](), list[str]()
    for item in skipped:
        if "is not a text format" in item.reason:
            ignored.append(item)
        else:
            _refuse(item)
    for source in sources:
        if source.codec or source.kind in ARCHIVES:
            text = f"--exclude {source.name}: compressed or an archive; unpack it first"
            raise SotaError(text, USAGE)
        if source.kind == "jsonl":
            data = without_mark(Path(source.path).read_bytes())
            text = data.decode(errors="replace")
            invalid += [source.name] * (text.encode() != data)
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield from _strings(_parsed(line, f"{source.name}:{number}"), text_field)
            continue
        for document in documents(whole(source), text_field, Tables()):
            if isinstance(document, bytes):
                yield document.decode()
            elif document.repaired:
                invalid.append(document.where)
                yield document.repaired.decode()
            elif document.reason == BINARY and Path(inputs[source.input]).is_dir():
                ignored.append(document)
            else:
                _refuse(document)
    if ignored:
        first = printable(f"the first is {ignored[0].where}: {ignored[0].reason}")
        print(f"note: --exclude ignores {counted(len(ignored), 'file')}; {first}")
    if invalid:  # a Japanese benchmark in Shift-JIS would exclude nothing at all
        first = printable(f"the first is {invalid[0]}")
        print(
            f"note: --exclude has {counted(len(invalid), 'text')} of invalid Unicode, and what is "
            f"invalid cannot be matched; {first}; convert it: {ICONV}"
        )


def _refuse(item: Skipped) -> None:
    """SotaError 65 for a skipped input, unless it contains no text."""
    if item.reason not in ("hidden", NOTHING) and "empty" not in item.reason:
        raise SotaError(f"--exclude {item.where}: {item.reason}", BAD_DATA)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SotaError(f"--exclude {where}: not a line of JSON; {LINES}", BAD_DATA) from error


def _strings(value: Any, text_field: str) -> Iterator[str]:
    """The text field of a record, or all strings in it if there is none."""
    if isinstance(value, dict) and isinstance(value.get(text_field), str):
        yield value[text_field]
    elif isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner, text_field)
