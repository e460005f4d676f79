"""What a GPU or a Mac would reject or lose, on a simulated device (`simulated.py`)."""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchgen

from sota_transformer import doctor, plan, probes, runtime
from sota_transformer.cli import guarded
from sota_transformer.commands.common import open_to_generate
from sota_transformer.config import Model, Run, RunConfig
from sota_transformer.errors import TEMPORARY, SotaError
from sota_transformer.inference.benchmarks import score
from sota_transformer.inference.generate import Rows, generate, make_sampler
from sota_transformer.model.muon import NorMuon
from sota_transformer.model.optim import optimizers
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime, out_of_memory
from sota_transformer.training import judge, trainer
from sota_transformer.training.micro_batch import micro_rows
from sota_transformer.training.start import train
from tests.simulated import DeviceTensor, SimulatedDevice, simulated
from tests.training_runs import MakeRun, change, logged

SHAPE = Model(layers=2, d_model=128, heads=2, kv_heads=1, d_ff=64, seq_len=24, vocab_size=300)
PACKED = {
    "windows": "best-fit", "document_mask": True, "gradient_checkpointing": True, "micro_rows": 2,
}  # fmt: skip


def small() -> Transformer:
    model = Transformer(dataclasses.replace(SHAPE, qk_norm=True))
    model.init_weights(torch.Generator().manual_seed(1))
    return model.eval()


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_simulation_rejects_what_a_device_rejects(kind: str) -> None:
    with simulated(kind):
        away, here = torch.ones(2, device=kind), torch.ones(2)
        assert away.device == torch.device(kind, 0) and not away.is_cpu
        assert (away * torch.ones(())).device.type == kind and (away + 1).cpu().is_cpu
        with pytest.raises(RuntimeError, match="two devices"):
            away + here
        with pytest.raises(RuntimeError, match="two devices"):
            here[away.long()]
        with pytest.raises(TypeError):
            away.numpy()
        if kind == "mps":
            with pytest.raises(TypeError, match="float64"):
                away.double()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("kind", "dtype", "recipe", "more"),
    [
        ("cuda", "bfloat16", "seed", PACKED),
        ("cuda", "float16", "fast", {}),
        ("mps", "float32", "fast", PACKED),
    ],
)
def test_a_run_and_its_resume_equal_the_cpus(
    make_run: MakeRun, monkeypatch, kind: str, dtype: str, recipe: str, more: dict[str, Any]
) -> None:
    """Losses equal the CPU's; same bits after a resume, one wait per step, kernels on MPS."""
    common = {"recipe": recipe, "steps": 3, "eval_tokens": 64, "dropout_start": 0.1, **more}
    plain = make_run("cpu", clip_norm=0.01, **common)
    config = make_run(
        "away",
        device=kind,
        dtype=dtype,
        clip_norm=0.01,
        save_every_steps=2,
        compile="off",
        **common,
    )
    again = change(config, resume="step:2")
    monkeypatch.setattr(judge, "_SAMPLE_TOKENS", 3)
    train(plain)
    waits, original = [], trainer.Trainer._train_step

    def step(self: trainer.Trainer) -> None:
        before = len(SimulatedDevice.now.waits)
        original(self)
        waits.append(SimulatedDevice.now.waits[before:])

    monkeypatch.setattr(trainer.Trainer, "_train_step", step)
    with simulated(kind) as device:
        first, second = train(config), train(again)
        monkeypatch.setattr(runtime, "_COMPILE_FROM_PARAMETERS", 0)
        monkeypatch.setattr(
            torch, "compile", lambda *_, **__: pytest.fail("only training compiles")
        )
        opened = open_to_generate(config.run.out, kind, None, "bfloat16")
        assert len(list(generate(opened.model, [1, 2], make_sampler(0), 3, stop_ids=()))) == 3
    assert first == second and len(waits) == 4
    rounding = 3e-4 if dtype == "float16" else 1e-4
    for name in ("loss", "val_loss"):
        there, here = ([line[name] for line in logged(c, name)] for c in (config, plain))
        assert there[: len(here)] == pytest.approx(here, rel=rounding)
    copies = 0 if kind == "cuda" else 3 + ("document_mask" in more)  # MPS copies at once
    assert [sorted(found) for found in waits] == [["copy to the device"] * copies + ["tolist"]] * 4
    if kind == "mps":
        assert missing_on_mps(device.seen) == []


@pytest.mark.parametrize(
    ("kind", "capability", "dtype"),
    [("cuda", (8, 0), "bfloat16"), ("cuda", (7, 5), "float16"), ("mps", (0, 0), "float32")],
)
def test_each_device_gets_a_dtype_that_it_supports(
    kind: str, capability: tuple[int, int], dtype: str
) -> None:
    with simulated(kind, capability):
        machine = Runtime.detect(Run(), 1)
    assert (machine.device.type, machine.dtype) == (kind, getattr(torch, dtype))


