"""Where two features meet: the output of one command is valid input of the next."""

import dataclasses
import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sota_transformer import plan
from sota_transformer.cli import main
from sota_transformer.commands.transfer import _write_run
from sota_transformer.config import GPT2_VOCAB, Run
from sota_transformer.errors import SotaError
from sota_transformer.inference.layout import huggingface_config, own_config
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.training.runlog import RunLog
from tests.inference_models import write_run

NUMBERS = ("loss", "smoothed_loss", "lr", "gradient_norm", "tokens_per_second", "memory")
SMALL = dataclasses.replace(PRESETS["tiny"]().model, layers=1, d_model=32, d_ff=32, seq_len=16)


def test_a_plan_for_hours_includes_the_requested_preset(monkeypatch, capsys) -> None:
    """`tiny` was measured and then left out, so nothing fitted although it did."""
    speed = plan.Speed(seconds=1.0, tokens=512, memory=1)
    monkeypatch.setattr(plan, "measure", lambda _: speed)
    assert main(["plan", "tiny", "--hours", "0.01"]) == 0
    assert capsys.readouterr().out.endswith("best: sota train tiny --steps 36\n")


def test_the_config_counts_tokens_as_the_plan_does(monkeypatch, capsys, data) -> None:
    asked = ["tiny", "--data", str(data), "--data.windows", "best-fit"]
    monkeypatch.setattr(plan, "step_seconds", lambda *_: (2.0, 1.0))
    assert main(["plan", *asked]) == 0
    (planned,) = re.findall("^run: .*", capsys.readouterr().out, re.M)
    assert main(["config", *asked]) == 0
    assert f"# {planned}\n" in capsys.readouterr().out
    assert main(["config", *asked[:2], "elsewhere", *asked[3:]]) == 0


def folder_of(path: Path, vocab_size: int) -> Path:
    """An exported model with a vocabulary of this size."""
    model = Transformer(dataclasses.replace(SMALL, vocab_size=vocab_size)).eval()
    run = str(write_run(path / "run", model))
    assert main(["export", run, "--out", str(path / "model")]) == 0
    return path / "model"


def test_an_import_prints_no_command_that_is_refused(tmp_path: Path, data, capsys) -> None:
    folder, out = folder_of(tmp_path, GPT2_VOCAB), tmp_path / "imported"
    asked = ["import", str(folder), "--out", str(out)]
    assert main([*asked, "--data", str(data)]) == 2
    assert "50,257 token ids and prepared data has 50,258" in capsys.readouterr().err
    assert not out.exists()
    assert main(asked) == 0


def test_an_import_keeps_the_recipe_of_a_run(tmp_path: Path, data, capsys) -> None:
    """With the other one it learned half a nat less of a small text than `fast` did."""
    kept = dataclasses.replace(PRESETS["tiny"]("fast"), run=Run(out=tmp_path / "run"))
    _write_run(kept, Transformer(kept.model))
    asked = ["import", str(kept.run.out), "--out", str(tmp_path / "on"), "--data", str(data)]
    assert main(asked) == 0
    assert "further:  sota train tiny --recipe fast --data.path=" in capsys.readouterr().out


