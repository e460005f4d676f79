"""The plan's arithmetic against numbers computed by hand, and the verb."""

import dataclasses
import math
import os
import platform
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from sota_transformer import plan, runtime
from sota_transformer.cli import main, resolve
from sota_transformer.config import Run
from sota_transformer.errors import TEMPORARY
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime
from tests.training_runs import change, train_until

SPEED = plan.Speed(seconds=32.0, tokens=32_768, memory=3_000_000_000)


def test_the_law_at_chinchilla_itself() -> None:
    """70B parameters on 1.4T tokens: 1.69 + 406.4/70e9^0.34 + 410.7/1.4e12^0.28."""
    assert plan.law(70_000_000_000, 1_400_000_000_000) == pytest.approx(1.937, abs=0.002)


def test_no_prediction_where_the_law_was_not_fitted() -> None:
    for there in (0, 10_000_000):
        said = plan.expected(123_552_000, 10_000_000, there)
        assert "no prediction" in said and "repeats" not in said
    assert "repeats past 4 epochs do not count" in plan.expected(16_000_000, 10**9, there=1_000_000)
    assert "nats" in plan.expected(123_552_000, 2_500_000_000, 0)


def test_a_run_in_words() -> None:
    config = PRESETS["125m"]()
    text = "\n".join(plan.estimates(config, SPEED, there=1_000_000_000))
    assert "1,024 tokens/s" in text
    seconds = 100_000 * 64 * 512 / 1024
    assert f"{seconds / 86_400:.1f} days" in text
    assert "3.28 times" in text
    assert f"{4 * 12 * 123_552_000 / 1e9:.2f} GB for 4 checkpoints" in text
    assert f"{100_000 * 64 * 512 / 123_552_000:.1f} tokens per parameter" in text


def test_a_measured_step_takes_a_plausible_time() -> None:
    config = PRESETS["tiny"]()
    speed = plan.measure(config)
    assert 0 < speed.seconds < 60
    assert speed.tokens == 8 * 64
    assert math.isfinite(speed.tokens_per_second)


def test_a_step_is_its_micro_batches_and_one_update(monkeypatch) -> None:
    """Eight windows take 2 s, 0.5 of them for the update: three times 1.5 s and the update."""
    monkeypatch.setattr(plan, "step_seconds", lambda _config, _runtime, rows: (rows / 4, 0.5))
    config = change(PRESETS["tiny"](), device="cpu", compile="off", batch_rows=24, micro_rows=8)
    speed = plan.measure(config)
    assert (speed.seconds, speed.tokens) == (3 * 1.5 + 0.5, 24 * 64)


def test_a_micro_batch_that_does_not_fit_is_halved_as_in_training(monkeypatch) -> None:
    tried = []

    def step_seconds(_config, _runtime, rows) -> tuple[float, float]:
        tried.append(rows)
        if rows > 2:
            raise RuntimeError("CUDA out of memory") if rows == 8 else MemoryError
        return 0.5, 0.25

    monkeypatch.setattr(plan, "step_seconds", step_seconds)
    config = change(PRESETS["tiny"](), device="cpu", compile="off", batch_rows=24, micro_rows=8)
    assert plan.measure(config).seconds == 12 * 0.25 + 0.25 and tried == [8, 4, 2]


def test_work_that_the_device_still_has_to_do_counts(monkeypatch) -> None:
    """One that takes a second for the passes and another for the update."""
    config = change(PRESETS["tiny"](), device="cpu", compile="off")
    machine = Runtime.detect(config.run, 1)
    clock = [0.0]
    monkeypatch.setattr(Runtime, "synchronize", lambda _: clock.append(clock[-1] + 1))
    monkeypatch.setattr(plan, "time", types.SimpleNamespace(perf_counter=lambda: clock[-1]))
    assert plan.step_seconds(config, machine, 1, steps=1) == (2, 1)


@pytest.mark.parametrize(("recipe", "drops"), [("seed", True), ("fast", False)])
def test_the_measured_step_uses_dropout_if_the_run_does(monkeypatch, recipe, drops) -> None:
    seen, forward = [], Transformer.forward

    def watched(self, tokens, dropout=None, **more):
        seen.append(dropout is not None)
        return forward(self, tokens, dropout, **more)

    monkeypatch.setattr(Transformer, "forward", watched)
    plan.measure(PRESETS["tiny"](recipe))
    assert set(seen) == {drops}


