"""Devices with one silently wrong operation: does the doctor reject those that spoil training?

Every operation that real runs execute on a simulated device (`tests/simulated.py`), in training,
`sota evaluate` and `sota generate`, is broken in every way of `kernels.py` that applies to it. If
that changes what the run computes by more than rounding, `doctor.arithmetic` has to fail.
"""

import contextlib
import dataclasses
import io
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sota_transformer import doctor, probes
from sota_transformer.cli import main as command
from sota_transformer.config import Run, RunConfig
from sota_transformer.inference.generate import Rows
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime
from sota_transformer.training import judge, start, trainer
from tests.conftest import pseudo_text
from tests.preparing import run as prepare
from tests.simulated import simulated
from tests.training_runs import change

from .kernels import FAULTS, Call, Fault, computes

MACHINES = [("mps", "float32"), ("cuda", "bfloat16"), ("mps", "bfloat16"), ("cuda", "float32")]
SETTINGS: dict[str, dict[str, Any]] = {
    "seed": {"windows": "best-fit", "document_mask": True, "gradient_checkpointing": True,
             "micro_rows": 2, "kv_heads": 1, "clip_norm": 0.01},
    "fast": {"micro_rows": 4},
}  # fmt: skip
_COMMON = {
    "batch_rows": 4, "steps": 2, "eval_every": 0, "eval_tokens": 256, "sample_every": 0,
    "log_every": 1, "save_every_minutes": 0.0, "threads": 1, "compile": "off",
}  # fmt: skip
_MORE, _LEAST = 2.0, 1e-3  # material: more than this many roundings and this share
_COMMANDS = ["evaluate", "--json"], ["generate", "--prompt", "The", "--max-tokens", "2"]
Figures = dict[str, list[Tensor]]


class Breakage(NamedTuple):
    """One operation of one device, and its fault."""

    kind: str
    dtype: str
    setting: str
    operation: str
    fault: Fault
    roles: frozenset[str]

    def __str__(self) -> str:
        where = f"{self.kind} {self.dtype} {self.setting}"
        return f"{self.operation} ({', '.join(sorted(self.roles))}): {self.fault.name} [{where}]"


@dataclass
class Result:
    """What was broken, what was material, and what the doctor found."""

    operations: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # roles
    tried: int = 0
    material: Counter[str] = field(default_factory=Counter)  # by fault, like the next
    caught: Counter[str] = field(default_factory=Counter)
    by: Counter[str] = field(default_factory=Counter)  # by the check that failed first
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{name:44} {', '.join(sorted(r))}" for name, r in sorted(self.operations.items())]
        lines += [f"{'fault':40} material  caught"]
        lines += [f"{n:40} {self.material[n]:8}  {self.caught[n]:6}" for n in self.material]
        lines += [f"{count:6} by {name}" for name, count in self.by.most_common()]
        total, caught = self.material.total(), self.caught.total()
        return "\n".join(
            [*lines, f"{self.tried} breakages, {total} of them material, {caught} rejected"]
        )


def broken(root: Path, count: int, seed: int) -> Result:
    """Try `count` breakages, drawn from all of them."""
    result, bench = Result(), Bench(root)
    cases = [
        case
        for kind, dtype in MACHINES
        for setting in SETTINGS
        for case in bench.cases(kind, dtype, setting, result)
    ]
    random.Random(seed).shuffle(cases)
    print(f"{len(cases):,} breakages in total", flush=True)
    for case in cases[:count]:
        result.tried += 1
        if (harm := bench.material(case)) is None:
            continue
        result.material[case.fault.name] += 1
        if (by := bench.refused(case)) is not None:
            result.caught[case.fault.name] += 1
            result.by[by] += 1
        else:
            result.wrong.append(f"{case}: {harm}")
            print(f"missed: {case}: {harm}", flush=True)
    return result


