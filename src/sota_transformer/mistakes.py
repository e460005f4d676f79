"""What is wrong with a command line, in our words, and what was perhaps meant."""

import difflib
import re
from typing import Any

_OURS = (  # what tyro 1.0 says, what we say
    (r"Error parsing (\S+): invalid literal for int\(\) .*?: (.*) Argument helptext.*",
     r"\1 must be a whole number, not \2"),
    (r"Error parsing (\S+): could not convert .* float: (.*) Argument helptext.*",
     r"\1 must be a number, not \2"),
    (r"Error parsing (\S+): no type .*\|INT could .* from \[(.*)\]\. Got errors: .*",
     r"\1 must be a whole number, not \2"),
    (r"Error parsing (\S+): no type .*\|FLOAT could .* from \[(.*)\]\. Got errors: .*",
     r"\1 must be a number, not \2"),
    (r"Error parsing (\S+: .*) Argument helptext.*", r"\1"),
    (r"Error parsing \S+: (.*)", r"\1"),
    (r"invalid choice ('.*') for argument '(.*?)'\. Expected one of \((.*?)(?:, 'None')?\)\.",
     r"\2 must be one of \3, not \1"),
    (r"Missing value for argument .*?'([-.\w]+)'.*", r"\1 needs a value"),
    (r"Missing from .*?: (.*?)\.? \(required\).*", r"missing: \1"),
    (r"Unrecognized options: (.*?)(?: (?:Perhaps you meant|Arguments similar to).*)?",
     r"not understood: \1"),
)  # fmt: skip
_TITLES = r"(Value error|Invalid choice|Missing argument|Required options|Unrecognized options) "


def plain(text: str, known: list[str]) -> str:
    """What tyro says in a box, in our words; all else as it is, without title and footer."""
    text = re.sub(r" For full helptext.*", "", re.sub(_TITLES, "", text, count=1))
    text = text.replace("'None', ", "")  # a choice of ours only where nothing is chosen
    text = next(
        (found.expand(ours) for says, ours in _OURS if (found := re.fullmatch(says, text))), text
    )
    if unknown := re.match(r"not understood: (--[^\s,=]+)", text):
        text += _in_short(unknown[1], known) or nearest(unknown[1], known, 0.7)
    return text


def _in_short(flag: str, known: list[str]) -> str:
    """The option that is called so in short, as --optim.lr, --temp, --batch-size or --bs.

    By its initials, its beginning, its first word or a few of its letters, in this order.
    """
    section, _, short = flag.removeprefix("--").replace("_", "-").rpartition(".")
    if len(short) < 2:
        return ""
    letters = ".*".join(map(re.escape, short)) if len(short) < 4 else "$"
    found = list[tuple[int, bool, int]]()
    for place, option in enumerate(known):
        inside, _, name = option.removeprefix("--").rpartition(".")
        first, initials = short.split("-")[0], "".join(word[0] for word in name.split("-"))
        ways = (name == short, initials == short, name.startswith(short))
        ways += (name.startswith(f"{first}-"), bool(re.match(letters, name)))
        if any(ways):
            found.append((ways.index(True), inside != section, place))
    return f" (did you mean {known[min(found)[-1]]!r}?)" if found else ""


def nearest(word: str, known: Any, alike: float = 0.6) -> str:
    """A question that names the word spelt most alike; empty where none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=alike)
    return f" (did you mean {close[0]!r}?)" if close else ""