def missing_on_mps(operations: Iterable[Any]) -> list[str]:
    """Operations without an MPS kernel in torch's own table; attention has other names there."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    blocks = {b.split("(")[0]: b for b in table.read_text().split("\n- func: ")}
    found = []
    for operation in operations:
        name = str(operation).removeprefix("aten.").removesuffix(".default")
        block = blocks.get(name, "")
        if delegate := re.search("structured_delegate: (.*)", block):
            block += blocks[delegate[1]]
        if "attention" not in name and not re.search(r"\bMPS\b|Composite", block):
            found += [name] if "dispatch:" in block or not block else []
    return found


def test_an_operation_without_a_kernel_is_found() -> None:
    assert missing_on_mps([torch.ops.aten.geqrf.default, torch.ops.aten.mm.default]) == ["geqrf"]


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", "bfloat16"), ("mps", "float32")])
def test_the_doctor_and_the_plan_run_on_a_device(monkeypatch, kind: str, dtype: str) -> None:
    """A GPU gets larger checks, which would take the CPU behind this one minutes."""
    config = dataclasses.replace(PRESETS["tiny"]("fast"), model=SHAPE)
    original, asked = probes.one_step, []

    def one_step(machine: Runtime, kind: str) -> Any:
        asked.append(kind)
        return original(machine, "cpu")

    monkeypatch.setattr(probes, "one_step", one_step)
    with simulated(kind):
        run = Run(device=kind, dtype=dtype, compile="off")  # type: ignore[arg-type]
        machine = Runtime.detect(run, 1)
        checks = doctor.arithmetic(machine)
        assert plan.step_seconds(config, machine, rows=2, steps=1) > (0, 0)
    assert [check for check in checks if not check.passed] == []
    assert asked == [kind] * 2


@pytest.mark.parametrize(
    ("kernel", "recipe"),
    [("_fused_adamw_", "seed"), ("_foreach_lerp_", "fast"), ("_foreach_add_", "fast")],
)
def test_the_doctor_detects_a_lost_update(monkeypatch, kernel: str, recipe: Any) -> None:
    """As on MPS, where operations on strided tensors wrote to a copy of them."""
    made = DeviceTensor.__torch_dispatch__

    def lost(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] == kernel:
            return None if kernel.startswith("_foreach") else args[0]
        return made(func, types, args, kwargs)

    for fault in (False, True):
        with simulated("mps"), monkeypatch.context() as patch:
            if fault:
                patch.setattr(DeviceTensor, "__torch_dispatch__", classmethod(lost))
            machine = Runtime.detect(Run(device="mps"), 1)
            probe = partial(probes._probe_update, recipe)
            assert doctor._probed("updates", probe, machine).passed != fault


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_generation_and_evaluation_equal_the_cpus(kind: str, monkeypatch) -> None:
    """Even where masks are misread for few queries, as by MPS in torch 2.11 (pytorch#182285)."""
    original = F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, **options):
        if q.is_mps and attn_mask is not None and attn_mask.dtype == torch.bool and q.shape[2] <= 8:
            attn_mask = torch.ones_like(attn_mask)
        return original(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    pairs = [([5, 6, 7], [8, 9]), ([5, 6, 7], [4]), ([1, 2, 3, 4, 5], [6])]

    def answers(model: Transformer) -> list[Any]:
        rows = Rows(model, 3)
        found = [rows.start(row, list(range(3, 5 + row))) for row in range(3)]
        found += [rows.step([0, 1, 2], [7, 8, 9]), rows.step([2, 0], [1, 2]), rows.step([1], [4])]
        return [*(x.tolist() for x in found), *([s.nats] for s in score(model, pairs))]

    with torch.no_grad():
        expected = answers(small())
        with simulated(kind):
            found = answers(small().to(kind))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-5)


@pytest.mark.parametrize("left", ["zeros", "the last step"])
def test_a_step_that_a_mac_dropped_is_skipped(make_run: MakeRun, monkeypatch, left: str) -> None:
    """torch reports no error then (pytorch#193571), and its sums are whatever the memory held."""
    config = make_run(device="mps", steps=5, eval_tokens=64, compile="off")
    original, seen = trainer.Trainer._gradients, []

    def dropped(self: trainer.Trainer, *given: Any) -> torch.Tensor:
        seen.append(original(self, *given))
        if self.step != 2:
            return seen[-1]
        return seen[-2] if left == "the last step" else torch.zeros_like(seen[-1])

    monkeypatch.setattr(trainer.Trainer, "_gradients", dropped)
    monkeypatch.setattr(judge, "_SAMPLE_TOKENS", 3)
    with simulated("mps"):
        train(config)
    skipped = [line for line in logged(config, "event") if line["event"] == "skipped"]
    assert [(line["step"], line["reason"]) for line in skipped] == [
        (3, "the device did not compute this step")
    ]


@pytest.mark.parametrize("fault", ["", "masks", "gaps", "length"])
def test_the_doctor_detects_faults_of_generation(monkeypatch, fault: str) -> None:
    """Rows that read each other's masks; a cache read as if it had no gaps; many keys."""
    original = F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, **options):
        if q.is_mps and q.shape[2] <= 8:
            if fault == "masks" and attn_mask is not None:
                attn_mask = attn_mask[:1].expand_as(attn_mask)
            elif fault == "gaps":
                k = k.as_strided(k.shape, torch.empty(k.shape).stride())
            elif fault == "length" and k.shape[2] >= 1024:
                k = k.roll(1, 2)
        return original(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with simulated("mps"):
        machine = Runtime.detect(Run(device="mps"), 1)
        check = doctor._probed("generation", probes._probe_generation, machine)
    assert check.passed == (not fault)


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
    machine.without_compiling("a fault").optimize(model)
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
        runtime.stay_awake()
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
