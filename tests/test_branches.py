"""Where two histories of a run meet: what the abandoned one may leave behind, and what not."""

import dataclasses
from pathlib import Path

import pytest

from sota_transformer.data.prepare import prepare
from sota_transformer.errors import BAD_DATA, SotaError
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
