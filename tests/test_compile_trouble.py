"""Trouble with torch.compile costs speed, never a run or a correct result; on every device."""

import contextlib
import dataclasses
import getpass
import json
import os
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sota_transformer import doctor, plan, probes, runtime
from sota_transformer.config import Model, Run, RunConfig
from sota_transformer.doctor import admit
from sota_transformer.options import Doctor
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime, in_short, link_from_any_folder, out_of_memory
from sota_transformer.training import judge, trainer
from sota_transformer.training.start import train
from tests.simulated import simulated
from tests.training_runs import MakeRun, logged

KINDS = ["cpu", "cuda", "mps"]
SHAPE = Model(layers=2, d_model=64, heads=2, kv_heads=2, d_ff=64, seq_len=24, vocab_size=300)


class TroubleError(Exception):
    """Not a RuntimeError: Triton raises such."""


class Backward(torch.autograd.Function):
    """A backward pass that is compiled when first needed, and fails to compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise TroubleError("out of resource: shared memory,\n Required: 1")


def compiler(fault: str) -> Callable[..., Any]:
    """torch.compile with a fault when it compiles the model."""

    def compile_(function: Any, **_: Any) -> Any:
        if function.__name__ not in ("mix", "feed"):
            return function

        def compiled(*args: Any) -> Any:
            if fault == "raises":
                raise TroubleError("backend='inductor' raised:\nno Triton")
            y = function(*args)
            return Backward.apply(y) if fault == "raises later" else y * 1.05

        return compiled

    return compile_


@pytest.fixture
def faulty(kind: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device of this kind whose torch.compile has this fault."""
    monkeypatch.setattr(judge, "_SAMPLE_TOKENS", 2)
    monkeypatch.setattr(torch, "compile", compiler(fault))
    with simulated(kind) if kind != "cpu" else contextlib.nullcontext():
        yield


def figures(config: RunConfig) -> list[float]:
    return [line[name] for name in ("loss", "val_loss") for line in logged(config, name)]


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["raises", "raises later"])
def test_what_cannot_be_compiled_is_trained_uncompiled(
    make_run: MakeRun, capsys, kind: str, fault: str
) -> None:
    common = {"device": kind, "steps": 3, "batch_rows": 4, "micro_rows": 2}
    plain = make_run("plain", compile="off", **common)
    train(plain)
    capsys.readouterr()
    config = make_run("on", compile="on", **common)
    train(config)
    said = [x for x in capsys.readouterr().out.splitlines() if "torch.compile failed" in x]
    event = logged(config, "not compiled")[0]
    assert figures(config) == figures(plain)
    assert len(said) == 1 and event["step"] == 0 and event["reason"] in said[0]
    assert ("no Triton" if fault == "raises" else "resource: shared memory, Req") in said[0]
    manifest = config.run.out / "checkpoints/step-00000003/manifest.json"
    assert json.loads(manifest.read_text())["numerics"]["compile"] is False
    tiny = dataclasses.replace(PRESETS["tiny"]("fast"), model=SHAPE)
    run = Run(device=kind, compile="on", dtype="float32")  # type: ignore[arg-type]
    taken = plan.step_seconds(tiny, Runtime.detect(run, 1), rows=2, steps=1)
    assert taken > (0, 0) and capsys.readouterr().err.count("torch.compile failed") == 1


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize(
    ("kind", "fault"), [("cpu", "raises"), *((kind, "is wrong") for kind in KINDS)]
)
def test_miscompiled_code_is_never_used(
    make_run: MakeRun, monkeypatch, capsys, kind: str, fault: str
) -> None:
    """The doctor detects it, and training runs uncompiled, at this start and the next.

    The larger checks for a real GPU would take the CPU behind this one long.
    """
    asked = probes.one_step
    monkeypatch.setattr(probes, "one_step", lambda machine, _: asked(machine, "cpu"))
    plain = make_run("plain", compile="off", device=kind, steps=2)
    train(plain)
    config = make_run("on", compile="on", device=kind, steps=2)
    capsys.readouterr()
    train(config, admit)
    said = [x for x in capsys.readouterr().out.splitlines() if "not compiled" in x]
    assert len(said) == 1 and said[0].startswith("machine: ")
    assert ("loss off by" if fault == "is wrong" else "no Triton") in said[0]
    assert figures(config) == figures(plain)
    verdict = json.loads((config.run.out / "doctor.json").read_text())
    wrong = [line["name"] for line in verdict["checks"] if not line["passed"]]
    assert verdict["passed"] and wrong == [doctor._COMPILED]
    # Once fixed, the same run is checked again and compiles.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    machine = Runtime.detect(config.run, 1)
    assert machine.compile and admit(config.run.out, machine).compile


