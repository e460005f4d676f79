"""`sota data`: describe a prepared folder as figures, sample text or an HTML page."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.encode import EXCLUDE_GRAM
from sota_transformer.data.grams import GramSet, gram_hashes
from sota_transformer.data.packing import document_ends
from sota_transformer.data.page import page, save
from sota_transformer.data.progress import summary
from sota_transformer.data.shards import (
    SPLITS,
    Split,
    TokenWindows,
    load_array,
    load_manifest,
    sidecar,
)
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.errors import BAD_DATA, IO_FAILED, LOCKED, USAGE, SotaError
from sota_transformer.options import DataView
from sota_transformer.words import CONTROL, counted, printable

_BLOCK = 1 << 20
_SAMPLED = 200  # documents read to determine the scripts
_MOST_GRAMS = 1 << 20  # validation n-grams counted for the leakage; beyond that, a sample
_MOST_SCRIPTS = 8  # listed by name
_LAYOUT = "\n\t"  # control characters that a text may have


def describe(options: DataView) -> dict[str, Any]:
    """Print what `options` asks for about a prepared folder; the figures, as a dictionary.

    SotaError 66 if the folder is missing, 65 if it is damaged, 2 for a window out of range.
    """
    if options.show < 0:
        raise SotaError(f"--show {options.show} must be 0 or more", USAGE)
    if options.window:
        _print_window(options)
        return {}
    if options.list_split:
        _print_split(options)
        return {}
    manifest = load_manifest(options.folder)
    if options.export_bin is not None:
        _export(options.folder, options.export_bin)
        return {}
    streams = {split: _open(options.folder, split) for split in SPLITS}
    figures: dict[str, Any] = {split: _figures(stream) for split, stream in streams.items()}
    if options.leakage:
        figures["leakage"] = _leakage(streams["train"], streams["val"])
    samples = list(_samples(streams, options.show))
    if options.html is not None:
        save(options.html, page(options.folder, manifest, figures, samples), "--html")
        print(f"wrote {options.html}")
        return figures
    if manifest["inputs"]:
        print(summary(manifest, options.folder))
    for split in SPLITS:
        print(_lines(split, figures[split]))
    if options.leakage:
        share = figures["leakage"]
        print(f"leakage: {share:.3%} of validation's {EXCLUDE_GRAM}-grams also occur in training")
    for split, number, text in samples:
        print(f"--- {split} document {number:,}\n{_shown(text[:600])}")
    return figures


def _open(folder: Path, split: Split) -> TokenWindows | None:
    """The split as a token stream, None if it is empty."""
    if not load_manifest(folder)["splits"][split]["tokens"]:
        return None
    return TokenWindows(folder, split, 1)


def _figures(stream: TokenWindows | None) -> dict[str, Any]:
    """Counts, lengths, bytes per token and scripts of one split."""
    if stream is None:
        return {"documents": 0, "tokens": 0, "text_bytes": 0}
    ends = document_ends(stream)
    lengths = _lengths(stream, ends)
    if lengths.any():  # if end-of-text precedes each document, the first document is empty
        lengths = lengths[lengths > 0]
    edges = 2 ** np.arange(0, 63)  # a foreign file may be a single document
    counts = np.histogram(np.maximum(lengths, 1), edges)[0].tolist()
    filled = [i for i, count in enumerate(counts) if count]
    return {
        "documents": len(lengths),
        "tokens": stream.tokens,
        "text_bytes": stream.text_bytes,
        "bytes_per_token": stream.text_bytes / max(1, int(lengths.sum())),
        "length_quantiles": np.percentile(lengths, (0, 10, 50, 90, 100)).astype(int).tolist(),
        "length_histogram": [[int(edges[i]), counts[i]] for i in range(filled[0], filled[-1] + 1)],
        "scripts": _scripts(stream, ends),
    }


def _lengths(stream: TokenWindows, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens per document without end-of-text, which a foreign file's last document may lack."""
    lengths = np.diff(ends, prepend=0) - 1
    lengths[-1] += int(stream.read(stream.tokens - 1, stream.tokens)[0]) != EOT
    return lengths


