"""Is this machine fit to train on? Every check computes something and compares it.

The device's own arithmetic is held against the CPU's in float32 or float64: this very model
forward and backward, both optimizers' updates, and one probe for each silent fault that a backend
has shipped. Reading order: the probes, the check of the whole model, memory and disk, then `check`
and `admit`, which training calls before it trusts a device.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sota_transformer import durable
from sota_transformer.config import Model, Run
from sota_transformer.errors import DIVERGED, SotaError
from sota_transformer.options import Doctor
from sota_transformer.presets import PRESETS, Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sota_transformer.runtime import Runtime

_VERDICT = "doctor.json"
_MODEL = "model forward and backward"
_COMPILED = f"{_MODEL}, compiled"
_DISK_BYTES = 64 << 20
_SLOW_DISK = 20e6  # bytes/s below which a 125M checkpoint takes over a minute


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    name: str
    passed: bool
    detail: str
    advice: str = ""


def run_doctor(options: Doctor) -> int:
    """Print the table; 0 when the machine is fit, else 70."""
    from rich.console import Console
    from rich.table import Table

    checks = check(options)
    table = Table("", "check", "found", "what to do")
    for line in checks:
        mark = "[green]pass[/]" if line.passed else "[red]FAIL[/]"
        table.add_row(mark, line.name, line.detail, line.advice if not line.passed else "")
    Console().print(table)
    failed = [line.name for line in failures(checks)]
    fit = "this machine is fit to train on"
    if any(not line.passed for line in checks):
        fit += ", without torch.compile"
    print(fit if not failed else f"not fit: {', '.join(failed)}")
    return DIVERGED if failed else 0


def check(options: Doctor) -> list[Check]:
    """All checks of the device that training would use, in the order of the table."""
    try:
        import torch

        from sota_transformer.runtime import Runtime
    except ImportError as error:
        advice = "install the package again: pip install sota-transformer"
        return [Check(name="torch", passed=False, detail=str(error), advice=advice)]
    runtime = Runtime.detect(Run(device=options.device), parameters=16_000_000)
    found = [Check(name="torch", passed=True, detail=torch.__version__)]
    found += [Check(name="choice", passed=True, detail=reason) for reason in runtime.reasons]
    found += arithmetic(runtime)
    return [*found, _memory(runtime), *_disk(options.folder)]


def arithmetic(runtime: "Runtime") -> list[Check]:
    """The probes and the whole model, on the runtime's device in its precision."""
    import torch

    probes: dict[str, Callable[[torch.device, torch.dtype], float]] = {
        "vocabulary head, batch over 8 (pytorch#109457)": _probe_head,
        "linear of a strided input (pytorch#161640)": _probe_strided_linear,
        "attention (pytorch#163597)": _probe_attention,
        "attention of permuted q, k, v (pytorch#181133)": _probe_permuted_attention,
        "batched products (pytorch#197636)": _probe_batched,
        "softmax of large logits (pytorch#107294)": _probe_softmax,
        "generation of uneven rows (pytorch#182285)": _probe_generation,
        "updates of AdamW": partial(_probe_update, "seed"),
        "updates of NorMuon and AdamW": partial(_probe_update, "fast"),
    }
    found = [_probed(name, probe, runtime) for name, probe in probes.items()]
    found.append(_model_check(dataclasses.replace(runtime, compile=False)))
    return [*found, _model_check(runtime)] if runtime.compile else found


def _probed(name: str, probe: Any, runtime: "Runtime") -> Check:
    """One probe; its error must be what the precision explains."""
    import torch

    from sota_transformer.runtime import in_short

    limit = {torch.float32: 1e-4, torch.float16: 1e-2}.get(runtime.dtype, 4e-2)
    advice = f"do not train on {runtime.device}; use --device cpu, or another version of torch"
    try:
        torch.manual_seed(0)
        error = probe(runtime.device, runtime.dtype)
    except (RuntimeError, NotImplementedError) as problem:
        return Check(name=name, passed=False, detail=in_short(problem), advice=advice)
    passed = error <= limit  # False for NaN
    detail = f"error {error:.1e}, limit {limit:.0e}"
    return Check(name=name, passed=passed, detail=detail, advice=advice)


def _error(result: "Tensor", expected: "Tensor") -> float:
    """Largest difference as a share of the expected values' largest."""
    difference = (result.detach().cpu().double() - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp(min=1e-30))


