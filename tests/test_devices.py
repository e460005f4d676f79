"""What a GPU or a Mac would reject or lose, on a simulated device (`simulated.py`)."""

import dataclasses
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchgen

from sota_transformer import doctor, plan, probes, runtime
from sota_transformer.commands.common import open_to_generate
from sota_transformer.config import Run
from sota_transformer.inference.benchmarks import score
from sota_transformer.inference.generate import Rows, generate, make_sampler
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime
from sota_transformer.training import judge, trainer
from sota_transformer.training.start import train
from tests.simulated import SHAPE, DeviceTensor, SimulatedDevice, simulated, small
from tests.training_runs import MakeRun, change, logged

PACKED = {
    "windows": "best-fit", "document_mask": True, "gradient_checkpointing": True, "micro_rows": 2,
}  # fmt: skip


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
