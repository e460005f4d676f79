"""Which texts of a file given to `--exclude` count, by brute force, and what is refused there."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sota_transformer.data.encode import EXCLUDE_GRAM
from sota_transformer.data.exclude import write_excluded
from sota_transformer.data.grams import gram_hashes
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import BAD_DATA, NO_INPUT, USAGE, SotaError

TOKENIZER = Tokenizer()
TEXTS = [" ".join(f"w{text * 1000 + n}" for n in range(40)) for text in range(5)]


def test_of_an_excluded_record_its_text_counts_or_else_all_strings_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"text": TEXTS[0], "answer": TEXTS[1]}, {"text": 1, "all": [3, {"of": TEXTS[2]}]}]
    lines = [*map(json.dumps, records), "", " ", json.dumps([TEXTS[3]]), json.dumps(TEXTS[4])]
    lines.append('["\u2028"]')  # no end of a line in JSON
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    write_excluded((str(tmp_path / "eval.jsonl"),), "text", tmp_path / "grams.npy")
    assert capsys.readouterr().out.startswith("note: 1 excluded text is shorter")
    ids = [TOKENIZER.encode(TEXTS[i]) for i in (0, 2, 3, 4)]
    runs = {tuple(one[i : i + EXCLUDE_GRAM]) for one in ids for i in range(len(one))}
    runs = sorted(run for run in runs if len(run) == EXCLUDE_GRAM)
    expected = [gram_hashes(np.array(run, np.uint16), EXCLUDE_GRAM)[0] for run in runs]
    assert np.load(tmp_path / "grams.npy").tolist() == sorted(expected)


def test_what_excludes_nothing_is_refused_and_what_is_too_short_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def excluded(content: str | bytes, name: str = "x.jsonl") -> int:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        try:
            write_excluded((str(path),), "text", tmp_path / "grams.npy")
        except SotaError as error:
            said.append(str(error))
            assert said[-1].startswith("--exclude") and name in said[-1] and "\n" not in said[-1]
            return error.code
        return 0

    long = TEXTS[0]
    short = TOKENIZER.decode(TOKENIZER.encode(long)[: EXCLUDE_GRAM - 1])
    just = TOKENIZER.decode(TOKENIZER.encode(long)[:EXCLUDE_GRAM])
    assert excluded("\n \n") == excluded('{"a": 1}') == BAD_DATA
    assert [excluded(text, "x.txt") for text in (short, "", just)] == [BAD_DATA, NO_INPUT, 0]
    for line in ("{", "[" * 100_000, "not JSON"):
        assert excluded(f"{json.dumps(long)}\n{line}\n") == BAD_DATA
        assert "x.jsonl:2:" in said[-1]  # the line
    assert excluded(gzip.compress(json.dumps(long).encode()), "x.jsonl.gz") == USAGE
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as file:
        file.writestr("a.txt", long)
    assert excluded(archive.getvalue(), "x.zip") == USAGE
    assert excluded(b'"caf\xe9 ' + long.encode() + b'"') == 0
    capsys.readouterr()
    assert excluded("\n".join(map(json.dumps, [short, long, short, just]))) == 0
    assert capsys.readouterr().out.startswith("note: 2 excluded texts are shorter than 13 tokens")
