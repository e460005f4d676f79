"""Trainer invariants: resumed equals undisturbed, any micro-batch, any ranks, no bad update."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sota_transformer import schedules
from sota_transformer.config import Run
from sota_transformer.data.shards import TokenWindows
from sota_transformer.data.tokenizer import EOT
from sota_transformer.errors import DIVERGED, TEMPORARY, SotaError
from sota_transformer.model.loss import PAD
from sota_transformer.presets import RECIPES
from sota_transformer.report import write_report
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint, trainer
from sota_transformer.training.runlog import read_metrics
from sota_transformer.training.signals import Stopped
from sota_transformer.training.start import train
from tests.training_runs import (
    InterruptError,
    MakeRun,
    change,
    command,
    final_hash,
    logged,
    losses,
    train_until,
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_equals_undisturbed_bit_for_bit(make_run: MakeRun, few: Path, recipe: str) -> None:
    """Dropout is on, steps cross the end of an epoch, and the crash is between two checkpoints."""
    shape = {"path": few, "steps": 24, "micro_rows": 2, "save_every_steps": 6}
    whole, broken = (make_run(n, recipe, dropout_start=0.1, **shape) for n in ("whole", "broken"))
    epoch = len(TokenWindows(few, "train", whole.model.seq_len))
    train(whole)
    for crash in (3, 9, 21):
        train_until(broken, crash)
    train(broken)
    assert 9 * whole.train.batch_rows < epoch < 21 * whole.train.batch_rows
    assert final_hash(whole) == final_hash(broken)
    assert losses(whole) == losses(broken)


def test_a_step_of_nothing_but_padding_learned_from_no_token(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """It counted as one, the number that its loss is divided by."""
    ids = np.array([EOT, 1, 2, 3] * 8 + [PAD] * 32, "<u2")
    for name in ("train", "val"):
        ids.tofile(tmp_path / f"{name}.bin")
    config = make_run(path=tmp_path, seq_len=8, batch_rows=1, steps=7, eval_tokens=8)
    train(config)
    assert read_metrics(config.run.out)[-1]["val_loss"] > 0  # the run has ended
    assert max(line.get("tokens", 0) for line in read_metrics(config.run.out)) == 31


def test_evaluation_and_samples_change_nothing(make_run: MakeRun) -> None:
    quiet, busy = make_run("quiet"), make_run("busy", eval_every=5, sample_every=4)
    train(quiet)
    train(busy)
    assert final_hash(quiet) == final_hash(busy)
    assert "--- step 4\n" in (busy.run.out / "samples.txt").read_text()


def test_any_micro_batch_sees_the_same_samples(make_run: MakeRun) -> None:
    runs = [make_run(f"m{n}", steps=5, batch_rows=8, micro_rows=n) for n in (8, 4, 1)]
    for config in runs:
        train(config)
    for config in runs[1:]:
        assert losses(config) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_out_of_memory_halves_the_micro_batch_and_loses_nothing(
    make_run: MakeRun, monkeypatch, capsys
) -> None:
    """A device that holds only two rows from the third step on, with eight requested."""
    small, large = (make_run(f"m{rows}", batch_rows=8, micro_rows=rows) for rows in (2, 8))
    train(small)
    original = trainer.Transformer.forward

    def crowded(self, tokens, *more, **named):
        if tokens.shape[0] > 2 and self.training:
            raise torch.OutOfMemoryError("no room")
        return original(self, tokens, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Transformer, "forward", crowded)
        train(large)
    assert final_hash(large) == final_hash(small)
    events = logged(large, "micro-batch")
    assert events[-1]["rows"] == 2
    assert "a micro-batch of 2" in capsys.readouterr().out


def test_a_device_too_small_for_one_window_is_one_line(make_run: MakeRun, monkeypatch) -> None:
    def full(self, tokens, *more, **named):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer.Transformer, "forward", full)
    config = make_run("full", batch_rows=4)
    with pytest.raises(SotaError, match="does not fit into memory") as caught:
        train(config)
    assert caught.value.code == TEMPORARY
    assert logged(config, "micro-batch")[-1]["rows"] == 1


def test_float16_trains_with_a_scaled_loss(make_run: MakeRun, monkeypatch) -> None:
    """An overflow costs one update and is no bad step; the scale survives a resume."""
    config = make_run("half", steps=12, save_every_steps=4, dtype="float16", learning_rate=5e-3)
    scales = []
    original = trainer.Trainer._update

    def update(self, sums):
        if self.step == 2:
            for parameter in self.model.parameters():
                parameter.grad.mul_(torch.inf)
        original(self, sums)
        scales.append(self.scaler.get_scale())
        assert self.guard.bad_in_a_row == 0
        if self.step == 9 and len(scales) == 9:
            raise InterruptError

    monkeypatch.setattr(trainer.Trainer, "_update", update)
    with pytest.raises(InterruptError):
        train(config)
    train(config)
    found = losses(config)
    assert found[-1] < found[0] - 0.2
    assert scales[2] == scales[1] / 2
    assert scales[9] == scales[7]  # at step 8, where the run resumed
    events = logged(config, "skipped")
    assert len(events) == 1
    assert "float16" in events[0]["reason"]


def test_float16_that_overflows_at_any_scale_ends_the_run(make_run: MakeRun, monkeypatch) -> None:
    config = make_run("half", steps=100, dtype="float16")
    original = trainer.Trainer._update

    def update(self, sums):
        for parameter in self.model.parameters():
            parameter.grad.fill_(torch.nan)
        original(self, sums)

    monkeypatch.setattr(trainer.Trainer, "_update", update)
    with pytest.raises(SotaError) as caught:
        train(config)
    assert caught.value.code == DIVERGED


PACKED = {"windows": "best-fit", "document_mask": True}


def test_best_fit_windows_with_a_mask_keep_the_invariants(make_run: MakeRun) -> None:
    """Any micro-batch, and a resume: the loss is divided by the actual number of targets."""
    shape = {"steps": 8, "batch_rows": 8, "save_every_steps": 3} | PACKED
    whole = make_run("whole", micro_rows=4, **shape)
    train(whole)
    small = make_run("small", micro_rows=1, **shape)
    train(small)
    assert losses(small) == pytest.approx(losses(whole), rel=1e-5)
    broken = make_run("broken", micro_rows=4, **shape)
    train_until(broken, 5)
    train(broken)
    assert final_hash(broken) == final_hash(whole)


def test_the_kind_of_windows_is_printed_and_fixed(make_run: MakeRun, capsys) -> None:
    train(make_run(steps=2, **PACKED))
    said = capsys.readouterr().out
    assert "% padding, which no loss counts" in said and "stays within a document" in said
    with pytest.raises(SotaError, match=r"data\.windows was best-fit, is stream"):
        train(make_run(steps=2, document_mask=True))


@pytest.mark.parametrize("packed", [{"document_mask": True}, {"windows": "best-fit"}, {}])
def test_ids_that_end_no_document_are_pointed_out(
    packed: dict[str, Any], make_run: MakeRun, tmp_path: Path, capsys
) -> None:
    """As Megatron writes them by default: the mask would do nothing, and best-fit cut anywhere."""
    for last in (5, EOT):
        folder = tmp_path / str(last)
        folder.mkdir()
        for split in ("train", "val"):
            np.array([*range(600), last], "<u2").tofile(folder / f"{split}.bin")
        train(change(make_run(str(last), steps=1, **packed), path=folder))
        said = "no end-of-text token in the training ids" in capsys.readouterr().out
        assert said == (last != EOT and bool(packed))


def test_a_missing_network_interface_is_named() -> None:
    """gloo only reported that another process had died, and that a retry may help."""
    launched = {"RANK": "0", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "eth99"}
    with mock.patch.dict(os.environ, launched), pytest.raises(SotaError, match="eth99") as refused:
        Runtime.detect(Run(device="cpu"), 1).join()
    assert refused.value.code == 2


def test_two_ranks_equal_two_micro_batches_bit_for_bit(make_run: MakeRun) -> None:
    """The ranks' windows differ in their number of targets, and the run resumes at a step with
    validation: the ranks agree whether it was done. Each validates its share.
    """
    shape = {"batch_rows": 8, "micro_rows": 4, "eval_every": 5, "save_every_steps": 5} | PACKED
    shape["eval_tokens"] = 27 * 32
    one, two = (make_run(name, **shape) for name in ("one", "two"))
    train(one)
    train_until(two, 6)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(launcher + command(two)[1:], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert final_hash(one) == final_hash(two)
    assert losses(one) == losses(two)
    judged = [{line["step"]: line for line in logged(c, "val_loss")} for c in (one, two)]
    assert [line["val_tokens"] for line in judged[0].values()] == [864, 864, 864]
    for step, line in judged[0].items():
        assert all(judged[1][step][name] == value for name, value in line.items() if "val" in name)


def test_the_plain_loss_is_reported_and_the_smoothed_one_optimised(
    make_run: MakeRun, monkeypatch
) -> None:
    config = make_run(steps=2, micro_rows=2, label_smoothing=0.3)
    expected: list[list[float]] = []  # of each micro-batch, by torch
    original = trainer.token_loss

    def noted(hidden, head, targets, *rest):
        logits = (hidden @ head.T).detach().flatten(0, -2)
        expected.append(
            [F.cross_entropy(logits, targets.flatten(), label_smoothing=e).item() for e in (0, 0.3)]
        )
        return original(hidden, head, targets, *rest)

    monkeypatch.setattr(trainer, "token_loss", noted)
    train(config)
    first = read_metrics(config.run.out)[0]
    plain, smoothed = torch.tensor(expected[:2]).mean(0).tolist()  # two make the first step
    uniform = torch.log(torch.tensor(50_258.0)).item()
    assert plain == pytest.approx(uniform, abs=0.1)
    assert first["loss"] == pytest.approx(plain, rel=1e-6) != smoothed
    assert first["smoothed_loss"] == pytest.approx(smoothed, rel=1e-6) != plain
    assert first["lr"] == schedules.learning_rate(0, config)
    assert first["dropout"] == schedules.dropout(0, config)
    validation = logged(config, "val_loss")
    assert len(validation) == 1 and validation[0]["step"] == 2
    assert 1.5 < validation[0]["val_bits_per_byte"] < 6


def test_the_loss_falls(make_run: MakeRun) -> None:
    config = make_run(steps=40, learning_rate=2e-2)
    result = train(config)
    assert result is not None
    assert result.nats < 5.0 < losses(config)[0]


def test_bad_steps_are_not_applied_and_end_the_run(make_run: MakeRun, monkeypatch) -> None:
    config = make_run(steps=60, save_every_steps=5)
    original = trainer.token_loss

    def poisoned(hidden, *arguments):
        sums = original(hidden, *arguments)
        return sums._replace(smoothed=sums.smoothed * float("nan"))

    train_until(config, 5)
    weights = None
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "token_loss", poisoned)
        with pytest.raises(SotaError) as caught:
            train(config)
        assert caught.value.code == DIVERGED
    assert logged(config, "returned")[-1]["shift"] == 3 * 10 * 4  # rows, of three returns
    for step in checkpoint.steps(config.run.out):
        state = checkpoint.load(config.run.out, step)
        assert all(torch.isfinite(t).all() for t in state.model.values())
        weights = weights or state.model
        assert all(torch.equal(weights[name], state.model[name]) for name in weights)


@pytest.mark.parametrize(("stopped", "steps"), [(None, 26), ("_go_back", 20), ("_last_good", 20)])
def test_after_bad_steps_the_run_returns_and_skips_them(
    make_run: MakeRun, monkeypatch, stopped: str | None, steps: int
) -> None:
    """Windows 40 to 79 in training order are poisoned, and those of step 13 after the return; the
    run nevertheless finishes, and reports how.

    This also holds if it was stopped when it had seen enough of them and was about to return, or
    was asking the other processes where to; what was saved then, including its last step, is not
    what it ends with. Nothing is saved during bad steps, which would displace the checkpoints to
    return to; so none of them is the best, whose checkpoint is kept.
    """
    config = make_run(steps=steps, d_model=32, batch_rows=4, save_every_steps=2, eval_every=13)
    original = trainer.Trainer._update

    def update(self, sums):
        first = self.loader.row_numbers(self.step)[0]
        original(self, sums * float("nan") if 40 <= first < 80 or first == 88 else sums)

    def stop(self) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "_update", update)
    if stopped:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(trainer.Trainer, stopped, stop)
            train(config)
    result = train(config)
    assert result is not None and result.nats < 10.5
    events = logged(config, "returned")
    assert len(events) == 1
    assert events[0]["step"] == 10 and events[0]["from"] == 20 and events[0]["shift"] == 40
    state = checkpoint.load(config.run.out, steps)
    assert state.trainer["guard"]["rate"] == 0.5 and state.trainer["guard"]["skipped"] == 11
    assert state.trainer["best"] is None
    if not stopped:  # a resumed run stays past what was skipped
        before = final_hash(config)
        train(change(config, resume="step:24"))
        assert final_hash(config) == before


def test_tokens_count_each_step_at_its_batch_size(make_run: MakeRun) -> None:
    train(make_run(steps=4))
    config = make_run(steps=6, batch_rows=2)
    train(change(config, override="train.steps,train.batch_rows"))
    tokens = [line["tokens"] for line in logged(config, "loss")]
    assert tokens == [128, 256, 384, 512, 576, 640]


def test_a_single_validation_window_has_no_error_bar(make_run: MakeRun, capsys) -> None:
    config = make_run(steps=1, eval_tokens=1)
    train(config)
    assert logged(config, "val_loss")[-1]["val_error"] is None
    assert "+-" not in capsys.readouterr().out
    assert write_report(config.run.out, config.run.out / "r.html").is_file()
