"""Mistakes on the command line: one line that says what is wrong, with advice that works."""

from pathlib import Path

import pytest

from sota_transformer import cli
from tests.inference_models import small_model, write_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run and links that lead nowhere."""
    monkeypatch.chdir(tmp_path)
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
