"""Mistakes on the command line: one line that says what is wrong, with advice that works."""

from pathlib import Path
from typing import Any

import pytest

from sota_transformer import cli
from sota_transformer.options import Prepare
from tests.inference_models import small_model, write_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, a model, prepared data without its manifest, and links that lead nowhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("lost/train-00000.npy", "model/tokenizer_config.json", "model/config.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    write_run(tmp_path / "run", small_model())
    Path("loop").symlink_to("loop")
    Path("gone").symlink_to("/not/there")
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train tiny --data loop", "loop is a link to loop, which is no folder; check the link"),
        ("data gone", "gone is a link to /not/there, which is no folder; check the link"),
        ("merge loop", "no parts of "),
        ("generate run --file run", "run: not a regular file"),
        ("evaluate run --lambada run", "run: not a regular file"),
        ("generate run --n 3", "generate: unrecognized arguments: --n, 3; `sota gen"),
        ("data lost", "lost has no manifest.json, so it is not prepared data; move lost away"),
        ("report model", "model is a model, not a run; give a folder made by `sota train`"),
        ("generate run --runs 3", "generate: unrecognized arguments: --runs, 3; `sota gen"),
        ("generate run seed=2", "generate: unrecognized arguments: seed=2; `sota gen"),
        ("train tiny --hours 3", "train tiny: unrecognized arguments: --hours, 3; `sota train"),
        ("config tiny --model.width 9", "config tiny: unrecognized arguments: --model.width, 9; `"),
        ("train --steps 5", "name a preset first: "),
        ("train large", "unknown preset 'large'; presets: tiny"),
        ("zebra", "unknown command 'zebra'; `sota"),
        ("config tiny --recipe= fast", "--recipe needs a value: seed or fast"),
        ("config tiny --override steps=", "--override needs FIELD=VALUE"),
        ("config tiny --override =5", "--override needs FIELD=VALUE"),
        ("data run", "run has no manifest.json, so it is not prepared data; give a folder created"),
        ("data a\x1b[2J\x9bb", "a?[2J?b: no such folder"),  # as a name may steer the terminal
    ],
)
def test_a_mistake_is_answered_with_what_helps(
    capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    assert cli.main(command.split()) in (2, 65, 66)
    err = capsys.readouterr().err
    assert err.startswith(f"sota: {said}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"near_dedup": 0.5}, ""),
        ({"near_dedup": 1.0}, ""),
        ({"near_dedup": 0.49}, "prepare.near_dedup 0.49 "),
        ({"near_dedup": 1.01}, "prepare.near_dedup 1.01 "),
        ({"val_fraction": 0.0}, ""),
        ({"val_fraction": 1.0}, "prepare.val_fraction 1.0 "),
        ({"val_fraction": -0.1}, "prepare.val_fraction -0.1 "),
        ({"memory_mb": -1}, "prepare.memory_mb -1 "),
        ({"part": "1/1"}, ""),
        ({"part": "3/3"}, ""),
        ({"part": "0/3"}, "prepare.part '0/3' "),
        ({"part": "4/3"}, "prepare.part '4/3' "),
        ({"part": "1"}, "prepare.part '1' "),
        ({"part": "x/3"}, "prepare.part 'x/3' "),
        ({"part": "1/3x"}, "prepare.part '1/3x' "),
        ({"inputs": ("-",)}, ""),
        ({"inputs": ("a.txt", "-"), "part": "1/3"}, "--part needs files"),
        ({"out": Path()}, "prepare needs --out"),
    ],
)
def test_what_prepare_accepts_ends_where_its_options_say(
    options: dict[str, Any], said: str
) -> None:
    found = Prepare(**{"inputs": ("a.txt",), "out": Path("out")} | options).problems()
    assert len(found) == bool(said) and all(line.startswith(said) for line in found)
