"""Checkpoints: the full state of a run, in a folder that exists completely or not at all.

    checkpoints/step-00001000/model.safetensors   float32 weights, the tied embedding once
                              optim.safetensors   moments by parameter name
                              trainer.json        counters
                              manifest.json       SHA-256 of each file, fingerprint, numerics; last

Learning rate, batch and dropout are functions of the step, so no random state is saved. Nothing
depends on the number of ranks. No pickle is written or read.
"""

import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sota_transformer import durable
from sota_transformer.config import STEP_DIGITS, RunConfig
from sota_transformer.data.guards import one_line_errors
from sota_transformer.errors import BAD_DATA, DIVERGED, IO_FAILED, NO_INPUT, TEMPORARY, SotaError
from sota_transformer.model.transformer import Transformer
from sota_transformer.shapes import misfit
from sota_transformer.training.runlog import read_config
from sota_transformer.words import one_line

FORMAT = 1
_MANIFEST = {  # the keys that are read; an older checkpoint may lack any of them
    "data?": (str, None),
    "data_files?": {str: str},
    "numerics?": {str: (str, float, bool)},
    "model?": {str: (float, bool)},
}
_GUARD = {"losses": [float], "rate": float, "shift": float}  # below 0 after a smaller batch
_TRAINER = {
    **dict.fromkeys(("step?", "updates?", "tokens?", "rows?"), int),
    "guard?": _GUARD | dict.fromkeys(("bad_in_a_row", "skipped", "returns"), int),
    "scaler?": {str: float},
    "best?": ({"step": int, "nats": float, "tokens": int}, None),
}
_TYPES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


@dataclass(kw_only=True)
class State:
    """Everything needed to resume a run."""

    step: int
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    trainer: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)


def save(run_folder: Path, state: State, own: Collection[int] = ()) -> Path:
    """Commit `state`; on return it survives a power cut and is the newest that verifies.

    `own` are the steps that this process has loaded or written. Other steps after the first of
    them belong to a branch abandoned by --resume step:N and are deleted. SotaError 70, 74 or
    OSError.
    """
    folder = run_folder / "checkpoints"
    durable.make_folder(folder)
    tensors = state.model | state.optim
    for name, tensor in tensors.items():
        # aminmax copies nothing and propagates NaN.
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise SotaError(f"{name} is not finite at step {state.step}; not saved", DIVERGED)
    check_room(folder, sum(tensor.nbytes for tensor in tensors.values()))
    final = path_of(run_folder, state.step)
    if os.path.lexists(final):  # rejected before the run resumed from an older one
        durable.discard(final)
    manifest = {"format": FORMAT, "step": state.step} | state.manifest
    with durable.commit_folder(final, manifest) as writer:
        for name, tensors in (("model", state.model), ("optim", state.optim)):
            with writer.create(f"{name}.safetensors") as file:
                write_safetensors(file.write, tensors)
        writer.write("trainer.json", durable.canonical_json(state.trainer | {"step": state.step}))
    begun, kept = min(own, default=state.step), {*own, state.step}
    for step in steps(run_folder):
        if step > begun and step not in kept and not _problems(run_folder, step):
            durable.discard(path_of(run_folder, step))
    return final


def free_bytes(folder: Path) -> float:
    """Free space on the disk of `folder`: infinite on a FUSE drive that reports 0 of 0 bytes."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf


def check_room(folder: Path, needed: int) -> None:
    """SotaError 74 if a checkpoint of `needed` bytes does not fit; `folder` need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := free_bytes(there)) < 1.1 * needed:
        raise SotaError(
            f"{folder}: a checkpoint needs {1.1 * needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB "
            "are free; free up space and run the same command again",
            IO_FAILED,
        )


def write_safetensors(write: Callable[[Any], None], tensors: dict[str, Tensor]) -> None:
    """Stream a safetensors file tensor by tensor, so that saving needs no second copy of them.

    The format is 8 bytes of header length, a JSON header, then the data
    (https://github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(struct.pack("<Q", len(text)) + text)
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        if array.nbytes:
            write(array.reshape(-1).view("uint8"))


def is_utf8(path: Path) -> bool:
    """Whether the absolute path is valid UTF-8; safetensors opens no other."""
    return os.fsencode(path.absolute()).decode(errors="ignore") == str(path.absolute())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a run's folder, lock it, and remove what a killed process left there.

    What is new and still empty goes again if the block fails.
    """
    with one_line_errors(folder):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        durable.make_folder(folder)
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(durable.DirectoryLock(folder))
        except FileNotFoundError as error:  # by a start that was refused while this one waited
            text = f"{folder} was removed by another process; run the same command again"
            raise SotaError(text, TEMPORARY) from error
        try:
            durable.sweep(folder)
            durable.sweep(folder / "checkpoints")
            yield
        except BaseException:
            with suppress(OSError):
                if new and [*folder.iterdir()] == [lock.path]:
                    lock.path.unlink()
                    for path in new:
                        path.rmdir()
            raise