class Bench:
    """Data to run on, and what sound devices compute from it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        texts = root / "texts"
        texts.mkdir()
        for number, text in enumerate(pseudo_text(7, 24)):
            (texts / f"{number:02}.txt").write_text(text)
        prepare(root / "data", texts)
        self.sound: dict[tuple[str, ...], tuple[Figures, dict[str, float]]] = {}
        self.asked: dict[tuple[str, str], dict[str, set[str]]] = {}  # operations by check
        self.expected: dict[str, Any] = {}

    def config(self, setting: str, **more: Any) -> RunConfig:
        """The config of a `tiny` run."""
        preset = PRESETS["tiny"](setting)  # type: ignore[arg-type]
        place = {"path": self.root / "data", "out": self.root / "run"}
        return change(preset, **(_COMMON | SETTINGS[setting] | place | more))

    def cases(self, kind: str, dtype: str, setting: str, result: Result) -> list[Breakage]:
        """All breakages that apply to this run; runs it on the CPU and without faults."""
        here = self.lived(self.config(setting, device="cpu", dtype="float32"))
        roles: dict[str, set[str]] = defaultdict(set)
        fitting: dict[str, set[str]] = defaultdict(set)
        now = ["start"]

        def watch(func: Any, args: Any, kwargs: Any) -> Any:
            if not computes(func):
                return func(*args, **kwargs)
            name, call = str(func), Call(func, args, kwargs).make()
            roles[name].add(now[0])
            fitting[name] |= {
                f.name for f in FAULTS if f.name not in fitting[name] and f.when(call)
            }
            return call.result

        with simulated(kind) as device, _roles(now):
            device.compute = watch
            there = self.lived(self.config(setting, device=kind, dtype=dtype), now)
        self.sound[kind, dtype, setting] = there, _distances(there, here)
        self._ask(kind, dtype)
        for name, found in roles.items():
            result.operations[name] |= found
        return [
            Breakage(kind, dtype, setting, name, fault, frozenset(roles[name]))
            for name in sorted(fitting)
            for fault in FAULTS
            if fault.name in fitting[name]
        ]

    def lived(self, config: RunConfig, now: list[str] | None = None) -> Figures:
        """Train, with validation and samples; return what was computed. `now`: also evaluate and
        generate with the real commands, keeping it at the role of the one running.
        """
        found: Figures = {name: [] for name in ("loss", "gradient", "weight", "judged", "said")}
        shutil.rmtree(config.run.out, ignore_errors=True)
        update, logits, step = trainer.Trainer._update, Rows.logits, Rows.step

        def updated(self: trainer.Trainer, sums: Tensor) -> None:
            before = [p.detach().cpu().clone() for p in self.model.parameters()]
            found["gradient"] += [p.grad.cpu() + 0.0 for p in self.model.parameters()]  # type: ignore[union-attr]
            update(self, sums)
            found["loss"].append(torch.tensor(self.totals))
            after = [p.detach().cpu() for p in self.model.parameters()]
            found["weight"] += [a - b for a, b in zip(after, before, strict=True)]

        def said(self: Rows, hidden: Tensor) -> Tensor:
            found["said"].append(made := logits(self, hidden))
            return made

        def stepped(self: Rows, rows: Any, tokens: Any) -> Tensor:
            return step(self, rows, [40_007] * len(tokens))  # always the same token

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(trainer.Trainer, "_update", updated))
            stack.enter_context(mock.patch.object(Rows, "step", stepped))
            stack.enter_context(mock.patch.object(Rows, "logits", said))
            stack.enter_context(mock.patch.object(judge, "_SAMPLE_TOKENS", 2))
            stack.enter_context(mock.patch.object(start, "_git", lambda: None))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            last = start.train(config)
            assert last is not None
            for verb, *words in _COMMANDS if now is not None else ():
                assert now is not None
                now[0] = verb
                code = command([verb, str(config.run.out), *words, "--device", config.run.device])
                assert code == 0
        found["judged"] = [torch.tensor([last.nats])]
        return found

    def material(self, case: Breakage) -> str | None:
        """What differs by more than rounding, and by how much."""
        sound, rounding = self.sound[case.kind, case.dtype, case.setting]
        config = self.config(case.setting, device=case.kind, dtype=case.dtype)
        try:
            with simulated(case.kind) as device, contextlib.redirect_stderr(io.StringIO()):
                device.compute = wrong(case)
                found = self.lived(config)
        except Exception as error:  # training itself fails, but late
            return f"ended by {type(error).__name__}"
        distances = _distances(found, sound)
        far = {k: v for k, v in distances.items() if not v <= max(_LEAST, _MORE * rounding[k])}
        return ", ".join(f"{k} {v:.1e}" for k, v in far.items()) or None

    def _ask(self, kind: str, dtype: str) -> None:
        """Which operations the checks execute, and the CPU's answer to the last check."""
        if (kind, dtype) in self.asked:
            return
        asked: dict[str, set[str]] = defaultdict(set)
        with simulated(kind) as device:
            machine = machine_of(kind, dtype)
            for name, probe in [*probes.PROBES.items(), ("", None)]:

                def watch(func: Any, args: Any, kwargs: Any, name: str = name) -> Any:
                    asked[str(func)].add(name)
                    return func(*args, **kwargs)

                device.compute = watch
                if probe is not None:
                    torch.manual_seed(0)
                    probe(machine.device, machine.dtype)
                else:
                    self.expected[kind + dtype] = probes.one_step(machine, "mps")
        self.asked[kind, dtype] = asked
        cpu = dataclasses.replace(machine, device=torch.device("cpu"), dtype=torch.float32)
        self.expected["cpu"] = probes.one_step(cpu, "mps")

    def refused(self, case: Breakage) -> str | None:
        """The first check of the doctor that fails; checks not using the operation are skipped."""
        asked = self.asked[case.kind, case.dtype].get(case.operation, set())
        step = probes.one_step

        def one_step(machine: Runtime, kind: str) -> Any:
            if machine.device.type == "cpu":
                return self.expected["cpu"]
            return step(machine, "mps") if "" in asked else self.expected[case.kind + case.dtype]

        chosen = {name: probe for name, probe in probes.PROBES.items() if name in asked}
        with (
            mock.patch.dict(probes.PROBES, chosen, clear=True),
            mock.patch.object(probes, "one_step", one_step),
            simulated(case.kind) as device,
        ):
            machine = machine_of(case.kind, case.dtype)
            device.compute = wrong(case)
            failed = doctor.failures(doctor.arithmetic(machine))
        return failed[0].name if failed else None


