"""Validate the shape of a JSON value once, right after reading it.

A checksum proves that a file is as it was written, not that we wrote it.
"""

import math
from typing import Any

_MOST = 2**64  # larger than any number we write


def misfit(value: Any, shape: Any, at: str = "it") -> str:
    """The first place where `value`, called `at`, does not match the shape; "" if it matches.

    A shape is `int` (a count, not negative), `float` (any finite number), `str`, `bool` or None;
    [shape] for a list; {str: shape} for a dict with any keys; {"key": shape, "other?": shape} for
    these keys, where `other` is optional and further keys are ignored; or a tuple of alternatives.
    """
    if isinstance(shape, tuple):
        found = [misfit(value, one, at) for one in shape]
        return "" if "" in found else found[-1]
    if isinstance(shape, list) and isinstance(value, list):
        return _first(misfit(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value))
    if isinstance(shape, dict) and isinstance(value, dict):
        if str in shape:
            return _first(misfit(item, shape[str], f"{at}.{key}") for key, item in value.items())
        known = ((key.removesuffix("?"), key, inner) for key, inner in shape.items())
        return _first(
            misfit(value[name], inner, f"{at}.{name}") if name in value else f"{at} has no {name}"
            for name, key, inner in known
            if name in value or name == key
        )
    return "" if _fits(value, shape) else f"{at} is invalid: {repr(value)[:40]}"


def _first(found: Any) -> str:
    """The first problem found, or ""."""
    return next(filter(None, found), "")


def _fits(value: Any, shape: Any) -> bool:
    """Whether a scalar matches its shape."""
    if shape is int:
        return type(value) is int and 0 <= value < _MOST
    if shape is float:
        return type(value) in (int, float) and abs(value) < _MOST and math.isfinite(value)
    return value is None if shape is None else type(value) is shape
