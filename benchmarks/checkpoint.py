"""Cost of a checkpoint: seconds, memory, and its share of a run that saves every five minutes.

    python benchmarks/checkpoint.py [PRESET] [--folder DIR] [--saves N]

Saves a model and its AdamW moments as training does. Peak memory is that of this process, so a
second copy of the state would show.
"""

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sota_transformer.model.optim import optimizers, state_tensors, update
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.training import checkpoint

_INTERVAL_SECONDS = 300


def state_of(preset: str) -> checkpoint.State:
    """Weights and optimizer moments of a model after one update."""
    config = PRESETS[preset]()
    model = Transformer(config.model, torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    both = optimizers(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    update(both, config.optim.learning_rate)
    model.zero_grad(set_to_none=True)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return checkpoint.State(step=0, model=weights, optim=state_tensors(model, both))


def peak() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="125m", choices=PRESETS)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--saves", type=int, default=3)
    options = parser.parse_args()
    state = state_of(options.preset)
    tensors = (state.model | state.optim).values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # Reset the kernel's peak, which includes building the model, to measure saving alone.
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds = resident(), []
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.folder))
    try:
        for number in range(options.saves):
            state.step = number
            began, worked = time.monotonic(), time.process_time()
            checkpoint.save(folder, state)
            checkpoint.prune(folder, 2, {number, number - 1})
            seconds.append((time.monotonic() - began, time.process_time() - worked))
    finally:
        shutil.rmtree(folder)
    wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"{options.preset}: state of {size / 1e9:.2f} GB, {options.saves} saves")
    print(f"one save: {wall:.2f} s (CPU {cpu:.2f} s), {size / wall / 1e6:,.0f} MB/s")
    print(f"share of {_INTERVAL_SECONDS} s: {wall / _INTERVAL_SECONDS:.2%}")
    more = (peak() - before) / size
    print(f"memory: {before / 1e9:.2f} GB before, {peak() / 1e9:.2f} GB at the peak of saving")
    print(f"saving adds {more:.1%} of the state's size")


if __name__ == "__main__":
    main()
