"""Ten losses of `tiny` in float32 on fixed text, so that no change of the numerics goes unseen.

They hold for data order, initialisation, dropout masks, schedule, loss and optimizer together.
A change that moves them on purpose says so in CHANGELOG.md.
"""

from collections.abc import Callable

import pytest

from sota_transformer.config import RunConfig
from sota_transformer.training.runlog import read_metrics
from sota_transformer.training.start import train

LOSSES = [
    10.798766,
    10.595757,
    10.432117,
    10.286314,
    10.180955,
    10.089226,
    10.031492,
    9.988422,
    9.945009,
    9.922705,
]

# NorMuon makes even the smallest singular values of a gradient count, and with them its rounding:
# another processor's products may move these losses more than those of AdamW.
FAST_LOSSES = [
    10.813009,
    10.453579,
    9.931844,
    9.039977,
    7.759516,
    6.100239,
    5.008898,
    4.708497,
    4.259106,
    4.228639,
]


@pytest.mark.parametrize(
    ("recipe", "expected", "tolerance"), [("seed", LOSSES, 2e-5), ("fast", FAST_LOSSES, 1e-3)]
)
def test_ten_losses(
    make_run: Callable[..., RunConfig], recipe: str, expected: list[float], tolerance: float
) -> None:
    shape = {"d_model": 64, "d_ff": 176, "seq_len": 64, "steps": 10, "batch_rows": 8}
    config = make_run(recipe=recipe, **shape)
    train(config)
    losses = [line["loss"] for line in read_metrics(config.run.out) if "loss" in line]
    assert losses == pytest.approx(expected, rel=tolerance)