def _scripts(stream: TokenWindows, ends: NDArray[np.int64]) -> dict[str, float]:
    """Share of letters by script (the first word of their Unicode names), in sampled documents."""
    letters, scripts = Counter[str](), Counter[str]()
    for number in np.unique(np.linspace(0, len(ends) - 1, _SAMPLED).astype(int)).tolist():
        letters.update(filter(str.isalpha, _text(stream, ends, number, 2000)))
    for letter, count in letters.items():
        name = unicodedata.name(letter, "other").partition(" ")[0]
        scripts[name if name == "CJK" else name.title()] += count
    shown = dict(scripts.most_common(_MOST_SCRIPTS))
    if rest := scripts.total() - sum(shown.values()):
        shown["others"] = rest
    return {name: count / scripts.total() for name, count in shown.items()}


def _text(stream: TokenWindows, ends: NDArray[np.int64], number: int, most: int) -> str:
    """Text of a document, at most its first `most` tokens."""
    start, end = int(ends[number - 1]) if number else 0, int(ends[number])
    ids = stream.read(start, min(end, start + most))
    return Tokenizer().decode(ids, cut=end - start > most)


def _samples(streams: dict[str, TokenWindows | None], count: int) -> Iterator[tuple[str, int, str]]:
    """(split, number, text) of documents spread evenly over both splits; deterministic."""
    for split, stream in streams.items():
        if stream is None:
            continue
        ends = document_ends(stream)
        shown = min(count, len(ends))
        for i in range(shown):
            number = (2 * i + 1) * len(ends) // (2 * shown)
            yield split, number, _text(stream, ends, number, 2000)


def _shown(text: str) -> str:
    """Text for a terminal. Line ends of Windows would be a question mark on every line."""
    return printable(text.replace("\r\n", "\n"), keep=_LAYOUT)


