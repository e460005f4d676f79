"""Kernels that are wrong where the doctor once did not look; see `python -m tests.chaos broken`."""

from pathlib import Path

import pytest
import torch

from sota_transformer import doctor, probes
from tests.simulated import simulated

from . import broken
from .kernels import FAULTS

VOCABULARY, ADAMW = "gradient through the vocabulary (pytorch#195163)", "updates of AdamW"
DOCUMENTS = "attention within documents (pytorch#196678)"
GENERATION = "generation of uneven rows (pytorch#182285)"


@pytest.mark.parametrize(
    ("operation", "name", "probe"),
    [
        ("embedding_dense_backward.default", "ids from 32,768 on wrap", VOCABULARY),
        ("mul_.Tensor", "nothing from element 1,048,576 on", VOCABULARY),
        ("masked_fill.Scalar", "booleans are inverted", VOCABULARY),
        ("gather.default", "float32 is 10% off", VOCABULARY),
        ("tril.default", "masks are ignored", DOCUMENTS),
        ("eq.Tensor", "the last block is zero", DOCUMENTS),
        ("add_.Tensor", "few rows are 10% off", GENERATION),
        ("_fused_adamw_.default", "nothing from element 65,536 on", ADAMW),
        ("linalg_vector_norm.default", "float32 is 10% off", ADAMW),
    ],
)
def test_one_wrong_kernel_is_detected(operation: str, name: str, probe: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    case = broken.Breakage("mps", "float32", "seed", f"aten.{operation}", fault, frozenset())
    for compute in (broken.wrong(case), None):
        with simulated("mps") as device:
            machine = broken.machine_of("mps", "float32")
            device.compute = compute or device.compute
            found = doctor._probed(probe, probes.PROBES[probe], machine)
        assert found.passed == (compute is None), found


def test_adamw_is_checked_in_float32_even_for_bfloat16() -> None:
    """A step count that is 3% off is less than bfloat16's rounding."""
    case = broken.Breakage(
        "cuda", "bfloat16", "", "aten._foreach_add_.Scalar", FAULTS[0], frozenset()
    )
    with simulated("cuda") as device:
        device.compute = broken.wrong(case)
        machine = broken.machine_of("cuda", "bfloat16")
        assert not doctor._probed(ADAMW, probes.PROBES[ADAMW], machine).passed


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_changes_something(fault) -> None:
    """At least one of the calls below."""
    aten, ids = torch.ops.aten, torch.tensor([1, 40_000])
    square = torch.arange(1.0, 257).view(16, 16)
    calls = [
        (aten.add_.Tensor, (torch.ones(2, 1 << 20), 1.0)),
        (aten.mul.Tensor, (square.bfloat16(), 2.0)),
        (aten.mul.Tensor, (torch.full((2,), 1 << 20, dtype=torch.int32), 1 << 20)),
        (aten.mm.default, (square[:4].clone(), square.t())),
        (aten.where.self, (square > 3, square, -square)),
        (aten.tril.default, (square,)),
        (aten._foreach_add_.Scalar, ([square.clone(), square.clone()], 1.0)),
        (aten.embedding.default, (torch.arange(50_000.0)[:, None], ids)),
    ]
    changed = 0
    for func, args in calls:
        copies = [x.clone() if func is aten.add_.Tensor and x is args[0] else x for x in args]
        call = broken.Call(func, tuple(copies), {}).make()
        right = [x.clone() for x in call.written]
        if fault.when(call):
            fault.harm(call)
            changed += not all(map(torch.equal, right, call.written))
    assert changed


@pytest.mark.chaos
def test_some_broken_devices_are_rejected(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(broken, "MACHINES", broken.MACHINES[:1])
    result = broken.broken(tmp_path, 12, seed=5)
    assert result.wrong == [] and result.material.total() > 5
