"""Progress display of long commands, and the summary table of `sota prepare`."""

import sys
import time
from itertools import count, groupby
from typing import Any, Self

from sota_transformer.data.sources import REPAIRED
from sota_transformer.words import counted, printable

_PLAIN_SECONDS = 5.0
_LIVE_SECONDS = 0.1
_INPUTS = 20  # rows of the table
_SUMS = ("documents", "text_bytes", "tokens")
_HEADINGS = ("skipped:", "repaired:")
_REPAIRED = (REPAIRED, "; taken, with U+FFFD for what is broken")  # the latter in older data


class Meter:
    """A progress bar on a terminal, a plain line every few seconds elsewhere; both on stderr."""

    def __init__(self, verb: str, total: int | None) -> None:
        """`total` amount of work, None if unknown."""
        self._started = self._shown = time.monotonic()
        self._verb, self._total, self._done = verb, total, 0
        self._bar: Any = _bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task("", total=total, text="") if self._bar else None
        if self._bar:
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, size: int) -> None:
        """Record `size` more units of work as done."""
        self._done += size
        now = time.monotonic()
        if now - self._shown >= (_LIVE_SECONDS if self._bar else _PLAIN_SECONDS):
            self._shown = now
            self._show(now - self._started)

    def _show(self, seconds: float) -> None:
        text = self._text(seconds)
        if self._total and self._done:
            share = min(1.0, self._done / self._total)
            text = f"{share:5.1%}  {text}  {seconds / share - seconds:,.0f} s left"
        if self._bar:
            self._bar.update(self._task, completed=self._done, text=text)
        else:
            print(f"{self._verb}: {text}", file=sys.stderr, flush=True)

    def _text(self, seconds: float) -> str:
        """Work done after `seconds`, in tokens."""
        return f"{self._done:,} tokens ({self._done / seconds:,.0f}/s)"

    def close(self) -> float:
        """Clear the bar; seconds since the start."""
        if self._bar:
            self._bar.stop()
        return max(1e-9, time.monotonic() - self._started)


class Progress(Meter):
    """The meter of a preparation: also counts documents, bytes of text and tokens."""

    def __init__(self, total_bytes: int | None) -> None:
        """`total_bytes` of input to read, None if compressed files make it unknown."""
        super().__init__("prepare", total_bytes)
        self.documents = self.text_bytes = self.tokens = 0

    def add_unit(self, documents: int, text_bytes: int, tokens: int, read_bytes: int) -> None:
        """Record an encoded unit; `read_bytes` is its share of the input."""
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens
        self.add(read_bytes)

    def _text(self, seconds: float) -> str:
        return (
            f"{counted(self.documents, 'document')} ({self.documents / seconds:,.0f}/s)  "
            f"{self.text_bytes / 1e6:,.0f} MB ({self.text_bytes / seconds / 1e6:,.0f} MB/s)  "
            f"{self.tokens / 1e6:,.1f} M tokens"
        )


def _bar() -> Any:
    """A bar that disappears when stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), TextColumn("{task.fields[text]}"))
    return Bar(*columns, console=Console(stderr=True), transient=True)


def summary(manifest: dict[str, Any], folder: Any) -> str:
    """The prepared data as a readable table: what was used, what was skipped, and why."""
    lines = [f"{'input':<40} {'documents':>11} {'MB of text':>11} {'tokens':>13}"]
    rows = [(row["input"], *(row[key] for key in _SUMS)) for row in manifest["inputs"]]
    if rest := rows[_INPUTS:]:  # a pattern expanded by the shell may give thousands
        rows[_INPUTS:] = [(f"{len(rest):,} more", *map(sum, list(zip(*rest, strict=True))[1:]))]
    lines += [_row(*row) for row in rows]
    for split in ("train", "val"):
        lines.append(_row(f"-> {split}", *(manifest["splits"][split][key] for key in _SUMS)))
    rejects = list(manifest["rejects"].items())
    rejects.sort(key=lambda item: (item[0].endswith(_REPAIRED), -item[1]["count"]))
    for heading, entries in groupby(rejects, lambda item: _HEADINGS[item[0].endswith(_REPAIRED)]):
        lines.append(heading)
        for reason, entry in entries:
            example = f"  e.g. {_short(entry['examples'][0], 200)}" if entry["examples"] else ""
            lines.append(f"  {entry['count']:>9,}  {printable(reason)}{example}")
    lines.append(f"fingerprint {manifest['fingerprint'][:16]}  in {folder}")
    return "\n".join(lines)


def _row(name: str, documents: int, text_bytes: int, tokens: int) -> str:
    from rich.cells import set_cell_size

    name = set_cell_size(_short(name, 40), 40)
    return f"{name} {documents:>11,} {text_bytes / 1e6:>11,.2f} {tokens:>13,}"


def _short(text: str, width: int) -> str:
    """The text, cut to the end that fits into `width` columns; a Chinese character takes two."""
    from rich.cells import cell_len

    text = printable(text)
    if cell_len(text) <= width:
        return text
    end = next(at for at in count(max(0, len(text) - width)) if cell_len(text[at:]) <= width - 3)
    return f"...{text[end:]}"
