"""Design choices of the CPU training step timed against their alternatives, in turn.

    python benchmarks/attention.py

Prints minima of several rounds, and the machine's matrix product rate, which varies by the hour.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sota_transformer.config import Run
from sota_transformer.model.cpu import attend_in_blocks
from sota_transformer.model.transformer import attend, same_document
from sota_transformer.runtime import Runtime

ROUNDS = 6


def fastest(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, the minimum of `ROUNDS`; interleaved, so that drift affects all."""
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: min(times) for name, times in taken.items()}


def attention() -> None:
    """Forward and backward of one 125m layer at 4 x 512 tokens, (4, 12, 512, 64) bfloat16."""
    q, k, v = (torch.randn(4, 12, 512, 64).bfloat16().requires_grad_() for _ in range(3))
    seed = torch.randn(4, 12, 512, 64).bfloat16()

    def both(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), seed)

    mask = same_document(torch.arange(512).div(200, rounding_mode="floor").expand(4, 512))
    compiled, masked = (torch.compile(attend_in_blocks, dynamic=False) for _ in range(2))
    works = {
        "SDPA": both(attend),
        "SDPA, masked": both(lambda *qkv: attend(*qkv, mask)),
        "in blocks, compiled": both(compiled),
        "in blocks, compiled, masked": both(lambda *qkv: masked(*qkv, mask)),
    }
    for name, milliseconds in fastest(works).items():
        print(f"attention, {name}: {milliseconds:.1f} ms")


def head_gradient() -> None:
    """The 16m head gradient for 512 tokens, added to the embedding's, in either layout."""
    logits, hidden = torch.randn(512, 50_258).bfloat16(), torch.randn(512, 256).bfloat16()
    embedding = torch.zeros(50_258, 256)
    works = {
        "transposed product": lambda: embedding.add_((hidden.t() @ logits).t().float()),
        "in the parameter's layout": lambda: embedding.add_((logits.t() @ hidden).float()),
    }
    for name, milliseconds in fastest(works).items():
        print(f"head gradient, {name}: {milliseconds:.1f} ms")


def main() -> None:
    runtime = Runtime.detect(Run(device="cpu"), parameters=16_000_000)
    print("; ".join(runtime.reasons), f"; {runtime.threads} threads")
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    product = fastest({"product": lambda: a @ b})["product"]
    print(f"2048 x 2048 x 2048 in bfloat16: {2 * 2048**3 / product / 1e6:.0f} GFLOP/s")
    attention()
    head_gradient()


if __name__ == "__main__":
    main()
