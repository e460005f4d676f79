"""`sota evaluate RUN --text`: which text of the given files is evaluated."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sota_transformer.commands.evaluate import run_evaluate
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.options import Evaluate
from tests.inference_models import FULL, small_model, write_run

TOKENIZER = Tokenizer()


@pytest.fixture
def judged(data: Path, tmp_path: Path, capsys) -> Callable[..., dict[str, Any]]:
    run = write_run(tmp_path / "run", small_model(FULL), data)

    def judged(path: Path, **options: Any) -> dict[str, Any]:
        asked = Evaluate(run=run, text=(path,), json=True, device="cpu", **options)
        assert run_evaluate(asked) == 0
        out, err = capsys.readouterr()
        return json.loads(out) | {"told": err}

    return judged


def test_text_files_context_and_stride(judged: Callable[..., Any], tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "b.txt").write_text("The ship saw the harbour. " * 20)
    (texts / "a.md").write_text("Winter followed the river.")
    (texts / "c.bin").write_bytes(b"\xff\xff")
    whole = judged(texts)
    count = sum(len(TOKENIZER.encode((texts / n).read_text())) for n in ("a.md", "b.txt"))
    assert whole["tokens"] == count and whole["files"] == 2
    sliding = judged(texts, context=16, stride=4)
    assert sliding["tokens"] == count
    assert sliding["sequences"] > whole["sequences"]
    assert judged(texts, tokens=10)["tokens"] == 10


def test_lines_of_end_of_text_divide_a_text(judged: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The ship.\n<|endoftext|>\nWinter <|endoftext|> came.\n")
    told = judged(tmp_path / "a.txt")
    parts = ("The ship.", "Winter <|endoftext|> came.")
    assert told["tokens"] == sum(len(TOKENIZER.encode(part)) for part in parts)
    assert told["files"] == 1


def test_records_are_judged_by_their_text(
    judged: Callable[..., Any], tmp_path: Path, monkeypatch
) -> None:
    """Without the braces and field names, which would count in a text file."""
    one, two = "The ship saw the harbour.", "Winter followed the river."
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(one)
    (texts / "b.txt").write_text(two)
    expected = judged(texts)
    lines = [json.dumps({"text": one}), '{"other": 1}', json.dumps({"id": 7, "text": two})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text(f"id,text\n1,{one}\n2,{two}\n")
    skipped = "1 item; the first is a.jsonl: byte 38 (has 'other'):"
    for name, told in (("a.jsonl", skipped), ("a.csv", "")):
        found = judged(tmp_path / name)
        assert found["nats"] == pytest.approx(expected["nats"]), name
        assert (found["tokens"], found["sequences"]) == (expected["tokens"], 2)
        assert told in found["told"] and bool(found["told"]) == bool(told)
    for piped in (one, lines[0]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
        assert judged(Path("-"))["tokens"] == len(TOKENIZER.encode(one))
    for bad, told in ((b"\xff", "stdin is neither"), (b"", "-: no token"), (b'{"a": 1}', "-: no")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bad)))
        with pytest.raises(SotaError, match=f"^{told}"):
            judged(Path("-"))
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(SotaError, match="unpack it first"):
        judged(tmp_path / "a.txt.gz")
