"""No damage to a committed folder goes unnoticed, crashes the reader or hangs it."""

from pathlib import Path

import pytest

from . import fuzz


def test_a_sample_of_all_damage(tmp_path: Path) -> None:
    for step in (1, 2):
        fuzz.checkpoint_like(tmp_path / f"step-{step}", step, 5000)
    result = fuzz.fuzz(
        tmp_path / "step-2", tmp_path / "step-1", fuzz.verify_notices, share=0.3, seed=1
    )
    assert result.bad == [] and result.cases > 1000


def test_the_fuzzer_detects_a_reader_that_notices_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        fuzz.checkpoint_like(tmp_path / f"step-{step}", step, 100)

    def only_sizes(folder: Path, case: str) -> bool:
        files = fuzz.durable.read_manifest(folder / "manifest.json")["files"]
        return any((folder / name).stat().st_size != files[name]["bytes"] for name in files)

    result = fuzz.fuzz(tmp_path / "step-2", tmp_path / "step-1", only_sizes, share=0.1)
    assert result.silent and result.tracebacks


@pytest.mark.chaos
def test_fifty_thousand_cases_of_damage(tmp_path: Path) -> None:
    result, _ = fuzz.run(tmp_path, 50_000)
    assert result.bad == [] and result.cases >= 50_000
