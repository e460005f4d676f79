"""Resource limits and errors of a preparation, reported as one actionable line."""

import errno
import math
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sota_transformer.errors import (
    BAD_DATA,
    IO_FAILED,
    LOCKED,
    Interrupted,
    SotaError,
    interruptible,
)
from sota_transformer.options import Prepare

_FEW_TOKENS = 4096
_FIELD = "name the one that holds the text with --text-field"
LINES = "each document has to be one line; for an array: jq -c '.[]' OLD.json > NEW.jsonl"
ICONV = "iconv -f ENCODING -t utf-8 OLD > NEW.txt"
_ADVICE = {  # by the start of a reason
    "no field": _FIELD,
    "no column": _FIELD,
    "not a JSON line": LINES,
    "JSON, but not": LINES,
    "not valid UTF-8": f"convert it from its encoding, such as cp1252, cp932 or gb18030: {ICONV}",
    "ISO-2022": f"convert it from its encoding, such as iso-2022-jp: {ICONV}",
    "NUL bytes": f"if it is UTF-16 without a byte order mark, or UTF-32, convert it: {ICONV}",
}
_MOST_WORKERS = 1024
_PARENT_MB, _WORKER_MB = 110, 130  # measured by benchmarks/prepare.py, rounded up
CREATE = {  # errors that mean a bad path, not a bad disk
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def workers(options: Prepare) -> int:
    """Number of worker processes to use."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    wanted = min(options.workers or cores, _MOST_WORKERS)
    if not options.memory_mb:
        return wanted
    fits = (options.memory_mb - _PARENT_MB) // _WORKER_MB
    if fits < 1:
        least = _PARENT_MB + _WORKER_MB
        raise SotaError(f"--memory-mb {options.memory_mb} is too small; use at least {least}")
    return min(wanted, fits)


@contextmanager
def one_line_errors(out: Path, advice: str = "choose another --out") -> Iterator[None]:
    """Turn OSError into a one-line SotaError with an exit code."""
    try:
        yield
    except OSError as error:
        place = error.filename or out
        if error.errno in CREATE:
            text = f"cannot create {place}: {error.strerror or error}; {advice}"
            raise SotaError(text, LOCKED) from error
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(out.parent).free / 1e6:,.0f} MB free"
        raise SotaError(
            f"{place}: writing failed ({error.strerror or error}){free}; {advice} or free "
            "some space, then run the same command again",
            IO_FAILED,
        ) from error


@contextmanager
def stoppable(work: Path) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line that says how to resume."""
    try:
        with interruptible(signal.SIGINT, signal.SIGTERM):
            yield
    except Interrupted as error:
        text = f"stopped; run the same command again to resume from {work}"
        raise SotaError(text, error.code) from error


def check_splits(manifest: dict[str, Any], val_fraction: float, shards: Path) -> None:
    """SotaError 65 if a split would be empty; prints a note if validation is very short."""
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    documents = train["documents"] + val["documents"]
    reasons = _reasons(manifest["rejects"])
    if not documents:
        raise SotaError(f"no usable text in the inputs: {reasons}", BAD_DATA)
    for split, part in (("train", train), ("val", val)):
        if not part["documents"] and (split == "train" or val_fraction):
            what, advice = "1 document is", "add text, or split it into several files"
            if documents > 1:
                what = f"{documents:,} documents are"
                fraction = _workable_fraction(shards)
                advice = f"add text, or run `sota prepare` with --val-fraction {fraction}"
            text = f"{what} too few: the {split} split would be empty; {advice}"
            raise SotaError(f"{text}; skipped: {reasons}" if reasons else text, BAD_DATA)
    if val_fraction and val["tokens"] < _FEW_TOKENS:
        more, advice = min(0.5, max(2 * val_fraction, 8 / documents)), "add text"
        if more > val_fraction and documents >= 16:
            advice += f", or start over with --val-fraction {more:.2g}"
        print(f"note: validation has only {val['tokens']:,} tokens; {advice}")


def _reasons(rejects: dict[str, Any]) -> str:
    """What was skipped with an example each, and what may be done about it."""
    texts = [
        f"{entry['count']} x {reason}" + "".join(f", e.g. {at}" for at in entry["examples"][:1])
        for reason, entry in rejects.items()
    ]
    advice = [text for start, text in _ADVICE.items() if any(r.startswith(start) for r in rejects)]
    return "; ".join(texts + list(dict.fromkeys(advice)))


def _workable_fraction(shards: Path) -> str:
    """The shortest --val-fraction that puts up to eight of these documents into validation and at
    least as many into training. With so few documents it depends on their hashes.
    """
    import numpy as np

    hashes = [np.load(path, allow_pickle=False)[:, 0] for path in shards.glob("*.hashes.npy")]
    places = np.sort(np.concatenate(hashes)) / 2**64
    count = min(8, len(places) // 2)
    below, above = float(places[count - 1]), float(places[count])
    texts = (f"{math.ceil(below * 10**n) / 10**n:.{n}f}" for n in range(1, 18))
    return next((text for text in texts if below < float(text) < above), f"{above}")
