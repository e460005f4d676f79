"""What is known of single devices, and what is done about it: precision, memory, sleep."""

import dataclasses
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from sota_transformer import doctor, plan
from sota_transformer.cli import guarded
from sota_transformer.config import Run, RunConfig
from sota_transformer.errors import TEMPORARY, SotaError
from sota_transformer.model.muon import NorMuon
from sota_transformer.model.optim import optimizers
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime, out_of_memory
from sota_transformer.training import start
from sota_transformer.training.micro_batch import micro_rows
from tests.simulated import SHAPE, simulated, small
from tests.training_runs import MakeRun


def test_float16_keeps_the_direction_of_a_small_gradient() -> None:
    """A gradient with entries of about 1e-6, where float16 has steps of 6e-8."""
    source = torch.Generator().manual_seed(2)
    gradient = torch.randn(64, 64, generator=source) * torch.logspace(-6, -9, 64)
    updates = []
    for dtype in (torch.float32, torch.float16):
        weight = torch.zeros(64, 64)
        weight.grad = gradient.clone()
        muon = NorMuon([(weight, [64])], weight_decay=0.0, dtype=dtype)
        muon.param_groups[0]["lr"] = 0.1
        muon.step()
        updates.append(weight.flatten())
    assert F.cosine_similarity(*updates, dim=0) > 0.98


def test_bfloat16_on_mps_keeps_normuon_in_float32(monkeypatch) -> None:
    with simulated("mps"):
        model = small().to("mps")
        model.dtype = torch.bfloat16
        assert optimizers(model, PRESETS["tiny"]("fast").optim)[0]._dtype == torch.float32


def test_a_gpu_also_compiles_what_surrounds_the_blocks(monkeypatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f.__name__) or f)
    machine = Runtime.detect(Run(device="cpu", compile="off"), 1)
    machine = dataclasses.replace(machine, device=torch.device("cuda"), compile=True)
    machine.optimize(model := small())
    assert sorted(compiled) == sorted(["begin", "end", *["mix", "feed"] * SHAPE.layers])
    assert not any(block.attention.compiled_on_cpu for block in model.blocks)
    plain = machine.without_compiling("a fault")
    assert len(plain.reasons) == 3 and "a fault" in plain.reasons[2]
    plain.optimize(model)
    assert not {"begin", "end"} & set(vars(model))


def test_cudnn_attention_is_for_compiled_training_only(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    planned = torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, and its first choice on Hopper
    with simulated("cuda"):
        machine = Runtime.detect(Run(compile="off"), 1)
        assert not planned()  # generation, evaluation
        machine = dataclasses.replace(machine, compile=True)
        machine.optimize(small())
        assert planned()
        with machine.uncompiled():
            assert not planned()
        assert planned()
        machine.optimize(small(), masked=True)
        with machine.uncompiled():
            pass
        assert not planned()
        machine.without_compiling("a fault").optimize(small())
        assert not planned()


def test_no_product_that_a_mac_gets_wrong_is_used(make_run: MakeRun) -> None:
    """A weight's gradient sums over the tokens of a micro-batch."""
    with simulated("mps"):
        machine = Runtime.detect(Run(device="mps"), 1)
        assert micro_rows(make_run(batch_rows=1024, micro_rows=512), machine) == 512
        with pytest.raises(SotaError, match="use 1022 or fewer"):
            micro_rows(make_run(batch_rows=1024, micro_rows=1024), machine)
        with pytest.raises(SotaError, match="shorten"):
            micro_rows(make_run(batch_rows=1, seq_len=40_000), machine)


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
@pytest.mark.parametrize("world", [1, 3])
def test_a_micro_batch_is_the_largest_share_that_the_device_is_given(
    make_run: MakeRun, kind: str, world: int
) -> None:
    """2,048 tokens on a CPU, 8,192 on a Mac and 32,768 on a GPU; every share is the same."""
    machine = Runtime.detect(Run(device="cpu", compile="off"), 1)
    machine = dataclasses.replace(machine, device=torch.device(kind), world=world)
    most = {"cpu": 64, "mps": 256, "cuda": 1024}[kind]  # windows of 32 tokens
    for mine in (1, 7, 64, 120, 400, 997, 1030):
        config = make_run(batch_rows=mine * world)
        shares = [rows for rows in range(1, mine + 1) if mine % rows == 0 and rows <= most]
        assert micro_rows(config, machine) == shares[-1]
    assert (
        micro_rows(make_run(batch_rows=world, seq_len=40_000 if kind == "cuda" else 9000), machine)
        == 1
    )
    with pytest.raises(SotaError, match="must divide the 4 rows of a process"):
        micro_rows(make_run(batch_rows=4 * world, micro_rows=3), machine)
    if world > 1:
        with pytest.raises(SotaError, match="must be divisible by 3 processes"):
            micro_rows(make_run(batch_rows=4), machine)


@pytest.mark.parametrize(("kind", "said"), [("mps", "one process"), ("cuda", "--nproc-per-node 1")])
def test_torchrun_with_too_few_devices_is_one_line(monkeypatch, kind: str, said: str) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with simulated(kind), pytest.raises(SotaError, match=said):
        Runtime.detect(Run(device=kind), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: no kernel image is available for execution",
        "HIP error: invalid device function",
    ],
)
def test_a_gpu_that_torch_was_not_built_for_is_not_used(monkeypatch, said: str) -> None:
    """Like a GTX 1080 or a V100 with the builds for CUDA 13, which is_available() does not tell.

    Nor does ROCm's for the integrated graphics of many a Ryzen (pytorch#164346, #147626).
    """

    def ones(*_: Any, **__: Any) -> None:
        raise RuntimeError(said)

    with simulated("cuda"), monkeypatch.context() as patch:
        patch.setattr(torch, "ones", ones)
        machine = Runtime.detect(Run(), 1)
        assert machine.device.type == "cpu" and "no kernels for the simulated" in machine.reasons[0]
        with pytest.raises(SotaError, match="--device cpu"):
            Runtime.detect(Run(device="cuda"), 1)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SotaError, match="--device cpu"):
            Runtime.detect(Run(), 1)


