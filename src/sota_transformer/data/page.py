"""The HTML page of `sota data --html`, and the parts that `sota report` shares with it.

A page is one self-contained file that loads nothing.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sota_transformer.data.guards import CREATE
from sota_transformer.durable import write_file
from sota_transformer.errors import LOCKED, SotaError

_LONG = 70  # characters; the line of a validation is shorter
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h1, h2, p { overflow-wrap: anywhere; } h2, .legend { break-after: avoid; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #8888; }
.text { text-align: left; overflow-wrap: anywhere; min-width: 12rem; }
pre { white-space: pre-wrap; border-left: 3px solid #8888; padding-left: 1rem; }
pre { unicode-bidi: plaintext; }  /* each line in its script's own direction */
.bar { height: 1rem; background: #4a7fb5; print-color-adjust: exact; }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5; }
circle { fill: currentColor; } polygon { fill: #8883; } .grid { stroke: #8884; }
.legend span { display: inline-block; margin-right: 1.5rem; }
text { font-size: 11px; fill: currentColor; }
.wide { overflow-x: auto; }
@media screen { .wide svg { min-width: 44rem; } }
"""


def page(
    folder: Path,
    manifest: dict[str, Any],
    figures: dict[str, Any],
    samples: list[tuple[str, int, str]],
) -> str:
    """HTML page of a prepared folder: tables, length histograms, skipped inputs, samples."""
    splits = {name: part for name, part in figures.items() if name != "leakage"}
    sides = [
        (
            split,
            f"{part['documents']:,}",
            f"{part['tokens']:,}",
            f"{part['text_bytes'] / 1e6:,.2f}",
            f"{part.get('bytes_per_token', 0):.2f}",
        )
        for split, part in splits.items()
    ]
    inputs = [
        (row["input"], f"{row['files']:,}", f"{row['documents']:,}", f"{row['tokens']:,}")
        for row in manifest["inputs"]
    ]
    rejects = [
        (reason, f"{entry['count']:,}", "; ".join(entry["examples"])[:300])
        for reason, entry in manifest["rejects"].items()
    ]
    body = [
        f"<h1>{escape(str(folder))}</h1>",
        f"<p>Fingerprint <code>{manifest['fingerprint']}</code></p>",
        table(("split", "documents", "tokens", "MB of text", "bytes per token"), sides),
    ]
    if "leakage" in figures:
        share = figures["leakage"]
        body.append(f"<p>{share:.3%} of validation's 13-grams also occur in training.</p>")
    for split, part in splits.items():
        if part["tokens"]:
            body.append(f"<h2>{split}: documents by length in tokens</h2>")
            body.append(_histogram(part["length_histogram"]))
            scripts = ", ".join(f"{name} {share:.1%}" for name, share in part["scripts"].items())
            body.append(f"<p>Letters by script: {escape(scripts) or 'no letters'}</p>")
    body.append(section("Inputs", ("input", "files", "documents", "tokens"), inputs))
    body.append(section("Skipped", ("reason", "count", "examples"), rejects))
    for split, number, text in samples:
        body.append(f"<h2>{split} document {number:,}</h2><pre>{escape(text[:3000])}</pre>")
    return document(f"Data: {folder}", body)


def document(title: str, body: list[str]) -> str:
    """A complete page; `body` holds parts that are already HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """An HTML table of plain-text cells; a column with a long one reads as text, not as numbers."""
    texts = [max(map(len, cells)) > _LONG for cells in zip(head, *rows, strict=True)]
    kinds = [' class="text"' if text else "" for text in texts]

    def line(tag: str, cells: tuple[str, ...]) -> str:
        inner = (f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    inner = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{inner}</table></div>'


def section(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A heading and its table; "" if there are no rows."""
    return f"<h2>{title}</h2>{table(head, rows)}" if rows else ""


def _histogram(bars: list[list[int]]) -> str:
    """One bar per length bucket; the lower edges double from one to the next."""
    most = max(count for _, count in bars)
    rows = (
        f'<tr><td>{edge:,}+</td><td>{count:,}</td><td><div class="bar" '
        f'style="width:{30 * count / most:.2f}rem"></div></td></tr>'
        for edge, count in bars
    )
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def save(path: Path, text: str, option: str) -> None:
    """Write a page. SotaError 73, naming the option for `path`, if the file cannot be created."""
    data = text.encode(errors="replace")  # file names in it may hold any bytes
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(data)  # write to /dev/null or /dev/stdout, do not replace it
        else:
            write_file(path, data)
    except OSError as error:
        if error.errno not in CREATE:
            raise
        text = f"cannot create {path}: {error.strerror}"
        raise SotaError(f"{text}; give {option} a file in an existing folder", LOCKED) from error
