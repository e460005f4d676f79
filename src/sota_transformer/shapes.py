"""Whether a JSON value that was read has the shape its reader relies on: one check at the door.

A checksum says that a file is as somebody wrote it, not that it was us.
"""

import math
from typing import Any

_MOST = 2**64  # no number of ours is as large


def misfit(value: Any, shape: Any, at: str = "it") -> str:
    """Where `value`, which is `at`, has not the shape, in words; "" if it has.

    A shape is `int` (a count, which is not negative), `float` (any finite number), `str`, `bool` or
    None; [shape] of a list; {str: shape} of keys with any name; {"key": shape, "other?": shape} of
    these keys, where the second may be missing and nobody looks at further ones; or a tuple of
    shapes, one of which fits.
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
    return "" if _fits(value, shape) else f"{at} is {repr(value)[:40]}"


def _first(found: Any) -> str:
    """The first thing that is wrong."""
    return next(filter(None, found), "")


def _fits(value: Any, shape: Any) -> bool:
    """Whether a single value is as the shape says."""
    if shape is int:
        return type(value) is int and 0 <= value < _MOST
    if shape is float:
        return type(value) in (int, float) and abs(value) < _MOST and math.isfinite(value)
    return value is None if shape is None else type(value) is shape
