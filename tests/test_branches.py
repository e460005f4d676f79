"""Where two histories of a run meet: what the abandoned one may leave behind, and what not."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sota_transformer.config import VOCAB
from sota_transformer.data.prepare import prepare
from sota_transformer.errors import BAD_DATA, LOCKED, USAGE, SotaError
from sota_transformer.options import Prepare
from sota_transformer.training import checkpoint
from sota_transformer.training.start import train
from tests.training_runs import MakeRun, change, train_until


def resumed(config, word: str):
    return change(config, resume=word)


def test_the_first_save_of_a_branch_removes_the_abandoned_checkpoints(make_run: MakeRun) -> None:
    """Otherwise an abandoned checkpoint would be second newest: kept, and fallen back to."""
    config = make_run(steps=12, save_every_steps=2, keep_checkpoints=9)
    train_until(config, 9)
    assert checkpoint.steps(config.run.out) == [2, 4, 6, 8]
    train(change(resumed(config, "step:4"), save_every_steps=7))
    assert checkpoint.steps(config.run.out) == [2, 4, 7, 12]


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("model", "seq_len", 16), ("data", "document_mask", True), ("train", "eval_tokens", 256)],
)
def test_losses_from_before_an_override_of_windows_or_mask_do_not_compare(
    make_run: MakeRun, capsys, section: str, field: str, value: object
) -> None:
    """The number of validation tokens is the same; with other windows no command uses the best.

    Nor do losses over fewer tokens compare. Those who want to keep the best one are warned.
    """
    config = make_run(steps=4, eval_every=2, eval_tokens=512)
    train(config)
    assert "no longer counts" not in capsys.readouterr().out
    longer = change(config, steps=8)
    other = dataclasses.replace(getattr(longer, section), **{field: value})
    override = f"train.steps,optim.learning_rate,{section}.{field}"
    spoilt = dataclasses.replace(longer.optim, learning_rate=100.0)
    run = dataclasses.replace(longer.run, override=override)
    train(dataclasses.replace(longer, **{section: other}, optim=spoilt, run=run))
    said = capsys.readouterr().out
    assert "validation was lowest at step 4" not in said
    assert "step 4 no longer counts as the lowest" in said
    assert 4 not in checkpoint.steps(config.run.out)


def test_a_complete_run_is_not_called_complete_on_other_data(
    make_run: MakeRun, corpus: Path, tmp_path: Path
) -> None:
    """`sota train` reported epochs of this data, which it had never read, and nothing to do."""
    config = make_run(steps=2)
    train(config)
    more = tmp_path / "more"
    prepare(Prepare(inputs=(str(corpus),), out=more, val_fraction=0.2, workers=1))
    other = change(config, path=more)
    with pytest.raises(SotaError, match="is not the data this run was trained on") as caught:
        train(other)
    assert caught.value.code == BAD_DATA
    assert train(config) is None


def test_a_chosen_step_is_verified_too(make_run: MakeRun) -> None:
    """The search for the newest has not read it."""
    config = make_run(steps=2, save_every_steps=1)
    train(config)
    path = checkpoint.path_of(config.run.out, 1) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SotaError, match=r"model\.safetensors.*sha256") as caught:
        train(resumed(config, "step:1"))
    assert caught.value.code == BAD_DATA
    with pytest.raises(SotaError, match=r"model\.safetensors.*sha256"):
        checkpoint.load_model(config.run.out, torch.device("cpu"), 1, print)


def test_what_is_no_run_is_refused_before_its_folder_is_made(
    make_run: MakeRun, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a run without a folder would go
    config = make_run()
    short = tmp_path / "short"
    lines = "".join(f'{{"text": "{"word " * 40}{n}"}}\n' for n in range(60))
    (tmp_path / "a.jsonl").write_text(lines)
    prepare(Prepare(inputs=(str(tmp_path / "a.jsonl"),), out=short, val_fraction=0.1, workers=1))
    for fields, code, said in [
        ({"path": Path()}, USAGE, "no training data"),
        ({"out": Path()}, USAGE, "no folder for the run"),
        ({"vocab_size": VOCAB - 1}, USAGE, "is less than the 50258 ids"),
        ({"out": config.data.path}, LOCKED, "holds prepared data"),
        ({"path": short, "seq_len": 1024}, BAD_DATA, "the val split has"),
        ({"path": short, "seq_len": 1 << 15}, BAD_DATA, "the train split has"),
    ]:
        with pytest.raises(SotaError, match=said) as caught:
            train(change(config, **fields))
        assert caught.value.code == code
    assert not config.run.out.exists()


def test_what_a_killed_start_left_is_removed(make_run: MakeRun) -> None:
    config = make_run(steps=1, resume="never")
    kept, left = ("mine.txt", "checkpoints/mine"), (".tmp-run.json-0123abcd", ".trash-x-0123abcd")
    for name in (*kept, *left, *(f"checkpoints/{name}" for name in left)):
        (config.run.out / name).mkdir(parents=True)
    train(config)
    found = {str(path.relative_to(config.run.out)) for path in config.run.out.rglob("*")}
    assert set(kept) <= found and not [name for name in found if "0123abcd" in name]
