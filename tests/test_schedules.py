"""Schedules at points computed by hand."""

import dataclasses

import pytest

from sota_transformer.config import RunConfig
from sota_transformer.presets import PRESETS
from sota_transformer.schedules import (
    describe,
    dropout,
    learning_rate,
    repetition,
    useful_epochs,
    warmup_steps,
)


def run(steps: int, **optim: float) -> RunConfig:
    config = PRESETS["tiny"]()
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, batch_rows=8),
        optim=dataclasses.replace(config.optim, **optim),
    )


def test_warmup_is_four_thousand_steps_or_five_percent() -> None:
    assert warmup_steps(run(100_000)) == 4000
    assert warmup_steps(run(1000)) == 50
    assert warmup_steps(run(10)) == 0


def test_learning_rate_at_points() -> None:
    config = run(100_000)
    assert learning_rate(0, config) == pytest.approx(1e-3 / 4000)
    assert learning_rate(1999, config) == pytest.approx(5e-4)
    assert learning_rate(3999, config) == pytest.approx(1e-3)
    assert learning_rate(4000, config) == pytest.approx(1e-3)
    assert learning_rate(52_000, config) == pytest.approx(1e-4 + 0.5 * 9e-4)
    assert learning_rate(100_000, config) == pytest.approx(1e-4)


def test_rate_is_positive_and_falls_after_warmup() -> None:
    config = run(1000)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert min(rates) > 0
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[:50] == sorted(rates[:50])


def test_a_cooldown_is_a_straight_line_to_the_end() -> None:
    config = run(1000, cooldown=0.6, final_fraction=0.0, warmup_steps=40)
    assert learning_rate(0, config) == pytest.approx(1e-3 / 40)
    assert learning_rate(40, config) == learning_rate(400, config) == 1e-3
    assert learning_rate(700, config) == pytest.approx(5e-4)
    assert learning_rate(999, config) == pytest.approx(1e-3 / 600)


@pytest.mark.parametrize("cooldown", [0.0, 0.5])
def test_the_rate_past_the_end_is_the_final_one(cooldown: float) -> None:
    config = run(1000, cooldown=cooldown, final_fraction=0.2)
    for step in (1000, 1001, 1500, 2000, 5000):
        assert learning_rate(step, config) == pytest.approx(2e-4)


def test_dropout_changes_linearly_from_start_to_end() -> None:
    config = run(101)
    assert dropout(0, config) == pytest.approx(0.1)
    assert dropout(50, config) == pytest.approx(0.05)
    assert dropout(100, config) == 0.0
    assert dropout(0, run(1, dropout_end=0.1)) == pytest.approx(0.1)
    assert dropout(1, run(2)) == 0.0


def test_steps_with_other_batch_sizes_are_distinguished() -> None:
    """A current step has 8 rows of 64 tokens."""
    for done, learned, said in [
        (0, 0, "10 steps x 512 tokens = 5,120 tokens"),
        (4, 2048, "10 steps x 512 tokens = 5,120 tokens"),
        (4, 1024, "10 steps, 4 with 1,024 tokens and 6 x 512 = 4,096 tokens"),
        (10, 1024, "10 steps, 1,024 tokens"),
    ]:
        assert f"run: {said}, " in describe(run(10), 0, done, learned)[1]


def test_padding_is_not_trained_on() -> None:
    assert "run: 10 steps x 384 tokens = 3,840 tokens, " in describe(run(10), padding=0.25)[1]


def test_the_schedule_in_words() -> None:
    seed = describe(run(1000, warmup_steps=50))[2]
    assert ", 50 warm-up steps, cosine decay to 10%; dropout 0.1 -> 0; label" in seed
    config = run(1000, warmup_steps=51, cooldown=0.6, matrix_rate=0.02, final_fraction=0.0)
    fast = describe(config)[2]
    assert ", NorMuon 0.02 on the blocks' matrices, 50 warm-up steps (capped at 5%" in fast
    assert "; 51 configured), linear decay over the last 60% to 0%; " in fast
    assert "NorMuon" not in seed and "linear" not in seed


def test_text_that_is_read_too_often() -> None:
    """Four times at most; by `fast` once or twice below a 60th or 10th of a token per parameter."""
    assert useful_epochs(PRESETS["16m"](), 1000) == 4
    config = PRESETS["16m"]("fast")
    least, little = config.model.parameter_count // 60, config.model.parameter_count // 10
    sizes = ((1000, 1), (least, 1), (least + 1, 2), (little, 2), (little + 1, 4), (10 * little, 4))
    for there, most in sizes:
        assert useful_epochs(config, there) == most
        assert repetition(config, there, most * there) == ""
        assert repetition(config, there, most * there + 1)
    tokens = config.train.batch_rows * config.model.seq_len
    for there, every in ((3 * tokens - 1, 2), (3 * tokens, 3), (1, 1)):
        said = repetition(config, there, 10 * tokens)
        assert said.endswith(f"(--train.eval-every {every})") and f"--steps {every} (1 ep" in said
    assert "--steps 100 (2 epochs)" in repetition(config, 50 * tokens, 101 * tokens)
    seed = PRESETS["16m"]()
    assert repetition(seed, 3 * tokens, 13 * tokens).endswith("add text or use --steps 12")