def test_an_import_that_was_killed_can_be_given_again(tmp_path: Path, capsys) -> None:
    """Killed before config.json, it left a folder that was no run and that it then refused."""
    folder, out = folder_of(tmp_path, GPT2_VOCAB), tmp_path / "imported"
    asked = ["import", str(folder), "--out", str(out)]
    assert main(asked) == 0
    whole = {path: path.read_bytes() for path in out.rglob("[!.]*") if path.is_file()}
    (out / "config.json").rename(out / ".tmp-config.json-0123abcd")
    (out / "checkpoints/.tmp-step-00000000-0123abcd").mkdir()
    assert main(asked) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == {
        **whole,
        out / ".lock": (out / ".lock").read_bytes(),
    }
    (out / "checkpoints/step-00000000").rename(out / "checkpoints/step-00000007")
    (out / "config.json").unlink()
    assert main(asked) == 2  # the checkpoint of another run
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_no_name_that_cannot_be(
    monkeypatch, capsys, tmp_path: Path, data: Path, number: int
) -> None:
    """Creating the run's folder failed with 73 whatever the reason was."""
    made = Path.mkdir

    def failing(path: Path, *rest: Any, **more: Any) -> None:
        if path.name == "new":
            raise OSError(number, os.strerror(number), str(path))
        made(path, *rest, **more)

    model = write_run(tmp_path / "other", Transformer(SMALL).eval())
    monkeypatch.setattr(Path, "mkdir", failing)
    for words in (["train", "tiny", "--data", data], ["import", model]):
        code = main([str(word) for word in (*words, "--out", tmp_path / "new")])
        err = capsys.readouterr().err
        assert code == (74 if number == errno.ENOSPC else 73), err
        assert os.strerror(number) in err and "choose another --out" in err


@pytest.mark.parametrize(
    ("place", "error", "code", "said"),
    [
        ("training.judge.Judge.validate", RuntimeError("MPS backend out of memory"), 75, "memory"),
        ("durable.write_file", PermissionError(errno.EACCES, "no", "run.json"), 74, "run.json: no"),
    ],
    ids=["out of memory outside a step", "a run that may not be written"],
)
def test_what_ends_training_is_one_line(
    monkeypatch, capsys, data: Path, tmp_path: Path, place: str, error: Exception, code: int,
    said: str,
) -> None:  # fmt: skip
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(f"sota_transformer.{place}", failing)
    words = ["train", "tiny", "--data", data, "--out", tmp_path / "run", "--steps", "1"]
    assert main([*map(str, words), "--device", "cpu"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sota: ") and said in line


def test_the_card_of_an_imported_model_does_not_say_how_it_was_trained(
    tmp_path: Path, capsys
) -> None:
    folder, out = folder_of(tmp_path, GPT2_VOCAB + 1), tmp_path / "imported"
    assert main(["import", str(folder), "--out", str(out)]) == 0
    assert main(["export", str(out), "--out", str(tmp_path / "again")]) == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "scratch" not in card and "Trained for" not in card
    assert "Trained for" in (folder / "README.md").read_text()
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()


def test_an_untied_head_is_refused_once() -> None:
    values = huggingface_config(SMALL, "float32") | {"tie_word_embeddings": False}
    with pytest.raises(Exception, match="needs tied embeddings") as caught:
        own_config(values)
    assert str(caught.value).count("tie_word_embeddings") == 1


def strict(text: str) -> dict:
    """Parse like a program whose JSON has no NaN or Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_values_that_are_not_finite_are_valid_json(tmp_path: Path, capsys) -> None:
    """And the perplexity of a broken model does not have three hundred digits."""
    model = Transformer(SMALL).eval()
    with torch.no_grad():
        model.norm.weight.mul_(1e6)
    run = write_run(tmp_path / "run", model)
    (tmp_path / "text.txt").write_text("The captain saw the ship.")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    assert strict(capsys.readouterr().out)["perplexity"] is None
    with RunLog(run, 3) as log:
        log.step({name: math.nan for name in NUMBERS} | {"step": 3, "seconds_left": 0.0})
        for step, nats in ((2, 600.0), (3, 800.0)):
            value = math.exp(nats) if nats < 700 else math.inf
            figures = {"val_loss": nats, "val_error": 0.1, "val_perplexity": value}
            log.validation({"step": step, **figures, "val_bits_per_byte": 9.0, "val_tokens": 9})
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["loss"], lines[2]["val_perplexity"]) == (None, None)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "perplexity 3.77e+260," in page and "perplexity inf," in page
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "| 800.0000 | inf |" in (tmp_path / "out" / "README.md").read_text()


def test_a_refused_model_is_named_by_its_family() -> None:
    values = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}
    with pytest.raises(SotaError, match=r"unsupported model: model_type 'gpt2' \(needs 'llama'"):
        own_config(values)