def steps(run_folder: Path) -> list[int]:
    """Steps of the committed checkpoints, in ascending order; file times do not matter."""
    found = (run_folder / "checkpoints").glob("step-*")
    numbers = (path.name.removeprefix("step-") for path in found)
    return sorted(int(n) for n in numbers if len(n) == STEP_DIGITS and n.isdecimal())


def path_of(run_folder: Path, step: int) -> Path:
    """Folder of one checkpoint."""
    return run_folder / "checkpoints" / f"step-{step:0{STEP_DIGITS}d}"


def latest(run_folder: Path, warn: Callable[[str], None], until: int | None = None) -> int | None:
    """The newest step that verifies, or None if there are no checkpoints at all.

    Calls `warn` for each newer one that does not verify. SotaError 65 if none does. Steps after
    `until` are ignored.
    """
    found = [step for step in steps(run_folder) if until is None or step <= until]
    for step in reversed(found):
        problems = _problems(run_folder, step)
        if not problems:
            return step
        warn(one_line(f"step {step} rejected: {problems[0]}"))
    if found:
        raise SotaError(f"{run_folder}: no checkpoint verifies; {len(found)} tried", BAD_DATA)
    return None


def _problems(run_folder: Path, step: int) -> list[str]:
    """What is wrong with a checkpoint, including an intact one named after another step."""
    folder = path_of(run_folder, step)
    if problems := durable.verify(folder):
        return problems
    written = durable.read_manifest(folder / durable.MANIFEST).get("step")
    return [] if written == step else [f"{folder}: holds step {written}"]


def load(run_folder: Path, step: int, *, verified: bool = False) -> State:
    """The state saved at `step`. SotaError 65 or 66 names the bad file.

    `verified`: `latest` has just verified this step, so its bytes are not hashed again.
    """
    folder = path_of(run_folder, step)
    if not folder.is_dir():
        there = ", ".join(map(str, steps(run_folder))) or "none"
        raise SotaError(f"{run_folder} has no checkpoint of step {step} (it has {there})", NO_INPUT)
    if not verified and (problems := _problems(run_folder, step)):
        raise SotaError(f"step {step} rejected: {problems[0]}", BAD_DATA)
    manifest = durable.read_manifest(folder / durable.MANIFEST)
    if manifest.get("format") != FORMAT:
        raise SotaError(
            f"{folder} has format {manifest.get('format')}; this version reads {FORMAT}", BAD_DATA
        )
    try:
        trainer = dict(json.loads((folder / "trainer.json").read_bytes()))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise SotaError(f"{folder / 'trainer.json'}: {error}", BAD_DATA) from error
    shapes = (manifest, _MANIFEST, durable.MANIFEST), (trainer, _TRAINER, "trainer.json")
    for value, shape, name in shapes:
        if wrong := misfit(value, shape, name):
            raise SotaError(f"{folder}: {wrong}; `sota train` did not write this", BAD_DATA)
    tensors = {name: _tensors(folder / f"{name}.safetensors") for name in ("model", "optim")}
    return State(step=step, trainer=trainer, manifest=manifest, **tensors)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SotaError(f"{path}: {error}", BAD_DATA) from error


def prune(
    run_folder: Path, keep: int, trusted: Container[int] = (), best: int | None = None
) -> None:
    """Delete checkpoints older than the newest `keep` good ones, and at least two; keep the `best`.

    A checkpoint that does not verify does not count; `trusted` steps are not read again, because
    this process has written or loaded them.
    """
    left = max(2, keep)
    for step in reversed(steps(run_folder)):
        if left:
            left -= step in trusted or not _problems(run_folder, step)
        elif step != best:
            durable.discard(path_of(run_folder, step))


def load_model(
    run_folder: Path, device: torch.device, step: int | None, warn: Callable[[str], None]
) -> tuple[Transformer, RunConfig, int]:
    """The model of a run, at `step` or the newest good one, in evaluation mode on `device`.

    Its activations are float32.
    """
    config = read_config(run_folder)
    found = latest(run_folder, warn) if step is None else step
    if found is None:
        raise SotaError(f"{run_folder} has no checkpoint yet", NO_INPUT)
    state = load(run_folder, found, verified=step is None)
    _same_model(run_folder, config, state)
    model = Transformer(config.model)
    restore_model(model, state)
    return model.to(device).eval(), config, found


def _same_model(run_folder: Path, config: RunConfig, state: State) -> None:
    """config.json has no checksum, but its model must be the one that was trained."""
    written = state.manifest.get("model", {})
    for name, now in dataclasses.asdict(config.model).items():
        if name in written and written[name] != now:
            raise SotaError(
                f"{run_folder / 'config.json'} was changed: model.{name} is {now}, but step "
                f"{state.step} was trained with {written[name]}; restore the old value, or train "
                "until a new checkpoint",
                BAD_DATA,
            )


def restore_model(model: Transformer, state: State) -> None:
    """Copy the weights of `state`. SotaError 65 if they belong to another model."""
    try:
        model.load_state_dict(state.model, strict=True)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        raise SotaError(
            f"the checkpoint of step {state.step} does not fit: {line}", BAD_DATA
        ) from error
