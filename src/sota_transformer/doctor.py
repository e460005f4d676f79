"""Is this machine fit for training? Every check computes something and compares the result.

The device's arithmetic is compared with the CPU's: the probes of `probes.py`, and a forward and
backward pass of the model itself. `run_doctor` prints the table; training calls `admit` before it
trusts a device.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sota_transformer import durable, probes
from sota_transformer.config import Run
from sota_transformer.errors import DIVERGED, SotaError
from sota_transformer.options import Doctor
from sota_transformer.runtime import Runtime, in_short, out_of_memory

_VERDICT = "doctor.json"
_MODEL = "model forward and backward"
_COMPILED = f"{_MODEL}, compiled"
_DISK_BYTES = 64 << 20
_SLOW_DISK = 20e6  # bytes/s below which a 125M checkpoint takes over a minute


class Check(NamedTuple):
    """One line of the table."""

    name: str
    passed: bool
    detail: str
    advice: str = ""


def run_doctor(options: Doctor) -> int:
    """Print the table; return 0 if the machine is fit, else 70."""
    checks = check(options)
    table = Table("", "check", "result", "what to do")
    for line in checks:
        mark = "[green]pass[/]" if line.passed else "[red]FAIL[/]"
        table.add_row(mark, line.name, line.detail, line.advice if not line.passed else "")
    Console().print(table)
    if failed := failures(checks):
        print(f"not fit for training; failed: {', '.join(line.name for line in failed)}")
        return DIVERGED
    without = "" if all(line.passed for line in checks) else ", without torch.compile"
    print(f"this machine is fit for training{without}")
    return 0


def check(options: Doctor) -> list[Check]:
    """All checks of the device that training would use, in table order."""
    runtime = Runtime.detect(Run(device=options.device), parameters=16_000_000)
    choices = (Check("choice", True, reason) for reason in runtime.reasons)
    found = [Check("torch", True, torch.__version__), *choices, *arithmetic(runtime)]
    return [*found, _memory(runtime), *_disk(options.folder)]


def arithmetic(runtime: Runtime) -> list[Check]:
    """The probes and the whole model, on the runtime's device and in its precision."""
    plain = dataclasses.replace(runtime, compile=False)
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    expected = probes.one_step(dataclasses.replace(plain, **cpu), runtime.device.type)
    found = [_probed(name, probe, runtime) for name, probe in probes.PROBES.items()]
    ways = [plain, runtime] if runtime.compile else [plain]
    return [*found, *(_model_check(way, *expected) for way in ways)]


def _probed(name: str, probe: Any, runtime: Runtime) -> Check:
    """Run one probe; its error must be within what the precision explains."""
    limit = {torch.float32: 1e-4, torch.float16: 1e-2}.get(runtime.dtype, 4e-2)
    advice = f"do not train on {runtime.device}; {_instead(runtime)}"
    try:
        torch.manual_seed(0)
        error = probe(runtime.device, runtime.dtype)
    except RuntimeError as problem:
        if out_of_memory(problem):  # another program's; says nothing about the arithmetic
            raise
        return Check(name, False, in_short(problem), advice)
    passed = error <= limit  # False for NaN
    return Check(name, passed, f"error {error:.1e}, limit {limit:.0e}", advice)


def _instead(runtime: Runtime) -> str:
    """What to use if this device computes wrongly."""
    cpu = "" if runtime.device.type == "cpu" else "--device cpu, or "
    return f"use {cpu}another version of torch"


def _model_check(runtime: Runtime, expected_loss: float, expected: list[Tensor]) -> Check:
    """Compare the loss and all gradients of a small model with the CPU's in float32."""
    name = _COMPILED if runtime.compile else _MODEL
    advice = _instead(runtime)
    if runtime.compile:
        advice = "nothing: training skips torch.compile, which is slower but equally correct"
    loss_limit, limit = (1e-4, 1e-3) if runtime.dtype == torch.float32 else (1e-2, 6e-2)
    try:
        loss, gradients = probes.one_step(runtime, runtime.device.type)
    except Exception as problem:  # a compiler or driver may raise anything
        if out_of_memory(problem):
            raise
        return Check(name, False, in_short(problem), advice)
    loss_error = abs(loss - expected_loss) / expected_loss
    gradient_error = probes.farthest(gradients, expected)
    passed = loss_error <= loss_limit and gradient_error <= limit
    detail = f"loss off by {loss_error:.0e} (limit {loss_limit:.0e})"
    detail += f", gradients by {gradient_error:.0e} (limit {limit:.0e})"
    return Check(name, passed, detail, advice)


def _memory(runtime: Runtime) -> Check:
    """Available memory; the 125M preset needs 16 bytes per parameter and some activations."""
    available = runtime.available_memory()
    detail = f"{available / 1e9:.1f} GB available (125m needs about 4 GB, 16m about 1.5)"
    return Check("memory", available > 1e9, detail, "close other programs")


def _disk(folder: Path) -> list[Check]:
    """Free space and the speed of durable writes where runs would live."""
    data = os.urandom(1 << 20)
    probe = folder / f".sota-doctor-{os.getpid()}"
    started = time.perf_counter()
    try:
        free = shutil.disk_usage(folder).free
        file = durable.HashingFile(probe)
        for _ in range(_DISK_BYTES >> 20):
            file.write(data)
        file.close()
        speed = _DISK_BYTES / (time.perf_counter() - started)
    except OSError as error:
        return [Check("disk", False, f"{folder}: {error.strerror}", "give another --folder")]
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    space, rate = f"{free / 1e9:.0f} GB free in {folder.resolve()}", f"{speed / 1e6:.0f} MB/s"
    room = "free disk space: four checkpoints of 125m take 5.9 GB"
    faster = "use another disk, or save less often"
    return [
        Check("disk space", free > 6e9, space, room),
        Check("disk speed", speed > _SLOW_DISK, f"{rate}, durable writes", faster),
    ]


def admit(folder: Path, runtime: Runtime) -> Runtime:
    """The runtime to train with if the device's arithmetic is correct; else SotaError 70.

    Compilation is turned off if only compiled code is wrong. The verdict is cached in the run's
    folder and reused only if every check passed on the same device, precision and torch.
    """
    machine = {k: v for k, v in runtime.describe().items() if k not in ("threads", "world")}
    path = folder / _VERDICT
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        known = json.loads(path.read_text())
        if known["machine"] == machine and all(line["passed"] for line in known["checks"]):
            return runtime
    checks = arithmetic(runtime)
    failed, lines = failures(checks), [line._asdict() for line in checks]
    verdict = {"machine": machine, "passed": not failed, "checks": lines}
    durable.write_file(path, durable.canonical_json(verdict))
    if failed:
        names = "; ".join(f"{line.name}: {line.detail}" for line in failed)
        raise SotaError(
            f"{runtime.device} gives wrong results ({names}); {failed[0].advice}. `sota doctor` "
            "shows all checks",
            DIVERGED,
        )
    wrong = next((line for line in checks if not line.passed), None)
    return runtime.without_compiling(wrong.detail) if wrong else runtime


def failures(checks: list[Check]) -> list[Check]:
    """Failed checks that make a machine unfit; a wrong torch.compile does not."""
    return [line for line in checks if not line.passed and line.name != _COMPILED]
