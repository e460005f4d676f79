"""The grams of texts that must not be trained on: evaluation files named by `--exclude`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sota_transformer.data.documents import BINARY, documents, without_mark
from sota_transformer.data.encode import EXCLUDE_GRAM
from sota_transformer.data.grams import distinct, gram_hashes
from sota_transformer.data.progress import printable
from sota_transformer.data.sources import ARCHIVES, Skipped, find
from sota_transformer.data.streams import NOTHING
from sota_transformer.data.tables import Tables
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.data.units import whole
from sota_transformer.errors import BAD_DATA, USAGE, SotaError
from sota_transformer.words import counted


def write_excluded(inputs: tuple[str, ...], text_field: str, path: Path) -> None:
    """Write the sorted gram hashes of all texts as .npy, and say how many are too short for that.

    SotaError 66 for a missing file, 65 for one that cannot be read or if no text is long enough.
    """
    tokenizer, found, short = Tokenizer(), [], 0
    for text in _texts(inputs, text_field):
        hashes = gram_hashes(np.array(tokenizer.encode(text), np.uint16), EXCLUDE_GRAM)
        found.append(hashes)
        short += not len(hashes)
    grams = distinct(np.concatenate(found)) if found else np.empty(0, np.uint64)
    if not len(grams):
        raise SotaError(
            f"--exclude {', '.join(inputs)}: no text there has {EXCLUDE_GRAM} tokens", BAD_DATA
        )
    if short:
        print(f"note: {counted(short, 'excluded text')} too short to be found again")
    np.save(path, grams)


def _texts(inputs: tuple[str, ...], text_field: str) -> Iterator[str]:
    """Texts of the excluded files; of records without the text field every string.

    What cannot be read is an error: left out here in silence, it would be trained on. What only
    lies in a folder and is no text is said to be left out.
    """
    sources, skipped = find(inputs)
    passed: list[Skipped] = []
    for item in skipped:
        if item.reason.endswith("is not a text format"):
            passed.append(item)
        else:
            _refuse(item)
    for source in sources:
        if source.codec or source.kind in ARCHIVES:
            raise SotaError(f"--exclude {source.name}: unpack it first", USAGE)
        if source.kind == "jsonl":
            data = without_mark(Path(source.path).read_bytes())
            for line in data.decode(errors="replace").split("\n"):
                if line.strip():
                    yield from _strings(_parsed(line, source.name), text_field)
            continue
        for document in documents(whole(source), text_field, Tables()):
            if isinstance(document, bytes):
                yield document.decode()
            elif document.repaired:
                yield document.repaired.decode()
            elif document.reason == BINARY and Path(inputs[source.input]).is_dir():
                passed.append(document)
            else:
                _refuse(document)
    if passed:
        first = f"the first is {printable(passed[0].where)}: {passed[0].reason}"
        print(f"note: --exclude passes over {counted(len(passed), 'file')}; {first}")


def _refuse(item: Skipped) -> None:
    """SotaError 65 for what was not taken, unless there is no text in it."""
    if item.reason not in ("hidden", NOTHING) and "empty" not in item.reason:
        raise SotaError(f"--exclude {item.where}: {item.reason}", BAD_DATA)


def _parsed(line: str, name: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SotaError(f"--exclude {name}: not JSON lines ({error})", BAD_DATA) from error


def _strings(value: Any, text_field: str) -> Iterator[str]:
    """The text field of a record, or else all strings in it."""
    if isinstance(value, dict) and isinstance(value.get(text_field), str):
        yield value[text_field]
    elif isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner, text_field)
