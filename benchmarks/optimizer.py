"""One NorMuon update: its time and the number of kernels it launches.

    python benchmarks/optimizer.py [PRESET ...] [--device DEVICE]

Views cost nothing and are not counted. The first update, which creates the moments, is excluded.
With `PYTHONPATH=OTHER/src` it measures another checkout.
"""

import argparse
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sota_transformer.config import Run
from sota_transformer.model.optim import optimizers
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime

VIEWS = [
    "split",
    "split_with_sizes",
    "view",
    "unbind",
    "transpose",
    "expand",
    "_unsafe_view",
    "detach",
    "t",
    "select",
]
ROUNDS = 5


class Count(TorchDispatchMode):
    """Counts operations that are not views."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def measure(preset: str, device: str) -> str:
    """Measure one preset; a line of the table."""
    config = PRESETS[preset]("fast")
    machine = Runtime.detect(Run(device=device), config.model.parameter_count)
    model = Transformer(config.model, machine.dtype)
    model.init_weights(torch.Generator().manual_seed(1), muon=True)
    muon = optimizers(model.to(machine.device), config.optim)[0]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    seconds = []
    for _ in range(ROUNDS):
        machine.synchronize()
        began = time.perf_counter()
        muon.step()
        machine.synchronize()
        seconds.append(time.perf_counter() - began)
    with Count() as count:
        muon.step()
    kind = f"{machine.device.type} {machine.dtype}, {machine.threads} threads"
    return f"{preset:>5}  {sorted(seconds)[ROUNDS // 2]:8.3f} s  {count.calls:6,} kernels  {kind}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["16m", "125m"])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    for preset in options.presets:
        print(measure(preset, options.device), flush=True)


if __name__ == "__main__":
    main()