def _lines(split: str, figures: dict[str, Any]) -> str:
    """One split as text, with a histogram of document lengths."""
    if not figures["tokens"]:
        return f"{split}: empty"
    shortest, low, middle, high, longest = figures["length_quantiles"]
    shares = (f"{name} {share:.1%}" for name, share in figures["scripts"].items())
    scripts = ", ".join(shares) or "no letters"
    lines = [
        f"{split}: {counted(figures['documents'], 'document')}, "
        f"{counted(figures['tokens'], 'token')}, {figures['bytes_per_token']:.2f} bytes per token; "
        f"letters by script: {scripts}",
        f"  tokens per document: min {shortest:,}, 10% {low:,}, median {middle:,}, "
        f"90% {high:,}, max {longest:,}",
    ]
    most = max(count for _, count in figures["length_histogram"])
    for edge, count in figures["length_histogram"]:
        bar = "#" * (-(-count * 40 // most))
        lines.append(f"  {edge:>10,}+ {count:>10,} {bar}")
    return "\n".join(lines)


def _leakage(train: TokenWindows | None, val: TokenWindows | None) -> float:
    """Share of validation's distinct 13-grams that also occur in training; sampled if many."""
    if train is None or val is None:
        return 0.0
    each = 1 + val.tokens // _MOST_GRAMS
    chosen = GramSet(np.concatenate(list(_grams(val, each))))
    seen = np.zeros(len(chosen.sorted), bool)
    for hashes in _grams(train, each):
        hits = hashes[chosen.find(hashes)]
        seen[np.searchsorted(chosen.sorted, hits)] = True
    return float(seen.mean()) if len(seen) else 0.0


def _grams(stream: TokenWindows, each: int) -> Iterator[NDArray[np.uint64]]:
    """One in `each` of a split's n-grams, chosen by hash; none crosses the end of a document."""
    for start in range(0, stream.tokens, _BLOCK):
        ids = stream.read(start, min(start + _BLOCK + EXCLUDE_GRAM - 1, stream.tokens))
        hashes = gram_hashes(ids, EXCLUDE_GRAM)
        over = np.zeros(len(ids) + 1, np.int32)
        np.cumsum(ids == EOT, out=over[1:])
        inside = over[EXCLUDE_GRAM:][: len(hashes)] == over[: len(hashes)]
        yield hashes[inside & (hashes % np.uint64(each) == 0)]


def _print_split(options: DataView) -> None:
    """One JSON line per document of a split: number, tokens without end-of-text, first words."""
    if options.list_split not in SPLITS:
        raise SotaError(f"--list-split {options.list_split!r} must be train or val", USAGE)
    split: Split = "train" if options.list_split == "train" else "val"
    if (stream := _open(options.folder, split)) is None:
        return
    ends, hashes = document_ends(stream), None
    manifest = load_manifest(options.folder)
    if "mark" not in manifest:  # files of other projects have no hashes
        names = (sidecar(shard, "hashes") for shard in manifest["splits"][split]["shards"])
        hashes = np.concatenate([load_array(options.folder, name, manifest) for name in names])
        if len(hashes) != len(ends):
            text = f"the {split} shards hold {len(ends):,} documents but {len(hashes):,} hashes"
            raise SotaError(f"{options.folder}: {text}", BAD_DATA)
    for number, length in enumerate(_lengths(stream, ends).tolist()):
        row = {"document": number, "tokens": length, "text": _text(stream, ends, number, 16)}
        if hashes is not None:
            row["hash"] = hashes[number].tobytes().hex()
        line = json.dumps(row, ensure_ascii=False)  # which escapes only some of them
        print(line.translate({i: f"\\u{i:04x}" for i in CONTROL}))


def _print_window(options: DataView) -> None:
    """One training window as text: `SPLIT:INDEX` or `SPLIT:INDEX:SEQ_LEN`."""
    found = re.fullmatch("(train|val):([0-9]{1,18})(?::([0-9]{1,18}))?", options.window)
    if not found:
        raise SotaError(
            f"--window {options.window!r} must be SPLIT:INDEX or SPLIT:INDEX:SEQ_LEN, such as "
            "train:0 or val:3:512"
        )
    split, index, seq_len = found[1], int(found[2]), int(found[3] or 512)
    if not seq_len:
        raise SotaError(f"--window {options.window}: SEQ_LEN must be at least 1", USAGE)
    windows = TokenWindows(options.folder, "train" if split == "train" else "val", seq_len)
    if index >= len(windows):
        raise SotaError(
            f"--window {options.window}: out of range; the split has "
            f"{counted(len(windows), 'window')}, counted from 0",
            USAGE,
        )
    pieces = np.split(windows[index], np.flatnonzero(windows[index] == EOT) + 1)
    decode = Tokenizer().decode
    texts = (_shown(decode(piece)) for piece in pieces)
    print("\n--- end of text ---\n".join(texts))


def _export(folder: Path, out: Path) -> None:
    """Write nanoGPT's `train.bin` and `val.bin` into an existing or new folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"--export-bin: cannot create {out}: {error.strerror}"
        raise SotaError(text, LOCKED) from error
    for split in SPLITS:
        if (stream := _open(folder, split)) is None:
            (out / f"{split}.bin").unlink(missing_ok=True)  # from an earlier export of other data
            continue
        temporary = out / f".{split}.bin.tmp"
        try:
            with temporary.open("wb") as file:
                for start in range(0, stream.tokens, _BLOCK):
                    file.write(stream.read(start, min(start + _BLOCK, stream.tokens)).tobytes())
            temporary.replace(out / f"{split}.bin")
        except OSError as error:
            raise SotaError(f"{out / split}.bin: {error.strerror}", IO_FAILED) from error
        finally:  # frees the space on a full disk
            temporary.unlink(missing_ok=True)
        print(f"wrote {out / f'{split}.bin'}: {stream.tokens:,} uint16 ids")
