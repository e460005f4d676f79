"""Formatting shared by several commands."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

CONTROL = (*range(32), *range(127, 160))  # characters that may steer a terminal


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 step`, `2,000 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_shell(path: Path | str) -> str:
    """A path quoted for a command that a user may copy: `rm -r my data` would remove two others."""
    return shlex.quote(str(path))


def one_line(text: str) -> str:
    """The text on one line, safe for a terminal: even a file's name may contain anything."""
    return _masked(" ".join(line for line in map(str.strip, text.splitlines()) if line), keep="\t")


def printable(text: str, *, keep: str = "") -> str:
    """Untrusted text made safe to print: a control character, unless it is in `keep`, or a lone
    surrogate becomes a question mark.
    """
    return _masked(text.encode("utf-8", "replace").decode(), keep)


def _masked(text: str, keep: str) -> str:
    return text.translate(dict.fromkeys(set(CONTROL) - set(map(ord, keep)), "?"))


def two_digits(ratio: float) -> str:
    """A ratio with one decimal place, or with two digits below 1."""
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2g}"


def perplexity(value: float | None) -> str:
    """A perplexity of any size; None is one that JSON cannot represent."""
    if value is None:
        return "inf"
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


def json_line(value: Any) -> str:
    """`value` as JSON, with null for NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