def _farthest(results: list["Tensor"], expected: list["Tensor"]) -> float:
    """The largest distance of two tensors as a share of the expected one's norm; NaN if any is."""
    import torch

    pairs = zip(results, expected, strict=True)
    return float(torch.stack([(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]).max())


def _probe_head(device: "torch.device", dtype: "torch.dtype") -> float:
    import torch
    import torch.nn.functional as F

    x, weight = torch.randn(24, 64, dtype=torch.float64), torch.randn(50_258, 64).double()
    result = F.linear(x.to(device, dtype), weight.to(device, dtype))
    return _error(result, x.to(dtype).double() @ weight.to(dtype).double().t())


def _probe_strided_linear(device: "torch.device", dtype: "torch.dtype") -> float:
    import torch
    import torch.nn.functional as F

    x = torch.randn(3, 64, 40).to(dtype)
    weight = torch.randn(96, 64).to(dtype)
    strided = x.to(device).transpose(1, 2)
    result = F.linear(strided[:, ::2], weight.to(device))
    return _error(result, x.double().transpose(1, 2)[:, ::2] @ weight.double().t())


def _attention(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
    """Causal attention by its formula, in float64."""
    import torch

    q, k, v = (x.cpu().double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def _probe_attention(device: "torch.device", dtype: "torch.dtype") -> float:
    import torch
    import torch.nn.functional as F

    q, k, v = (torch.randn(2, 4, 130, 64).to(device, dtype) for _ in range(3))
    return _error(F.scaled_dot_product_attention(q, k, v, is_causal=True), _attention(q, k, v))


def _probe_permuted_attention(device: "torch.device", dtype: "torch.dtype") -> float:
    import torch
    import torch.nn.functional as F

    q, k, v = (torch.randn(2, 130, 4, 64).to(device, dtype).transpose(1, 2) for _ in range(3))
    # As our model does it: made contiguous first, which is the known way around the fault.
    contiguous = q.contiguous(), k.contiguous(), v.contiguous()
    y = F.scaled_dot_product_attention(*contiguous, is_causal=True)
    return _error(y, _attention(q, k, v))


def _probe_batched(device: "torch.device", dtype: "torch.dtype") -> float:
    import torch

    a, b = torch.randn(96, 65, 130).to(dtype), torch.randn(96, 130, 66).to(dtype)
    there, doubles = a.to(device), a.double()
    plain = _error(torch.bmm(there, b.to(device)), torch.bmm(doubles, b.double()))
    square = _error(there @ there.mT, doubles @ doubles.mT)  # as in NorMuon
    return float(torch.tensor([plain, square]).max())  # NaN if one is


def _probe_softmax(device: "torch.device", dtype: "torch.dtype") -> float:
    import torch

    logits = torch.randn(16, 50_258) * 40
    result = logits.to(device).log_softmax(-1).exp()
    return _error(result, logits.double().softmax(-1))


def _probe_generation(device: "torch.device", dtype: "torch.dtype") -> float:
    """With cached keys and values, against one pass without on the CPU."""
    import torch

    from sota_transformer.inference.generate import Rows
    from sota_transformer.model.transformer import Transformer

    shape = Model(
        layers=1, d_model=128, heads=2, kv_heads=2, d_ff=64, seq_len=32, vocab_size=512
    )  # heads of 64: Metal has a kernel for these
    model = Transformer(shape)
    model.init_weights(torch.Generator().manual_seed(1), muon=True)
    for weight, _ in model.matrices():  # so that attention weighs
        weight.data.normal_(0.0, 0.1)
    long, short = torch.randint(512, (2, 20)).tolist()
    short = short[:4]
    with torch.no_grad():
        expected = torch.stack(
            [model.logits(model(torch.tensor([x])))[0, -1] for x in (long, short)]
        )
        model.dtype = dtype
        rows = Rows(model.to(device), 2)
        rows.start(0, long[:-2])
        rows.start(1, short[:-1])
        rows.step([0], long[-2:-1])
        found = rows.step([0, 1], [long[-1], short[-1]])
    return _error(found, expected)


def _probe_update(recipe: Recipe, device: "torch.device", dtype: "torch.dtype") -> float:
    """What two updates change in every weight, against the CPU with products in float32."""
    import torch

    expected = _updated(recipe, torch.device("cpu"), torch.float32)
    # NorMuon's five iterations add roundings up.
    return _farthest(_updated(recipe, device, dtype), expected) / 4


def _updated(recipe: Recipe, device: "torch.device", dtype: "torch.dtype") -> list["Tensor"]:
    """The changes of each parameter, from gradients that are the same everywhere."""
    import torch

    from sota_transformer.model.optim import optimizers, update
    from sota_transformer.model.transformer import Transformer

    shape = Model(layers=1, d_model=64, heads=2, kv_heads=2, d_ff=96, seq_len=8, vocab_size=128)
    model, source = Transformer(shape, dtype), torch.Generator().manual_seed(1)
    model.init_weights(source)
    before = [p.detach().double() for p in model.parameters()]
    both = optimizers(model.to(device), PRESETS["tiny"](recipe).optim)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=source).to(device)
        update(both, 0.1)  # far above what rounding changes
    after = [p.detach().cpu().double() for p in model.parameters()]
    return [a - b for a, b in zip(after, before, strict=True)]


def _model_check(runtime: "Runtime") -> Check:
    """Loss and every gradient of a small model, against the CPU in float32."""
    import torch

    from sota_transformer.runtime import in_short

    name = _COMPILED if runtime.compile else _MODEL
    advice = "use --device cpu or another torch"
    if runtime.compile:
        advice = "nothing: training does without torch.compile, which is slower and as right"
    loss_limit, limit = (1e-4, 2e-3) if runtime.dtype == torch.float32 else (1e-2, 6e-2)
    try:
        loss, gradients = _one_step(runtime)
    except Exception as problem:  # a compiler or driver may raise anything
        return Check(name=name, passed=False, detail=in_short(problem), advice=advice)
    plain = {"device": torch.device("cpu"), "dtype": torch.float32, "compile": False}
    expected_loss, expected = _one_step(dataclasses.replace(runtime, **plain))
    loss_error = abs(loss - expected_loss) / expected_loss
    gradient_error = _farthest(gradients, expected)
    return Check(
        name=name,
        passed=loss_error <= loss_limit and gradient_error <= limit,
        detail=f"loss off by {loss_error:.0e} (limit {loss_limit:.0e}), gradients by "
        f"{gradient_error:.0e} (limit {limit:.0e})",
        advice=advice,
    )


def _one_step(runtime: "Runtime") -> tuple[float, list["Tensor"]]:
    """Loss in nats, and the gradients, on the CPU."""
    import torch

    from sota_transformer.model.loss import token_loss
    from sota_transformer.model.transformer import Dropout, Transformer

    sizes = {"layers": 2, "d_model": 128, "heads": 2, "kv_heads": 2, "d_ff": 344}
    shape = Model(seq_len=128, vocab_size=8192, **sizes)  # the whole vocabulary has its own probe
    device = runtime.device
    model = Transformer(shape, runtime.dtype)
    model.init_weights(torch.Generator().manual_seed(1))
    model.to(device)
    runtime.optimize(model)
    source = torch.Generator().manual_seed(2)
    tokens = torch.randint(8192, (12, 129), generator=source).to(device)
    keys = torch.arange(12, dtype=torch.int32, device=device)
    hidden = model(tokens[:, :-1], Dropout(torch.tensor(0.1, device=device), keys))
    sums = token_loss(hidden, model.embedding.weight, tokens[:, 1:], 0.1, runtime.compile)
    loss = sums.smoothed / sums.count
    loss.backward()
    gradients = [
        p.grad.detach().float().cpu().clone() for p in model.parameters() if p.grad is not None
    ]
    return float(loss.detach()), gradients


def _memory(runtime: "Runtime") -> Check:
    """Room for the 125M preset: 16 bytes a parameter and some activations."""
    available = runtime.available_memory()
    return Check(
        name="memory",
        passed=available > 1e9,
        detail=f"{available / 1e9:.1f} GB available (125m needs about 4 GB, 16m about 1.5)",
        advice="close other programs",
    )


def _disk(folder: Path) -> list[Check]:
    """Free space and the speed of a durable write, where runs would live."""
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
        detail = f"{folder}: {error.strerror}"
        return [Check(name="disk", passed=False, detail=detail, advice="give another --folder")]
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return [
        Check(
            name="disk space",
            passed=free > 6e9,
            detail=f"{free / 1e9:.0f} GB free in {folder.resolve()}",
            advice="make room: four checkpoints of 125m take 5.9 GB",
        ),
        Check(
            name="disk speed",
            passed=speed > _SLOW_DISK,
            detail=f"{speed / 1e6:.0f} MB/s, durably written",
            advice="use another disk, or save less often",
        ),
    ]


def admit(folder: Path, runtime: "Runtime") -> "Runtime":
    """The runtime to train with, on a device whose arithmetic is right; else SotaError 70.

    It does not compile where only what is compiled is wrong. The verdict is kept in the run's
    folder and asked again unless all was good on the same device, precision and torch.
    """
    machine = {k: v for k, v in runtime.describe().items() if k not in ("threads", "world")}
    path = folder / _VERDICT
    try:
        known = json.loads(path.read_text())
        if known["machine"] == machine and all(line["passed"] for line in known["checks"]):
            return runtime
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    checks = arithmetic(runtime)
    verdict = {
        "machine": machine,
        "passed": not failures(checks),
        "checks": [dataclasses.asdict(line) for line in checks],
    }
    durable.write_file(path, durable.canonical_json(verdict))
    if failed := failures(checks):
        names = "; ".join(f"{line.name}: {line.detail}" for line in failed)
        raise SotaError(
            f"{runtime.device} computes wrongly ({names}); {failed[0].advice}. `sota doctor` shows "
            "the whole table",
            DIVERGED,
        )
    wrong = next((line for line in checks if not line.passed), None)
    return runtime.without_compiling(wrong.detail) if wrong else runtime


def failures(checks: list[Check]) -> list[Check]:
    """What makes a machine unfit; it can do without torch.compile."""
    return [line for line in checks if not line.passed and line.name != _COMPILED]