def test_a_mac_runs_out_of_memory_before_it_swaps(monkeypatch) -> None:
    limits: list[float] = []
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    with (
        simulated("mps"),
        mock.patch.object(torch.mps, "set_per_process_memory_fraction", limits.append),
    ):
        Runtime.detect(Run(device="mps"), 1)
        monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "1.2")  # an explicit setting wins
        Runtime.detect(Run(device="mps"), 1)
    assert limits == [1.0]


def test_a_mac_stays_awake_as_long_as_the_run(tmp_path: Path, monkeypatch) -> None:
    calls, tool = tmp_path / "calls", tmp_path / "caffeinate"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        start._stay_awake()
    deadline = time.monotonic() + 20
    while not (calls.exists() and calls.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert calls.read_text() == f"-i -s -w {os.getpid()}\n"


def test_the_doctor_checks_again_after_a_macos_update(tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(doctor, "arithmetic", lambda _: asked.append("asked") or [])
    with simulated("mps"):
        for version in ("15.5", "15.5", "26.1"):
            monkeypatch.setattr("platform.mac_ver", lambda version=version: (version, "", ""))
            doctor.admit(tmp_path, Runtime.detect(Run(device="mps"), 1))
    assert len(asked) == 2


def test_a_gpu_in_wsl_runs_out_of_its_own_memory(monkeypatch) -> None:
    """Beyond it, Windows lends the machine's; then nothing would reduce the micro-batch."""
    limits: list[Any] = []
    with simulated("cuda"):
        patch = partial(monkeypatch.setattr, torch.cuda)
        patch("set_per_process_memory_fraction", lambda *given: limits.append(given))
        patch("mem_get_info", lambda *_: (9 << 30, 12 << 30))  # Windows shows a desktop on it
        patch("memory_reserved", lambda *_: 1 << 30)  # by this process, earlier
        Runtime.detect(Run(), 1)
        assert limits == []
        monkeypatch.setattr("platform.release", lambda: "6.6.87.2-microsoft-standard-WSL2")
        Runtime.detect(Run(), 1)
    assert limits == [(10 / 12, torch.device("cuda", 0))]


@pytest.mark.parametrize(
    "message",
    [
        "MPS backend out of memory (MPS allocated: 40.00 GB, other allocations: 8.00 GB)",
        "Invalid buffer size: 48.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "unable to mmap 256000080 bytes from file <x.safetensors>: Cannot allocate memory (12)",
    ],
)
def test_every_wording_of_out_of_memory_is_recognized(message: str, capsys) -> None:
    for error in (RuntimeError(message), MemoryError()):

        def work(error: Exception = error) -> int:
            raise error

        assert out_of_memory(error)
        assert guarded(work) == TEMPORARY
        assert "out of memory" in capsys.readouterr().err


def test_a_plan_halves_the_micro_batch_as_training_does(monkeypatch) -> None:
    """A card that holds two windows: the plan multiplies the time of two by four."""

    def step_seconds(_config: RunConfig, _runtime: Runtime, rows: int) -> tuple[float, float]:
        if rows > 2:
            raise torch.OutOfMemoryError("no room")
        return 1.5, 0.5

    monkeypatch.setattr(plan, "step_seconds", step_seconds)
    config = PRESETS["tiny"]()
    assert config.train.batch_rows == 8
    assert plan.measure(config).seconds == 4 * 1.0 + 0.5
