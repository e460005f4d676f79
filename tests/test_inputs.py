"""Which of the files that inputs name are taken, and what is said of those that are not."""

import os
from pathlib import Path

import pytest

from sota_transformer.data.sources import find
from sota_transformer.errors import SotaError

RUN = ("config.json", "run.json", "metrics.jsonl", "samples.txt")
MODEL = ("tokenizer_config.json", "merges.txt", "README.md")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one text, a run, a model, and what is hidden."""
    made = [f"runs/mine/{name}" for name in RUN] + [f"models/m/{name}" for name in MODEL]
    for name in (*made, "a.txt", ".b.txt", ".git/c.txt", "x/__pycache__/d.txt", "x/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*inputs: str) -> tuple[list[str], set[str]]:
    """Paths that are taken, and the reasons for what is not."""
    sources, skipped = find(inputs)
    return [source.path for source in sources], {item.reason.split(",")[0] for item in skipped}


@pytest.mark.parametrize("given", ["runs/mine", "runs/*", "models/m", "models/m/*", "./runs/mine/"])
def test_a_run_or_a_model_is_no_text_however_it_is_named(here: Path, given: str) -> None:
    with pytest.raises(SotaError, match=r"m(ine)?(/\S+)?: a (run|model), whose"):
        find((given,))
    assert found(given, "a.txt") == (["a.txt"], {"a run" if "runs" in given else "a model"})
    assert found("runs/mine/samples.txt")[0] == ["runs/mine/samples.txt"]


def test_a_glob_takes_what_a_folder_walk_takes(here: Path) -> None:
    """Unless the pattern itself says hidden."""
    expected = (["a.txt", "x/e.txt"], {"a run", "a model", "hidden"})
    assert found("**/*.txt") == found("*") == expected
    assert sorted(os.path.relpath(path) for path in found(str(here))[0]) == expected[0]
    assert found(".git/*.txt")[0] == [".git/c.txt"]
