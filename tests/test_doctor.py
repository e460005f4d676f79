"""The doctor passes a sound machine and catches an operation that is silently wrong."""

import dataclasses
import json
import math
import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sota_transformer import doctor, durable, probes
from sota_transformer.cli import main
from sota_transformer.config import Run, RunConfig
from sota_transformer.errors import DIVERGED, TEMPORARY, SotaError
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime
from sota_transformer.training.start import train
from tests.simulated import simulated


def runtime(dtype: str = "bfloat16") -> Runtime:
    return Runtime.detect(Run(device="cpu", dtype=dtype, compile="off"), 1)


def failed(checks: list[doctor.Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_a_sound_machine_passes() -> None:
    """The next test covers bfloat16: there everything passes except what was broken."""
    checks = doctor.arithmetic(runtime("float32"))
    assert failed(checks) == []
    assert not any("--device cpu" in check.advice for check in checks)  # it is the one that failed


def test_half_precision_keeps_small_gradients() -> None:
    """Without training's loss scale they would be off by four fifths of the limit."""
    machine = dataclasses.replace(runtime("float32"), dtype=torch.float16)
    expected, found = (probes.one_step(m, "cpu") for m in (runtime("float32"), machine))
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert probes.farthest(found[1], expected[1]) < 0.01


def test_the_checks_for_a_gpu_are_large_enough() -> None:
    """For inductor's mixed-order reductions: enough elements, and two rows per column."""
    loss, gradients = probes.one_step(runtime("float32"), "cuda")
    assert loss == pytest.approx(math.log(1024), rel=0.05)
    width, tokens = gradients[0].shape[1], 84 * 128
    assert width * tokens >= 5 * 2**20 and tokens >= 2 * width


@pytest.mark.parametrize("what", ["gradients", "updates"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_tensor_of_nan_is_caught(monkeypatch, what: str, place: int) -> None:
    """Python's max skips NaN unless it comes first."""
    machine = runtime()
    name = {"gradients": "one_step", "updates": "_updated"}[what]
    original = getattr(probes, name)

    def broken(*given):
        found = original(*given)
        if machine in given or machine.dtype in given:
            (found if what == "updates" else found[1])[place].fill_(torch.nan)
        return found

    monkeypatch.setattr(probes, name, broken)
    lines = failed(doctor.arithmetic(machine))
    expected = ["model forward and backward"]
    if what == "updates":
        expected = ["updates of AdamW", "updates of NorMuon and AdamW"]
    assert lines == expected


def broken_silu(x, original=F.silu):
    return original(x) * (1.1 if x.dtype == torch.bfloat16 else 1.0)


def broken_attention(q, k, v, original=F.scaled_dot_product_attention, **options):
    y = original(q, k, v, **options)
    return y.roll(1, dims=2) if y.dtype == torch.bfloat16 else y


def broken_linear(x, weight, bias=None, original=F.linear):
    y = original(x, weight, bias)
    if x.dtype == torch.bfloat16 and weight.shape[0] > 50_000 and x.shape[0] > 8:
        y = y.clone()
        y[8:] = 0
    return y


@pytest.mark.parametrize("errors", [(0.0, torch.nan), (torch.nan, 0.0)])
def test_one_product_of_nan_is_caught(monkeypatch, errors) -> None:
    left = list(errors)
    monkeypatch.setattr(probes, "_error", lambda *_: left.pop(0))
    assert not doctor._probed("batched", probes._probe_batched, runtime()).passed


@pytest.mark.parametrize(
    ("name", "fault", "caught"),
    [
        ("silu", broken_silu, "model forward"),
        ("scaled_dot_product_attention", broken_attention, "attention"),
        ("linear", broken_linear, "vocabulary head"),
    ],
)
def test_one_wrong_operation_is_caught(monkeypatch, name, fault, caught) -> None:
    """Wrong only in bfloat16, like a device's kernel; the reference stays correct."""
    monkeypatch.setattr(F, name, fault)
    assert any(caught in line for line in failed(doctor.arithmetic(runtime())))


def test_training_refuses_a_device_that_failed(
    make_run: Callable[..., RunConfig], monkeypatch
) -> None:
    """Through `train`, as the command line calls it; once sound again, the same folder trains."""
    config = make_run(dtype="bfloat16", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(F, "silu", broken_silu)
        with pytest.raises(SotaError, match="gives wrong results") as caught:
            train(config, doctor.admit)
    assert caught.value.code == DIVERGED
    verdict = config.run.out / "doctor.json"
    assert json.loads(verdict.read_text())["passed"] is False
    assert not (config.run.out / "metrics.jsonl").exists()
    assert train(config, doctor.admit) is not None
    assert json.loads(verdict.read_text())["passed"] is True


@pytest.mark.parametrize("where", ["_updated", "one_step"])
def test_a_full_device_is_not_a_wrong_one(monkeypatch, capsys, tmp_path: Path, where: str) -> None:
    """A GPU whose memory another program has taken: close it, nothing is broken."""
    original, calls = getattr(probes, where), []

    def full(*given):
        calls.append(given)
        if len(calls) == 2:  # the first computes what to expect, on the CPU
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return original(*given)

    monkeypatch.setattr(probes, where, full)
    assert main(["doctor", "--folder", str(tmp_path), "--device", "cpu"]) == TEMPORARY
    assert "out of memory; close other programs" in capsys.readouterr().err


def test_a_verdict_is_valid_for_its_machine_only(tmp_path: Path, monkeypatch) -> None:
    doctor.admit(tmp_path, runtime("float32"))
    monkeypatch.setattr(doctor, "arithmetic", lambda _: pytest.fail("asked again"))
    doctor.admit(tmp_path, runtime("float32"))
    with pytest.raises(pytest.fail.Exception):
        doctor.admit(tmp_path, runtime("bfloat16"))


@pytest.mark.parametrize("name", ["none", "file", "file/inside", "long" * 99])
def test_an_invalid_folder_is_a_line_of_the_table(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    (found,) = doctor._disk(tmp_path / name)
    assert not found.passed and name in found.detail and "--folder" in found.advice


def test_the_required_disk_space_is_that_of_a_125m_run(tmp_path: Path, monkeypatch) -> None:
    """As in `sota plan`: two checkpoints to keep, the best, and one being written."""
    monkeypatch.setattr(doctor, "_DISK_BYTES", 1 << 20)
    needed = 4 * PRESETS["125m"]().state_bytes
    for free, fits in ((needed - 2e8, False), (needed + 2e8, True)):
        room = types.SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, room=room: room)
        assert doctor._disk(tmp_path)[0].passed == fits


def watch(seconds: float) -> types.SimpleNamespace:
    """A clock that is read when something begins and when it ends."""
    return types.SimpleNamespace(perf_counter=iter([10.0, 10.0 + seconds]).__next__)


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        ([], 0, "this machine is fit for training\n"),
        (["compiled"], 0, "this machine is fit for training, without torch.compile\n"),
        (["softmax", "compiled"], DIVERGED, "not fit for training; failed: softmax\n"),
    ],
)
def test_the_answer_of_the_doctor(monkeypatch, capsys, tmp_path: Path, wrong, code, says) -> None:
    """Advice is for what failed; the disk is that of --folder, and 64 MiB in 3 s are enough."""
    lines = {"softmax": "softmax", "compiled": doctor._COMPILED}
    checks = [
        doctor.Check(line, name not in wrong, "found", f"do-{name}") for name, line in lines.items()
    ]
    monkeypatch.setenv("COLUMNS", "300")
    asked: list[str] = []
    monkeypatch.setattr(
        doctor, "arithmetic", lambda machine: asked.append(machine.device.type) or checks
    )
    monkeypatch.setattr(doctor, "time", watch(3.0))
    monkeypatch.setattr("sota_transformer.runtime._compile", lambda *given: (False, str(given)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=7e9))
    monkeypatch.setattr(Runtime, "available_memory", lambda _: 2_500_000_000)
    with simulated("mps"):  # is there, and not asked for
        assert main(["doctor", "--device", "cpu", "--folder", str(tmp_path)]) == code
    printed = capsys.readouterr().out
    assert printed.endswith(says) and asked == ["cpu"]
    assert [name for name in lines if f"do-{name}" in printed] == wrong
    assert "22 MB/s" in printed and f"7 GB free in {tmp_path}" in printed
    assert "2.5 GB available" in printed and not list(tmp_path.iterdir())


def test_a_slow_disk_and_little_memory_are_not_enough(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "time", watch(4.0))
    assert failed(doctor._disk(tmp_path)[1:]) == ["disk speed"]
    monkeypatch.setattr(Runtime, "available_memory", lambda _: 900_000_000)
    assert not doctor._memory(runtime()).passed


@pytest.mark.parametrize("damage", ["", "[]", "{}", "[" * 9999, '{"machine": 1, "checks": 2}'])
def test_a_damaged_verdict_is_asked_for_again(tmp_path: Path, monkeypatch, damage: str) -> None:
    asked: list[object] = []
    monkeypatch.setattr(doctor, "arithmetic", lambda machine: asked.append(machine) or [])
    doctor.admit(tmp_path, runtime())
    doctor.admit(tmp_path, dataclasses.replace(runtime(), threads=99))  # which changes no kernel
    assert len(asked) == 1
    (tmp_path / "doctor.json").write_text(damage)
    doctor.admit(tmp_path, runtime())
    assert len(asked) == 2


def test_wrong_compiled_code_is_not_used_at_the_next_start_either(
    tmp_path: Path, monkeypatch
) -> None:
    wrong = doctor.Check(doctor._COMPILED, False, "loss off by 9e-01")
    monkeypatch.setattr(doctor, "arithmetic", lambda _: [wrong])
    machine = dataclasses.replace(runtime(), compile=True)
    for _ in range(2):
        admitted = doctor.admit(tmp_path, machine)
        assert not admitted.compile and wrong.detail in admitted.reasons[2]


@pytest.mark.slow
def test_the_verb_prints_a_table(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(doctor, "_DISK_BYTES", 1 << 20)
    monkeypatch.setenv("COLUMNS", "200")
    code = main(["doctor", "--device", "cpu", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "disk speed" in printed and "pytorch#109457" in printed
    assert code == 0, printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_on_the_disk_under_test(
    monkeypatch, tmp_path: Path, capsys, sign: signal.Signals
) -> None:
    def write(*_: object) -> None:
        assert list(tmp_path.iterdir())
        signal.raise_signal(sign)

    monkeypatch.setattr(doctor, "arithmetic", lambda _: [])
    monkeypatch.setattr(durable.HashingFile, "write", write)
    before = signal.signal(sign, lambda *_: None)
    try:
        assert main(["doctor", "--device", "cpu", "--folder", str(tmp_path)]) == 128 + sign
    finally:
        signal.signal(sign, before)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == "sota: interrupted\n"
