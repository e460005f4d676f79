"""Ten losses of `tiny` in float32 on fixed text, so that no change of the numerics goes unnoticed.

They cover data order, initialization, dropout masks, schedule, loss and optimizer together. A
change that moves them on purpose says so in CHANGELOG.md.
"""

import pytest

from sota_transformer.training.runlog import read_metrics
from sota_transformer.training.start import train
from tests.training_runs import MakeRun, losses

LOSSES = [
    10.807686,
    10.603311,
    10.427666,
    10.278,
    10.187653,
    10.108319,
    10.037947,
    9.980913,
    9.95912,
    9.937295,
]

# NorMuon amplifies even the smallest singular values of a gradient, and with them its rounding:
# another processor's products may move these losses more than those of AdamW.
FAST_LOSSES = [
    10.81881,
    10.464946,
    9.966881,
    9.10718,
    7.884161,
    6.440119,
    5.076469,
    4.528621,
    4.357996,
    4.187856,
]

NORMS = {"seed": 1.790406, "fast": 1.015132}  # of the first gradient


@pytest.mark.parametrize(
    ("recipe", "expected", "tolerance"), [("seed", LOSSES, 2e-5), ("fast", FAST_LOSSES, 1e-3)]
)
def test_ten_losses(
    make_run: MakeRun, recipe: str, expected: list[float], tolerance: float
) -> None:
    shape = {"d_model": 64, "d_ff": 176, "seq_len": 64, "steps": 10, "batch_rows": 8}
    config = make_run(recipe=recipe, **shape)
    train(config)
    assert losses(config) == pytest.approx(expected, rel=tolerance)
    # AdamW and clipping hide the size of a gradient.
    assert read_metrics(config.run.out)[0]["gradient_norm"] == pytest.approx(
        NORMS[recipe], rel=1e-4
    )
