"""The figures, samples and page of `sota data` for documents that are known."""

import json
import os
import re
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sota_transformer.data.page import page, save
from sota_transformer.data.shards import load_manifest
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.data.view import describe
from sota_transformer.errors import SotaError
from sota_transformer.options import DataView

LETTERS = {
    "Latin": "a", "Cyrillic": "ж", "Greek": "λ", "Hebrew": "א", "Arabic": "ب", "Thai": "ก",
    "Devanagari": "क", "Hangul": "한", "Hiragana": "あ", "Georgian": "ა",
}  # fmt: skip


def write(folder: Path, *texts: list[int] | str) -> None:
    """A nanoGPT file of these documents."""
    encode = Tokenizer().encode
    ids = [encode(text) if isinstance(text, str) else text for text in texts]
    flat = list(chain.from_iterable([*one, EOT] for one in ids))
    np.array(flat, "<u2").tofile(folder / "train.bin")


def test_lengths_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [17] * 40 + [9] * 49 + [700] + [40] * 5 + [50] * 5 + [3]
    write(tmp_path, *([64] * length for length in lengths))
    figures = describe(DataView(folder=tmp_path, show=2, leakage=True))
    bars = [(2, 1, 1), (4, 0, 0), (8, 49, 40), (16, 40, 33), (32, 10, 9), (64, 0, 0)]
    bars += [(128, 0, 0), (256, 0, 0), (512, 1, 1)]
    assert figures["train"]["length_quantiles"] == [3, 9, 17, 40, 700]
    assert figures["train"]["length_histogram"] == [[edge, count] for edge, count, _ in bars]
    said = capsys.readouterr().out
    assert figures["leakage"] == 0 and "\nleakage: 0.000% of" in said, "nothing to leak from"
    for edge, count, width in bars:
        assert f"\n  {edge:>10}+ {count:>10} {'#' * width}\n" in said
    assert "\nval: empty\n" in said
    assert "--- train document 25\naaaaaaaaaaaaaaaaa\n--- train document 75\naaaaaaaaa\n" in said
    describe(DataView(folder=tmp_path, show=1000))
    assert capsys.readouterr().out.count("--- train document ") == len(lengths)


def test_documents_without_a_token(tmp_path: Path) -> None:
    write(tmp_path, [], [])
    figures = describe(DataView(folder=tmp_path))["train"]
    assert (figures["documents"], figures["length_quantiles"]) == (2, [0] * 5)
    assert figures["scripts"] == {}


def test_a_character_that_an_excerpt_cuts_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Chinese one takes two or three tokens; U+FFFD would look like damage of the text."""
    text, tokenizer = "鬱蒼竹藪。" * 300, Tokenizer()
    assert "\ufffd" in tokenizer.decode(tokenizer.encode(text)[:16])
    write(tmp_path, text)
    describe(DataView(folder=tmp_path, list_split="train"))
    shown = json.loads(capsys.readouterr().out)["text"]
    assert len(shown) > 4 and text.startswith(shown)
    describe(DataView(folder=tmp_path, html=tmp_path / "page.html"))
    assert "竹藪" in (page := (tmp_path / "page.html").read_text()) and "\ufffd" not in page


def test_line_ends_of_windows_are_line_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "ein\r\nzwei\rdrei")
    for options in ({}, {"window": "train:0:6"}):
        describe(DataView(folder=tmp_path, **options))
        assert "ein\nzwei?" in capsys.readouterr().out


def test_a_text_without_letters_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "12 34, 5.6 😀")
    describe(DataView(folder=tmp_path))
    assert "letters by script: no letters\n" in capsys.readouterr().out
    describe(DataView(folder=tmp_path, html=tmp_path / "page.html"))
    assert "<p>Letters by script: no letters</p>" in (tmp_path / "page.html").read_text()


def test_the_side_of_a_file_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Even of a file of a single id, which is no 32-bit one."""
    np.array([64], "<u2").tofile(tmp_path / "train.bin")
    before = load_manifest(tmp_path)
    (tmp_path / "train.bin").rename(tmp_path / "val.bin")
    after = load_manifest(tmp_path)
    assert before["splits"]["train"]["tokens"] == after["splits"]["val"]["tokens"] == 1
    assert before["fingerprint"] != after["fingerprint"]


