"""Random orders of saves, kills, damage and pruning, by hypothesis."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import RunMachine


def _run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        RunMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_few_random_histories_of_a_run() -> None:
    _run(5, 8)


@pytest.mark.chaos
def test_many_random_histories_of_a_run() -> None:
    _run(100, 30)