def test_a_preset_that_does_not_fit_is_reported_and_not_tried(monkeypatch, capsys) -> None:
    common = ("--device", "cpu", "--run.compile", "off")  # even trying to compile takes seconds
    monkeypatch.setattr(Runtime, "available_memory", lambda self: 1_000_000_000)
    monkeypatch.setattr(plan, "step_seconds", lambda config, *more: (2.0, 1.0))
    assert main(["plan", "125m", *common]) == TEMPORARY
    assert "take 2.0 GB, but only 1.0 GB are free; a smaller preset" in capsys.readouterr().err
    assert main(["plan", "16m", *common, "--hours", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "take 4.1 GB" in next(line for line in lines if " 250m: " in line)
    assert "best: sota train 16m" in lines[-1]

    def full(config, *more):
        if config.model == PRESETS["250m"]().model:
            raise RuntimeError("out of memory")
        return 2.0, 1.0

    monkeypatch.setattr(Runtime, "available_memory", lambda self: 1 << 40)
    monkeypatch.setattr(plan, "step_seconds", full)
    assert main(["plan", "16m", *common, "--hours", "1"]) == 0
    assert "250m: not even one window" in capsys.readouterr().out


def test_presets_with_too_slow_steps_are_not_measured(monkeypatch) -> None:
    measured = []
    monkeypatch.setattr(plan, "measure", lambda config: measured.append(config) or SPEED)
    config = PRESETS["16m"]()
    lines = list(plan.compare(config, "16m", SPEED, hours=0.01, there=0))
    seconds = 32.0 * 123_552_000 / config.model.parameter_count * 64 * 512 / SPEED.tokens
    assert f"125m: one step takes about {seconds / 60:.1f} minutes" in lines[1]
    assert not measured and "sota train 16m" in lines[-1]


def test_time_beyond_four_readings_of_the_data_is_not_planned(monkeypatch) -> None:
    """A step is 32,768 tokens: 244 steps read 2,000,000 tokens 3.998 times, 61 read them once."""
    monkeypatch.setattr(plan, "measure", lambda config: SPEED)
    config = PRESETS["16m"]("fast")
    lines = list(plan.compare(config, "16m", SPEED, hours=8, there=2_000_000))
    assert "244 steps" in lines[0] and "all that 4 epochs" in lines[0]
    # Under a 30th of a token per parameter, which `fast` soon memorizes.
    assert all("61 steps" in line and "all that 1 epoch " in line for line in lines[1:3])
    assert lines[-1].endswith("--steps 244")
    lines = list(plan.compare(config, "16m", SPEED, hours=8, there=200_000_000))
    assert "900 steps" in lines[0] and "4 epochs" not in lines[0]


def test_memory_of_one_measurement_is_free_for_the_next(monkeypatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    machine = Runtime.detect(dataclasses.replace(PRESETS["tiny"]().run, device="cpu"), 1)
    names = {"mem_get_info": (10, 80), "memory_reserved": 30, "memory_allocated": 5}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert dataclasses.replace(machine, device=torch.device("cuda")).available_memory() == 35
    if platform.libc_ver()[0] == "glibc":
        used = [torch.ones(1 << 20) for _ in range(64)]  # 4 MB each
        before = resident()
        del used
        machine.available_memory()
        assert resident() < before - 200e6


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
@pytest.mark.parametrize("where", ["", "jobs/one"])
def test_the_limit_of_a_container_counts(monkeypatch, tmp_path, where) -> None:
    group = tmp_path / where
    group.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cgroup").write_text(f"1:cpu:/old\n0::/{where}\n")
    monkeypatch.setattr(runtime, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(runtime, "_CGROUPS", tmp_path)
    machine = Runtime.detect(Run(device="cpu", compile="off"), 1)
    free = machine.available_memory()
    assert free > 100_000_000
    (group / "memory.current").write_text("5000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 2000000\n")
    for limit, expected in (("9000000", 6_000_000), ("1000000", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert machine.available_memory() == expected
    (group / "memory.max").write_text("max\n")
    assert machine.available_memory() > 100_000_000


@pytest.mark.parametrize("hours", ["soon", "nan", "-1", "inf"])
def test_the_verb_refuses_invalid_hours(capsys, hours: str) -> None:
    assert main(["plan", "tiny", "--hours", hours]) == 2
    found = capsys.readouterr()
    assert "--hours" in found.err and not found.out


def test_the_verb_refuses_a_folder_that_is_no_data(capsys, tmp_path) -> None:
    assert main(["plan", "tiny", "--data", str(tmp_path / "none")]) == 66
    assert main(["plan", "tiny", "--data", str(tmp_path)]) == 65
    assert "sota prepare" in capsys.readouterr().err


def test_token_files_of_other_projects_count_too(tmp_path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert plan.training_tokens(tmp_path) == 1000 and plan.training_tokens(Path()) == 0


def test_other_presets_are_measured_like_the_run(monkeypatch) -> None:
    """On the requested device, threads and precision, not on those of a plain preset."""
    seen = []
    monkeypatch.setattr(plan, "measure", lambda config: seen.append(config) or SPEED)
    config = PRESETS["16m"]()
    here = {"device": "cpu", "threads": 1, "dtype": "float32"}
    asked = change(config, document_mask=True, **here)
    list(plan.compare(asked, "16m", SPEED, hours=1.0, there=0))
    assert len(seen) == 2
    assert all((other.run, other.data) == (asked.run, asked.data) for other in seen)


def test_the_best_command_is_the_run_that_was_measured(monkeypatch, capsys, data, tmp_path) -> None:
    """With the data and all options set, ready to be pasted; and none if none fits."""
    folder = tmp_path / "my data"
    folder.symlink_to(data)
    monkeypatch.setattr(plan, "step_seconds", lambda *more: (2.0, 1.0))
    monkeypatch.setattr(plan, "useful_epochs", lambda *more: 10_000)  # else the text ends the run
    asked = ["16m", "--recipe", "fast", "--data", str(folder), "--device", "cpu"]
    asked += ["--run.compile", "off", "--train.batch-rows", "4", "--data.document-mask"]
    assert main(["plan", *asked, "--hours", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(" 16m: 1,024 tokens/s, 180 steps of 4 x 512," in line for line in lines)
    words = shlex.split(lines[-1].partition("best: ")[2])
    assert words[:2] == ["sota", "train"]
    own, best = resolve(asked, "train"), resolve(words[2:], "train")
    assert best == change(own, steps=180)
    assert main(["plan", *asked, "--hours", "0.0001"]) == 0
    assert "best: none; not even one step" in capsys.readouterr().out


def test_activation_checkpointing_is_measured(monkeypatch) -> None:
    seen, config = [], PRESETS["tiny"]()
    monkeypatch.setattr(Runtime, "optimize", lambda _, model, masked: seen.append(model))
    for recomputed in (True, False):
        plan.measure(change(config, gradient_checkpointing=recomputed))
        assert seen.pop().gradient_checkpointing == recomputed


def test_the_verb_plans(capsys, data) -> None:
    assert main(["plan", "tiny", "--data", str(data), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for word in ("speed:", "time:", "data:", "disk:", "balance:", "expected loss:", "memory:"):
        assert word in printed


def test_padding_does_not_count_as_data_as_in_training(monkeypatch, capsys, make_run) -> None:
    config = make_run(windows="best-fit", steps=500)
    monkeypatch.setattr(plan, "step_seconds", lambda *more: (2.0, 1.0))
    plan.run_plan(config, "tiny", 0)
    planned = capsys.readouterr().out
    train_until(config, 1)
    trained = capsys.readouterr().out
    (run,) = re.findall("^run: .*", trained, re.M)
    (epochs,) = re.findall(r"([0-9.]+) epochs;", trained)
    assert float(re.findall("([0-9.]+)% padding", trained)[0]) > 1
    assert run in planned.splitlines()
    assert f"read {epochs} times" in planned


def test_the_time_budget_is_met_by_fewer_rows(monkeypatch, capsys) -> None:
    """20 ms per step and 10 ms per row: 300 ms hold 28 rows, 24 in whole micro-batches."""
    times = {4: (0.06, 0.02), 8: (0.10, 0.02)}
    measured = []

    def step_seconds(_config, _runtime, rows) -> tuple[float, float]:
        measured.append(rows)
        return times[rows]

    monkeypatch.setattr(plan, "step_seconds", step_seconds)
    config = PRESETS["16m"]()  # not compiled: even trying takes seconds
    config = change(config, compile="off")

    def fit(seconds: float) -> tuple[int, int]:
        fitted = plan.fit_budget(config, seconds)
        return fitted.train.batch_rows, fitted.model.seq_len

    assert (fit(300), measured) == ((24, 512), [4, 8])
    measured.clear()
    assert fit(46) == (2, 640)  # 26 ms after the 20: 2.6 rows
    assert fit(28) == (1, 384)  # 0.8 of a row
    assert not capsys.readouterr().out
    assert fit(10) == (1, 256)
    assert "1,000 steps of half a window take 25 seconds" in capsys.readouterr().out
    assert measured == [4, 4, 4]  # if few fit, no second shape is compiled