def machine_of(kind: str, dtype: str) -> Runtime:
    return Runtime.detect(Run(device=kind, dtype=dtype, compile="off"), 1)  # type: ignore[arg-type]


def wrong(case: Breakage) -> Callable[..., Any]:
    """Kernels, one of which is wrong."""

    def compute(func: Any, args: Any, kwargs: Any) -> Any:
        if str(func) != case.operation:
            return func(*args, **kwargs)
        call = Call(func, args, kwargs).make()
        if case.fault.when(call):
            with torch.no_grad():
                case.fault.harm(call)
        return call.result

    return compute


def _distances(found: Figures, sound: Figures) -> dict[str, float]:
    """The largest difference of each figure's tensors, as a share of the norm; NaN counts."""
    pairs = {name: list(zip(found[name], right, strict=False)) for name, right in sound.items()}
    return {
        name: probes.farthest(*map(list, zip(*each, strict=True))) for name, each in pairs.items()
    }


@contextmanager
def _roles(now: list[str]) -> Iterator[None]:
    """Keep `now` at the current role."""
    with ExitStack() as stack:

        def mark(owner: Any, name: str, role: str) -> None:
            original = getattr(owner, name)

            def marked(*args: Any, **kwargs: Any) -> Any:
                before, now[0] = now[0], role
                try:
                    return original(*args, **kwargs)
                finally:
                    now[0] = before

            stack.enter_context(mock.patch.object(owner, name, marked))

        mark(trainer.Trainer, "_gradients", "forward")
        mark(torch.Tensor, "backward", "backward")
        mark(trainer.Trainer, "_update", "update")
        mark(trainer, "update", "update")
        mark(judge.Judge, "validate", "judging")
        mark(judge.Judge, "sample", "generation")
        mark(Rows, "read", "generation")
        mark(Rows, "step", "generation")
        yield
