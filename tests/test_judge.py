"""A run's best checkpoint outlives overfitted ones, and the user is told."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from sota_transformer.data.tokenizer import EOT
from sota_transformer.inference.perplexity import Perplexity
from sota_transformer.model.loss import PAD
from sota_transformer.model.transformer import Transformer
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint, judge
from sota_transformer.training.runlog import RunLog
from sota_transformer.training.start import train
from sota_transformer.training.trainer import Trainer
from tests.simulated import simulated
from tests.training_runs import MakeRun, change, logged, train_until

LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5, 10: 4.6, 12: 4.7}


@pytest.fixture
def scripted(monkeypatch) -> None:
    """Validations of a run that overfits from step 4 on."""
    original = judge.Judge.validate

    def validate(self, model, step):
        found = Perplexity(LOSSES[step], 0.1, 1.0, 1.0, 512, 16)
        monkeypatch.setattr(judge, "summarise", lambda _: found)
        return original(self, model, step)

    monkeypatch.setattr(judge.Judge, "validate", validate)


def best_of(config, step: int) -> dict:
    path = checkpoint.path_of(config.run.out, step) / "trainer.json"
    return json.loads(path.read_bytes())["best"]


@pytest.mark.usefixtures("scripted")
def test_the_checkpoint_of_the_lowest_validation_loss_is_kept(make_run: MakeRun, capsys) -> None:
    config = make_run(eval_every=2, save_every_steps=3)
    train_until(config, 11)
    assert checkpoint.steps(config.run.out) == [4, 6, 9]  # 2 was the best until 4
    train(config)
    assert checkpoint.steps(config.run.out) == [4, 9, 12]
    assert best_of(config, 12) == {"step": 4, "nats": 3.0, "tokens": 512}
    assert "validation was lowest at step 4, 3.0000 nats" in capsys.readouterr().out


def test_losses_over_other_windows_do_not_compare(make_run: MakeRun, tmp_path) -> None:
    config = make_run(eval_tokens=512)
    runtime = Runtime.detect(config.run, 1)
    judging = judge.Judge(config, runtime, RunLog(tmp_path, 1, silent=True))
    model = Transformer(config.model).eval()
    for tokens, kept in ((512, True), (256, False)):
        judging.best = before = {"step": 1, "nats": 0.0, "tokens": tokens}
        assert judging.validate(model, 2).tokens == 512
        assert (judging.best == before) == kept


def test_the_first_rank_says_which_checkpoint_to_go_back_to(make_run: MakeRun, monkeypatch) -> None:
    """The others may have saved at other times, and all need the same weights."""
    config = make_run(steps=4, save_every_steps=1, keep_checkpoints=9)
    train(config)
    runtime = Runtime.detect(config.run, 1)
    first = Trainer(config, runtime, RunLog(config.run.out, 4, silent=True))
    first.step, first.good = 4, {2}
    other = Trainer(config, dataclasses.replace(runtime, rank=1), first.log)
    other.step, other.good = 4, {3}
    asked: list[int] = []
    monkeypatch.setattr(Runtime, "sum_", lambda _, tensor: asked.append(int(tensor)) or tensor)
    first._last_good()
    other._last_good()
    assert asked == [2, 0]  # whose sum is the first rank's


@pytest.mark.usefixtures("scripted")
def test_the_last_step_of_a_run_that_is_continued_may_be_the_best(
    make_run: MakeRun, monkeypatch
) -> None:
    monkeypatch.setitem(LOSSES, 6, 2.0)
    train(make_run(eval_every=2, steps=6))
    config = make_run(eval_every=2, save_every_steps=1)
    train(change(config, override="train.steps"))
    assert checkpoint.steps(config.run.out) == [6, 11, 12]


@pytest.mark.usefixtures("scripted")
def test_a_best_deleted_by_a_branch_is_not_named(make_run: MakeRun, capsys) -> None:
    config = make_run(eval_every=2)
    state = Trainer(config, Runtime.detect(config.run, 1), RunLog(config.run.out, 1, True)).state()
    state.trainer["best"] = {"step": 4, "nats": 3.0, "tokens": 512}
    state.step = 7
    checkpoint.save(config.run.out, state)
    train(config)
    assert best_of(config, 12) == {"step": 8, "nats": 4.5, "tokens": 512}
    assert "validation was lowest at step 8, 4.5000 nats" in capsys.readouterr().out


def test_padding_in_foreign_files_does_not_change_the_validation_tokens(
    make_run: MakeRun, tmp_path: Path, capsys
) -> None:
    """It is never evaluated; every start reported that the best no longer counts."""
    for name, ids in (("train", [EOT, 1, 2, 3] * 64), ("val", [EOT, 1, 2, PAD] * 64)):
        np.array(ids, "<u2").tofile(tmp_path / f"{name}.bin")
    config = make_run(path=tmp_path)
    config.run.out.mkdir()
    with RunLog(config.run.out, 1, silent=False) as log:
        trainer = Trainer(config, Runtime.detect(config.run, 1), log)
        trainer.judge.validate(trainer.model, 0)
        state = trainer.state()
        checkpoint.save(config.run.out, state)
        trainer.judge.recall(state)
    assert "no longer counts" not in capsys.readouterr().out
    assert trainer.judge.best_step == 0


@pytest.mark.parametrize(("device", "left"), [("cpu", math.nan), ("cpu", math.inf), ("mps", 0.0)])
def test_a_validation_that_was_not_computed_is_never_the_lowest(
    make_run: MakeRun, monkeypatch, capsys, device: str, left: float
) -> None:
    """A Mac's GPU may drop some of its work, even the first validation's, without an error."""
    config = make_run(device=device, compile="off", steps=4, eval_every=1, eval_tokens=512)
    original, calls = judge.sequence_sums, []

    def sums(*given, **options):
        calls.append(original(*given, **options))
        if len(calls) in (1, 5):  # the first of two batches, in steps 1 and 3
            calls[-1][3:, 0] = left
        return calls[-1]

    monkeypatch.setattr(judge, "sequence_sums", sums)
    if device == "mps":
        with simulated("mps"):
            train(config)
    else:
        train(config)
    assert len(calls) == 8
    found = {line["step"]: line["val_loss"] for line in logged(config, "val_loss")}
    assert [step for step, nats in found.items() if nats is None] == [1, 3]
    assert best_of(config, 4)["step"] in (2, 4)
    assert capsys.readouterr().out.count("does not count as the lowest") == 2


def test_nor_is_one_that_repeats_the_previous_one(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(eval_tokens=512)
    judging = judge.Judge(config, Runtime.detect(config.run, 1), RunLog(tmp_path, 1, silent=True))
    model = Transformer(config.model).eval()
    first = judging.validate(model, 1)
    assert judging.validate(model, 2) == first
    assert judging.best_step == 1
