"""What the processes of a run have in common: its options and data, and the state they resume.

Each computes the same update from the same sums of gradients. So with other options, data or
weights in one of them the models drift apart, silently: the losses are sums over all of them.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from sota_transformer import __version__
from sota_transformer.config import EXECUTION, RunConfig
from sota_transformer.errors import SotaError
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint

_OWN = EXECUTION | {"data.path", "run.out"}  # may differ between processes


def agree(config: RunConfig, runtime: Runtime, data: str) -> None:
    """SotaError, in every process, unless all have the same versions, options and data (by its
    fingerprint), and the first one the newest checkpoint.
    """
    if runtime.world == 1:
        return
    _first_has_the_newest(runtime, config.run.out)
    here = runtime.describe()
    given = {name: value for name, value in config.fields().items() if name not in _OWN}
    given |= {"dtype": here["dtype"], "data fingerprint": data[:16]}
    version = {"version": f"{__version__} with {len(given)} options", "torch": here["torch"]}
    for mine in (version, given):  # in turn: the number of numbers sent has to be the same
        firsts = runtime.of_first(*(_number(value) for value in mine.values()))
        other = [
            _number(value) != theirs for value, theirs in zip(mine.values(), firsts, strict=True)
        ]
        apart = runtime.sum_array(np.array(other, np.int64))
        found = [name for name, n in zip(mine, apart, strict=True) if n]
        if found:
            told = ", ".join(f"{name} (here {mine[name]})" for name in found)
            # A processor chooses its dtype: the same command may give another one elsewhere.
            alike = "the same command, version and data"
            alike = "--run.dtype float32" if found == ["dtype"] else alike
            raise SotaError(
                f"process {runtime.rank}: the processes of this run differ in {told}; "
                f"start all with {alike}"
            )


def load(runtime: Runtime, folder: Path, step: int, *, verified: bool) -> checkpoint.State:
    """The state saved at `step`. Only the first process reads it and sends it to the others, whose
    machines may have no such folder, or another run's.
    """
    state = checkpoint.State(step=step, model={}, optim={})
    if runtime.rank == 0:
        state = checkpoint.load(folder, step, verified=verified)
    if runtime.world == 1:
        return state
    shapes = {
        part: {name: (str(t.dtype).removeprefix("torch."), t.shape) for name, t in tensors.items()}
        for part, tensors in (("model", state.model), ("optim", state.optim))
    }
    sent = _sent(runtime, json.dumps([state.trainer, state.manifest, shapes]).encode())
    state.trainer, state.manifest, shapes = json.loads(sent)
    for part, tensors in (("model", state.model), ("optim", state.optim)):
        for name, (dtype, shape) in shapes[part].items():
            if runtime.rank != 0:
                tensors[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
            # As integers, because a sum with zero would lose the sign of -0.
            bits = tensors[name].view(-1).view(torch.uint8)
            bits.copy_(runtime.sum_(bits.to(runtime.device)))
    return state


def _first_has_the_newest(runtime: Runtime, folder: Path) -> None:
    """SotaError, in every process, if another's folder has a later checkpoint than the first's.

    Without a shared disk only one machine has the checkpoints, and with a rendezvous torchrun
    numbers the machines as they arrive: the run would begin again on another one.
    """
    mine = (checkpoint.steps(folder)[-1:] or [-1])[0]
    later = runtime.sum_array(np.array([mine > runtime.of_first(mine)[0]], np.int64))
    if later.any():
        found = "no checkpoint" if mine < 0 else f"checkpoints up to step {mine}"
        raise SotaError(
            f"process {runtime.rank} has {found} in {folder.absolute()}, but the first process has "
            "not the newest of all: share the folder, or give the machine that has it "
            "--node-rank 0 and all --master-addr instead of a rendezvous"
        )


def _number(value: object) -> int:
    """A number that stands for this value."""
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:7])


def _sent(runtime: Runtime, text: bytes) -> bytes:
    """The first process's text, in every process."""
    (size,) = runtime.of_first(len(text))
    mine = text if runtime.rank == 0 else bytes(size)
    return runtime.sum_array(np.frombuffer(bytearray(mine), np.uint8)).tobytes()
