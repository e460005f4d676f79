"""How a run ends and resumes: complete, stopped, killed, refused, from a chosen step."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from sota_transformer import durable
from sota_transformer.config import Run, RunConfig
from sota_transformer.data.shards import TokenWindows
from sota_transformer.errors import BAD_DATA, IO_FAILED, LOCKED, TEMPORARY, SotaError
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint, judge, start, trainer
from sota_transformer.training.runlog import read_config, read_metrics
from sota_transformer.training.signals import Signals, Stopped
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


def test_a_complete_run_is_reported(make_run: MakeRun, capsys) -> None:
    config = make_run(steps=3)
    train(config)
    before = final_hash(config)
    assert train(config) is None
    assert "complete" in capsys.readouterr().out
    assert final_hash(config) == before


def test_a_disk_too_small_for_a_checkpoint_is_reported_before_the_first_step(
    make_run: MakeRun, monkeypatch, capsys
) -> None:
    """Training until the first save would be lost. A complete run saves no more."""
    config = make_run(steps=3)
    size = 12 * config.model.parameter_count
    full = types.SimpleNamespace(total=2 * size, free=size)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(SotaError, match="a checkpoint needs") as caught:
            train(config)
        assert caught.value.code == IO_FAILED
        assert not config.run.out.exists()
    train(config)
    assert "GB more, and" not in capsys.readouterr().out
    patched = types.SimpleNamespace(total=2 * size, free=int(1.2 * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: patched)
    train(make_run("other", steps=3))
    assert "may need 0.04 GB more, and" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert train(config) is None and "complete" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(total=0, free=0))
    train(make_run("on a FUSE drive that cannot tell", steps=3))
    assert "GB more, and" not in capsys.readouterr().out


def test_resume_has_four_meanings(make_run: MakeRun) -> None:
    def resumed(word: str) -> RunConfig:
        config = make_run(steps=4, save_every_steps=2, keep_checkpoints=3)
        return change(config, resume=word)

    with pytest.raises(SotaError, match="no checkpoint"):
        train(resumed("latest"))
    assert not resumed("latest").run.out.exists()  # a mistyped name leaves nothing behind
    train(resumed("auto"))
    with pytest.raises(SotaError, match="never"):
        train(resumed("never"))
    with pytest.raises(SotaError, match="no checkpoint of step 3"):
        train(resumed("step:3"))
    before = final_hash(resumed("auto"))
    folder = resumed("auto").run.out
    train_until(change(resumed("step:2"), save_every_steps=1), 4)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]  # not 4, nor its validation
    assert checkpoint.steps(folder) == [2, 3]  # 4 was abandoned, and must not be resumed from
    assert read_config(folder).run.resume == "auto"
    train(resumed("auto"))
    assert final_hash(resumed("auto")) == before


def test_a_refused_start_creates_no_log(make_run: MakeRun, tmp_path: Path) -> None:
    """An imported run has none yet; a start with unsuitable data left an empty one."""
    config = make_run(steps=2)
    train(config)
    (config.run.out / "metrics.jsonl").unlink()
    with pytest.raises(SotaError) as caught:
        train(change(config, path=tmp_path, steps=3, override="train.steps"))
    assert caught.value.code == BAD_DATA
    assert not (config.run.out / "metrics.jsonl").exists()


def test_a_micro_batch_is_refused_before_the_device_is_checked(make_run: MakeRun) -> None:
    """After it, the verdict kept the folder of a run that never began."""
    config = make_run(batch_rows=4, micro_rows=3)
    with pytest.raises(SotaError, match="must divide the 4 rows"):
        train(config, lambda *_: pytest.fail("checked the device"))
    assert not config.run.out.exists()


@pytest.mark.parametrize(
    "mistake", [{"MASTER_PORT": "x"}, {"GLOO_SOCKET_IFNAME": "x"}, {"LOCAL_WORLD_SIZE": "x"}]
)
def test_a_start_refused_for_its_launcher_leaves_no_folder(
    make_run: MakeRun, monkeypatch, tmp_path: Path, mistake: dict[str, str]
) -> None:
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (launched | mistake).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SotaError, match="unset"):
        train(change(make_run(), out=tmp_path / "runs" / "refused"))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(SotaError, match="unset"):
        train(change(make_run(), out=tmp_path / "mine"))
    assert (tmp_path / "mine").is_dir(), "it was there before"


def test_a_folder_that_a_refused_start_removes_is_worth_another_try(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other start had created it, and was refused while this one waited for its lock."""
    config, made = make_run(), durable.make_folder

    def removed(path: Path) -> None:
        made(path)
        path.rmdir()

    monkeypatch.setattr(durable, "make_folder", removed)
    with pytest.raises(SotaError, match="removed by another process") as caught:
        train(config)
    assert caught.value.code == TEMPORARY


