"""Checkpoints: what is saved is what is loaded, and damage is reported by name."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sota_transformer import durable
from sota_transformer.errors import BAD_DATA, DIVERGED, NO_INPUT, SotaError
from sota_transformer.training import checkpoint
from sota_transformer.training.checkpoint import State


def state(step: int) -> State:
    source = torch.Generator().manual_seed(step)
    return State(
        step=step,
        model={"a.weight": torch.randn(5, 3, generator=source), "b.weight": torch.ones(4)},
        optim={"exp_avg.a.weight": torch.randn(5, 3, generator=source)},
        trainer={"updates": step, "bad_steps": 0, "skipped": 0},
        manifest={"data": "abc"},
    )


@pytest.mark.parametrize("content", [b"{", b"1", b"[" * 100_000, b"\xff"])
def test_invalid_counters_are_named(tmp_path: Path, content: bytes) -> None:
    """With matching hashes, as after editing a checkpoint by hand."""
    folder = checkpoint.path_of(tmp_path, 3)
    with durable.commit_folder(folder, {"format": checkpoint.FORMAT, "step": 3}) as writer:
        writer.write("trainer.json", content)
    with pytest.raises(SotaError, match=r"trainer\.json") as caught:
        checkpoint.load(tmp_path, 3)
    assert caught.value.code == BAD_DATA


def warn_into(lines: list[str]):
    return lines.append


def test_round_trip_is_exact(tmp_path: Path) -> None:
    saved = state(3)
    checkpoint.save(tmp_path, saved)
    loaded = checkpoint.load(tmp_path, 3)
    assert loaded.trainer == {"updates": 3, "bad_steps": 0, "skipped": 0, "step": 3}
    assert loaded.manifest["data"] == "abc"
    for name in saved.model:
        assert torch.equal(saved.model[name], loaded.model[name])
    assert torch.equal(saved.optim["exp_avg.a.weight"], loaded.optim["exp_avg.a.weight"])


def test_our_safetensors_are_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 4), "empty": torch.empty(0, 2), "n": torch.arange(5)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    with (tmp_path / "ours.safetensors").open("wb") as file:
        checkpoint.write_safetensors(file.write, tensors)
    ours, theirs = (load_file(tmp_path / f"{n}.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    # Readers that map the file need the numbers aligned, after the header.
    assert int.from_bytes((tmp_path / "ours.safetensors").read_bytes()[:8], "little") % 8 == 0
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_latest_uses_the_newest_that_verifies_and_names_the_others(tmp_path: Path) -> None:
    tmp_path /= "two\nlines"
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, state(step))
    os.utime(checkpoint.path_of(tmp_path, 9))  # the newest by time
    assert checkpoint.steps(tmp_path) == [9, 10, 100]
    path = checkpoint.path_of(tmp_path, 100) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    lines: list[str] = []
    assert checkpoint.latest(tmp_path, warn_into(lines)) == 10
    assert len(lines) == 1 and "\n" not in lines[0]
    assert "step 100" in lines[0] and "model.safetensors" in lines[0] and "sha256" in lines[0]
    with pytest.raises(SotaError, match=r"model\.safetensors") as caught:
        checkpoint.load(tmp_path, 100)
    assert caught.value.code == BAD_DATA


def test_no_checkpoint_that_verifies_is_an_error(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path, print) is None
    checkpoint.save(tmp_path, state(1))
    (checkpoint.path_of(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(SotaError) as caught:
        checkpoint.latest(tmp_path, lambda _: None)
    assert caught.value.code == BAD_DATA


def test_a_missing_step_names_the_existing_ones(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(7))
    with pytest.raises(SotaError, match="it has 7") as caught:
        checkpoint.load(tmp_path, 8)
    assert caught.value.code == NO_INPUT


def test_values_that_are_not_finite_are_never_committed(tmp_path: Path) -> None:
    bad = state(5)
    bad.optim["exp_avg.a.weight"][0, 0] = float("nan")
    with pytest.raises(SotaError, match=r"exp_avg\.a\.weight") as caught:
        checkpoint.save(tmp_path, bad)
    assert caught.value.code == DIVERGED
    assert checkpoint.steps(tmp_path) == []
    assert not list((tmp_path / "checkpoints").iterdir())


def test_prune_keeps_the_newest_and_at_least_two(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, state(step))
    checkpoint.prune(tmp_path, 3)
    assert checkpoint.steps(tmp_path) == [4, 5, 6]
    checkpoint.prune(tmp_path, 0)
    assert checkpoint.steps(tmp_path) == [5, 6]


def test_newer_formats_are_refused_by_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.save(tmp_path, state(1))
    monkeypatch.undo()
    with pytest.raises(SotaError, match="format 99"):
        checkpoint.load(tmp_path, 1)


def test_resuming_from_an_older_step_removes_later_checkpoints(tmp_path: Path) -> None:
    """With --resume step:N; a damaged checkpoint stays in place until its step is reached."""
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path, state(step))
    (checkpoint.path_of(tmp_path, 40) / "trainer.json").write_bytes(b"{}")
    assert checkpoint.latest(tmp_path, print, until=15) == 10
    checkpoint.save(tmp_path, state(15))
    assert checkpoint.steps(tmp_path) == [10, 15, 40]
    assert checkpoint.latest(tmp_path, print) == 15
