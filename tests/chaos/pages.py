"""Random HTML pages for `inputs`, and their text.

The expected text comes from a plain call of resiliparse, as tables are read with pyarrow; that an
article's text is present, and no script's, is checked against the words put in.
"""

import random
import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

DEEP = 6000  # nested elements: a generated page, whose menus cannot be told apart
KEPT, GONE = "kept{:x}", "gone{:x}"
_ODD = [
    "&nbsp;", "&amp;lt;", "&#0;", "&#xD800;", "&#128;", "&bogus;", "&lt;|endoftext|&gt;", "<", "</",
    "a < b", "<br>", "<br/>", "<b>bold", "</b>", "<!--", "<!-- gone -->", "<![CDATA[x]]>",
    "&#x1F600;", "<?php ?>", "<img alt='gone'>", "<pre>\n a\n\tb</pre>", "<p hidden>",
    "<table><tr><td>1<td>2", "<ul><li>one<li>two</ul>", "\x0c", "\x85", "\ufeff", "<p",
    "<svg><text>s</text></svg>", "<textarea>", "<title>", "<plaintext>", "<template>",
    "<math><mi>x", "<select><option>o",
]  # fmt: skip


def page(source: random.Random, texts: list[str]) -> bytes:
    """A page around some texts, as a person, a program or an old server produces it."""
    way, mark = source.random(), source.getrandbits(40)
    if way < 0.1:  # not a real page
        parts = [*texts[:5], *source.choices(_ODD, k=source.randint(0, 30))]
        return _coded(source, "".join(source.sample(parts, len(parts))))
    if way < 0.16:
        empty = ["<html></html>", "<!-- x -->", "<script>x</script>", "<p>&nbsp;</p>", " ", "<p> "]
        return _coded(source, source.choice(empty))
    if way < 0.2:
        deep = source.choice([200, DEEP])
        return f"{'<div>' * deep}deep {mark:x}{'</div>' * source.choice([0, deep])}".encode()
    good = " ".join([KEPT.format(mark), "and so on, as people write it, sentence by sentence."] * 9)
    tag = source.choice(["p", "p", "div", "P", "blockquote"])
    body = "".join(f"<{tag}>{text}</{tag}>\n" for text in texts[: source.choice([1, 3, 60])])
    odd = source.choice(_ODD[:10]) if source.random() < 0.3 else ""
    head = source.choice(["<!DOCTYPE html>", "<?xml version='1.0'?>\n<!DOCTYPE html>", ""])
    line = source.choice(["\n", "\r\n", ""])
    whole = line.join([
        f"{head}<html><head><meta charset=utf-8><title>A title</title>",
        f"<script>if (a < b) {{ {GONE.format(mark)}() }}</script>",
        f"<style>.{GONE.format(mark)} {{ }}</style></head><body>",
        "<nav><ul><li><a href=/>Home</a><li><a href=/b>More</a></ul></nav>",
        f"<article><h1>It says</h1><p>{good}</p>{body}{odd}</article>",
        "<footer>(c) somebody</footer></body></html>",
    ])  # fmt: skip
    return _coded(source, whole)


def _coded(source: random.Random, text: str) -> bytes:
    """In UTF-8, in UTF-16 with a byte order mark, or in an old server's encoding."""
    if (way := source.random()) < 0.08:
        return text.encode("utf-16")
    if way < 0.16:
        return text.replace("charset=utf-8", "charset=iso-8859-1").encode("latin-1", "replace")
    return (b"\xef\xbb\xbf" if way < 0.24 else b"") + text.encode()


def text_of(data: bytes) -> str | bytes:
    """The text of a page in UTF-8; other encodings are returned unchanged."""
    try:
        tree, deep = HTMLTree.parse(data.decode()), data.count(b"<div>") >= DEEP
    except UnicodeDecodeError:
        return data
    text = "" if deep else extract_plain_text(tree, main_content=True)
    text = text or extract_plain_text(tree)
    for mark in re.findall(rb"<p>kept([0-9a-f]+)", data):
        assert KEPT.format(int(mark, 16)) in text, f"resiliparse lost the article {mark!r}"
        assert GONE.format(int(mark, 16)) not in text, f"resiliparse took the script of {mark!r}"
    return text