def test_scripts_of_all_documents(tmp_path: Path) -> None:
    """The rarest are counted together; many documents are sampled from all places."""
    write(tmp_path, "".join(letter * (10 - i) for i, letter in enumerate(LETTERS.values())))
    found = describe(DataView(folder=tmp_path, show=0))["train"]["scripts"]
    shares = {name: (10 - i) / 55 for i, name in enumerate(LETTERS)}
    assert list(found.items()) == [*list(shares.items())[:8], ("others", 3 / 55)]
    write(tmp_path, *(["a"] * 600), *(["ж"] * 600))
    found = describe(DataView(folder=tmp_path, show=0))["train"]["scripts"]
    assert found == {"Latin": 0.5, "Cyrillic": 0.5}


def test_the_list_of_documents_is_json_that_is_safe_to_look_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\x1b[31m \x9b2J \x7f 日本" + " word" * 30
    write(tmp_path, text, "b")
    describe(DataView(folder=tmp_path, list_split="train"))
    out = capsys.readouterr().out
    ids = Tokenizer().encode(text)
    first = {"document": 0, "tokens": len(ids), "text": Tokenizer().decode(ids[:16])}
    assert [json.loads(line) for line in out.splitlines()] == [
        first, {"document": 1, "tokens": 1, "text": "b"}
    ]  # fmt: skip
    assert "日本 word" in out and not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f]", out)


def test_windows_are_counted_from_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 512 tokens, if nothing else is asked for."""
    write(tmp_path, [64] * 400, [65] * 700)
    for asked, shown in {
        "train:0": "a" * 400 + "\n--- end of text ---\n" + "b" * 112,
        "train:1": "b" * 513,
        "train:1:1000": None,
        "train:2": None,
    }.items():
        if shown:
            describe(DataView(folder=tmp_path, window=asked))
            assert capsys.readouterr().out == shown + "\n"
        else:
            with pytest.raises(SotaError, match="out of range") as caught:
                describe(DataView(folder=tmp_path, window=asked))
            assert caught.value.code == 2


def test_a_page_shows_everything_as_text(tmp_path: Path) -> None:
    """Whatever the documents, files and reasons contain."""
    evil = "<script>alert('1')</script>&amp;"
    counts = {"documents": 1234, "tokens": 56789, "text_bytes": 3_210_000}
    part: dict[str, Any] = counts | {
        "bytes_per_token": 3.25, "length_histogram": [[1, 5], [2, 0], [4, 20]],
        "scripts": {"Latin": 0.75, evil: 0.25},
    }  # fmt: skip
    manifest = {
        "fingerprint": "f" * 64,
        "inputs": [{"input": evil + "1", "files": 7, **counts}],
        "rejects": {evil + "2": {"count": 3000, "examples": [evil + "3", "x" * 400]}},
    }
    figures = {"train": part, "val": dict.fromkeys(counts, 0), "leakage": 0.12345}
    samples = [("train", 1000, evil + "4" + "y" * 4000)]
    found, tags = list[str](), list[str]()

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            found.extend(value or "" for name, value in attrs if name == "style")

    Reader().feed(page(tmp_path / evil, manifest, figures, samples))
    assert "script" not in tags and tags.count("h2") == 4
    assert [found.count(str(tmp_path / evil)), found.count(f"Data: {tmp_path / evil}")] == [1, 1]
    cells = ["train", "1,234", "56,789", "3.21", "3.25", "val", "0", "0", "0.00", "0.00"]
    at = found.index("bytes per token") + 1
    assert found[at : at + len(cells)] == cells
    for text in (
        "12.345% of validation's 13-grams also occur in training.",
        f"Letters by script: Latin 75.0%, {evil} 25.0%", evil + "1", evil + "2", "3,000",
        f"{evil}3; {'x' * 400}"[:300], "train document 1,000", samples[0][2][:3000],
        "width:7.50rem", "width:0.00rem", "width:30.00rem",
    ):  # fmt: skip
        assert text in found, text
    bare = {"fingerprint": "", "inputs": [], "rejects": {}}
    assert not re.search("Inputs|Skipped", page(tmp_path, bare, figures, []))


def test_a_page_is_written_where_a_link_or_a_pipe_leads(tmp_path: Path) -> None:
    """For example to /dev/stdout, which must not become a file."""
    (link := tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("of before")
    save(link, "the page", "--html")
    assert link.is_symlink() and (tmp_path / "file").read_text() == "the page"
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save(pipe, "the page", "--html")
    assert os.read(reader, 100) == b"the page"
    os.close(reader)