def test_a_start_killed_before_its_first_save_hides_nothing(make_run: MakeRun) -> None:
    config = make_run(steps=8, save_every_steps=2, keep_checkpoints=9, sample_every=4)
    train(config)
    before = read_metrics(config.run.out)
    again = change(config, resume="step:4")
    train_until(again, 6)
    assert checkpoint.steps(config.run.out)[-1] == 8
    train(config)  # finds step 8 as it was
    lines = [(m["step"], m.get("loss"), m.get("sample")) for m in before]
    assert [
        (m["step"], m.get("loss"), m.get("sample")) for m in read_metrics(config.run.out)
    ] == lines


def test_a_start_stopped_at_once_hides_nothing(make_run: MakeRun, monkeypatch) -> None:
    """It resumes from step 4 and saves nothing, so it keeps step 8 and its lines."""
    config = make_run(steps=8, save_every_steps=2, keep_checkpoints=9)
    train(config)
    before = [line["step"] for line in logged(config, "loss")]
    again = change(config, resume="step:4")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(trainer.Trainer, "_train_step", stop)
        train(again)
    train(config)
    assert checkpoint.steps(config.run.out)[-1] == 8
    assert [line["step"] for line in logged(config, "loss")] == before


def test_a_power_cut_takes_no_line_that_led_to_a_checkpoint(make_run: MakeRun, monkeypatch) -> None:
    """Of a finished run it could have taken the whole log."""
    config, safe, saved = make_run(steps=4, save_every_steps=2), [0], []
    log = config.run.out / "metrics.jsonl"

    def lines() -> int:
        return log.read_bytes().count(b"\n")

    fsync, save = durable.fsync, checkpoint.save

    def synced(file: int) -> None:
        fsync(file)
        if log.exists() and os.path.samestat(os.fstat(file), log.stat()):
            safe.append(lines())

    monkeypatch.setattr(durable, "fsync", synced)
    monkeypatch.setattr(
        checkpoint, "save", lambda *given: (saved.append(safe[-1] == lines()), save(*given))
    )
    train(config)
    assert saved == [True, True] and safe[-1] == lines()


def test_a_run_stopped_often_keeps_no_more_checkpoints_than_planned(
    make_run: MakeRun, monkeypatch
) -> None:
    """Sessions shorter than `save_every_minutes` left one each, until the disk was full; but those
    from before bad steps stay, as a rollback needs them.
    """
    config = make_run(steps=20)
    original = trainer.Trainer._update

    def update(self, sums) -> None:
        original(self, sums * float("nan") if self.step >= 4 else sums)

    monkeypatch.setattr(trainer.Trainer, "_update", update)
    monkeypatch.setattr(trainer.Trainer, "_log", stop)
    kept = []
    for _ in range(7):
        with pytest.raises(Stopped):
            train(config)
        kept.append(checkpoint.steps(config.run.out))
    assert kept[3] == [3, 4] and kept[-1] == [3, 4, 5, 6, 7]


def test_bad_steps_do_not_lead_back_to_an_abandoned_branch(make_run: MakeRun, monkeypatch) -> None:
    """A new branch from step 4 meets ten bad steps and returns there, not to the old step 8."""
    config = make_run(steps=20, batch_rows=4, save_every_steps=4, keep_checkpoints=9)
    train_until(config, 12)
    assert checkpoint.steps(config.run.out)[-1] >= 8  # the twelfth is not saved
    original = trainer.Trainer._update

    def update(self, sums):
        bad = 20 <= self.loader.row_numbers(self.step)[0] < 60
        original(self, sums * float("nan") if bad else sums)

    monkeypatch.setattr(trainer.Trainer, "_update", update)
    again = change(config, resume="step:4")
    train(change(again, save_every_steps=0))
    (event,) = logged(config, "returned")
    assert (event["step"], event["from"]) == (4, 15)


def stop(*_) -> None:
    raise Stopped(signal.SIGTERM)