def test_a_user_without_a_name_can_load_the_compiler(monkeypatch) -> None:
    """As under `docker --user 1234`: torch before 2.13 needs the name to create an optimizer."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # registers it to be restored
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    Runtime.detect(Run(device="cpu"), 1)
    assert getpass.getuser() == str(2**31 - 7)


def test_a_compiler_error_is_shortened() -> None:
    said = "CppCompileError: C++ compile error\n\nCommand:\ng++ -O3 a.cpp\n\nOutput:\nkilled\n"
    said += "\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this)"
    assert in_short(TroubleError(said)) == "CppCompileError: C++ compile error killed"
    assert in_short(TroubleError()) == "TroubleError"


def test_a_compiler_out_of_memory_is_compiler_trouble() -> None:
    """Smaller micro-batches would not help it."""
    said = "CppCompileError: C++ compile error\n\nOutput:\ncc1plus: out of memory allocating 9"
    assert not out_of_memory(RuntimeError(said))


def test_a_machine_without_a_working_compiler_passes(monkeypatch, capsys, tmp_path) -> None:
    checks = [
        doctor.Check(name="torch", passed=True, detail="x"),
        doctor.Check(name=doctor._COMPILED, passed=False, detail="loss off", advice="nothing"),
    ]
    monkeypatch.setattr(doctor, "check", lambda _: checks)
    assert doctor.run_doctor(Doctor(folder=tmp_path)) == 0
    assert "fit for training, without torch.compile" in capsys.readouterr().out
    checks.append(doctor.Check(name="attention", passed=False, detail="wrong"))
    assert doctor.run_doctor(Doctor(folder=tmp_path)) == 70
    assert "not fit for training; failed: attention" in capsys.readouterr().out


def test_an_error_that_is_not_the_compilers_is_raised(make_run: MakeRun, monkeypatch) -> None:
    """It recurs without compiling and is raised unchanged."""

    def broken(*_: Any, **__: Any) -> None:
        raise TroubleError("a broken device")

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(trainer, "token_loss", broken)
    with pytest.raises(TroubleError, match="a broken device"):
        train(make_run(compile="on"))


def test_no_process_compiles_if_the_first_does_not(make_run: MakeRun, monkeypatch) -> None:
    """The first process tells the second to restart without compiling."""
    original = Runtime.sum_

    def told(self: Runtime, tensor: Tensor) -> Tensor:
        choice = tensor.shape == (2,) and tensor.dtype == torch.int64
        return torch.tensor([-1, 0]) if choice else original(self, tensor)

    monkeypatch.setattr(runtime, "launched", lambda name, least: int(name == "RANK") or least)
    monkeypatch.setattr(Runtime, "sum_", told)
    monkeypatch.setattr(torch, "compile", compiler("is wrong"))
    used: list[bool] = []

    def watched(self: Runtime, *_: Any) -> None:
        used.append(self.compile)
        raise TroubleError

    monkeypatch.setattr(Runtime, "optimize", watched)
    config = make_run(compile="on", steps=1)
    config.run.out.mkdir()
    with pytest.raises(TroubleError):
        train(config)
    assert used == [False]


def test_the_linker_finds_libraries_in_a_folder_with_a_space() -> None:
    """In a clone in "my project", -L of .venv was two words to the linker, and nothing compiled."""
    from torch._inductor.cpp_builder import BuildOptionsBase, CppBuilder

    link_from_any_folder()
    link_from_any_folder()  # each runtime asks for it
    options = BuildOptionsBase(compiler="g++", libraries_dirs=["/my project/lib", "/ü/lib"])
    command = CppBuilder("name", ["source.cpp"], options).get_command_line()
    assert {"-L/my project/lib", "-L/ü/lib"} <= set(shlex.split(command))