def wait_for(text: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said; {process.stderr and process.stderr.read()}")


def test_signals_save_and_leave_and_the_same_command_ends_in_the_same_bytes(
    make_run: MakeRun, capsys
) -> None:
    """Also after kill -9, which loses only what was done since the last save."""
    config, reference = (make_run(n, steps=40, save_every_steps=5) for n in ("run", "reference"))
    train(reference)
    for begun, until, number, code in (
        ("starting from scratch", "loss", signal.SIGTERM, 143),
        ("resuming from step", "saved step 15", signal.SIGKILL, -signal.SIGKILL),
        ("resuming from step", "loss", signal.SIGINT, 130),
    ):
        process = subprocess.Popen(
            command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(begun, process)
        wait_for(until, process)
        process.send_signal(number)
        sent = time.monotonic()
        output, _ = process.communicate(timeout=30)
        assert process.returncode == code
        assert time.monotonic() - sent < 10
        if number != signal.SIGKILL:
            stopped = f"stopped by {signal.Signals(number).name}; the same command resumes"
            assert stopped in output
    capsys.readouterr()
    train(config)
    assert "resuming from step" in capsys.readouterr().out
    assert final_hash(config) == final_hash(reference)
    assert losses(config) == losses(reference)


def test_stopped_cannot_be_swallowed_by_a_library() -> None:
    assert not issubclass(Stopped, Exception)
    assert Stopped(signal.SIGTERM).code == 143


def test_run_json_records_each_start(make_run: MakeRun) -> None:
    config = make_run(steps=6, save_every_steps=2)
    train_until(config, 3)
    train(config)
    record = json.loads((config.run.out / "run.json").read_text())
    assert [attempt["from_step"] for attempt in record["attempts"]] == [0, 2]
    assert record["attempts"][0]["machine"]["torch"] == torch.__version__
    assert record["parameters"] == config.model.parameter_count
    windows = TokenWindows(config.data.path, "train", config.model.seq_len)
    assert (record["data"], record["padding"]) == (windows.fingerprint, windows.padding)


def test_what_was_asked_of_one_start_is_not_asked_of_the_next(make_run: MakeRun) -> None:
    asked = make_run(steps=1, exact=True, override="optim.eps", data_change="continue")
    train(asked)
    assert read_config(asked.run.out) == make_run(steps=1)


def test_all_ranks_begin_where_and_as_the_first_has_chosen(monkeypatch) -> None:
    """One that cannot compile does not do so because the first one can."""
    plain = dataclasses.replace(Runtime.detect(Run(device="cpu"), 1), compile=False)
    for compiles, said in ((True, (7, 0)), (True, (7, 1)), (False, (-1, 1)), (False, (0, 0))):
        monkeypatch.setattr(Runtime, "of_first", lambda *_, said=said: list(said))
        mine = dataclasses.replace(plain, compile=compiles)
        found, step = start._as_the_first(mine, 5)
        assert step == said[0] and found.compile == (compiles and said[1] == 1)
        assert found.compile != compiles or found == mine


@pytest.mark.parametrize("amid", ["_chosen", "sample"])
def test_a_run_stopped_during_its_last_validation_still_gets_it(
    make_run: MakeRun, monkeypatch, amid: str
) -> None:
    config = make_run(steps=3)
    with monkeypatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(judge.Judge, amid, interrupt)
        train(config)
    result = train(config)
    assert result is not None and result.nats == logged(config, "val_loss")[-1]["val_loss"]
    assert (config.run.out / "samples.txt").read_text().count("--- step 3\n") == 1
    assert train(config) is None


@pytest.mark.parametrize("amid", ["_chosen", "sample"])
def test_a_run_stopped_during_an_earlier_validation_repeats_it_first(
    make_run: MakeRun, monkeypatch, amid: str
) -> None:
    config = change(make_run(steps=3), eval_every=2, sample_every=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(judge.Judge, amid, stop)
        train(config)
    assert checkpoint.steps(config.run.out) == [2]
    train(config)
    lines = read_metrics(config.run.out)
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 3]
    assert [line["step"] for line in lines if "sample" in line] == [2, 3]


def interrupt(*_) -> None:
    raise InterruptError


def test_a_second_process_is_refused_and_a_closed_output_pipe_is_a_stop(
    make_run: MakeRun,
) -> None:
    config = make_run(steps=100_000)
    with subprocess.Popen(
        command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            wait_for("step      2/", process)
            started = time.monotonic()
            with pytest.raises(SotaError, match=str(process.pid)) as caught:
                train(config)
            assert caught.value.code == LOCKED
            assert time.monotonic() - started < 2
            process.stdout.close()
            assert process.wait(timeout=60) == 128 + signal.SIGPIPE
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert checkpoint.steps(config.run.out)


def test_a_signal_inside_a_weakref_callback_is_not_lost(capsys) -> None:
    """Compilers use many, and Python swallows what is raised there, with a traceback."""
    watched: Any = Signals()
    reference = weakref.ref(watched, lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM"), Signals():
        del watched
        assert reference() is None
        time.sleep(5)
    assert "Traceback" not in capsys.readouterr().err


def test_a_signal_ignored_by_nohup_ends_no_run() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(Stopped, match="SIGTERM"):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
