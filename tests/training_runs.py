"""Shared by tests of whole training runs: their result, command line and interruption."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sota_transformer import doctor
from sota_transformer.config import RunConfig
from sota_transformer.presets import flag
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint, trainer
from sota_transformer.training.runlog import read_metrics
from sota_transformer.training.start import train

MakeRun = Callable[..., RunConfig]


def final_hash(config: RunConfig) -> str:
    step = checkpoint.steps(config.run.out)[-1]
    path = checkpoint.path_of(config.run.out, step) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logged(config: RunConfig, what: str) -> list[dict[str, Any]]:
    """Log lines that have this figure or are this event."""
    lines = read_metrics(config.run.out)
    return [line for line in lines if what in line or line.get("event") == what]


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in logged(config, "loss")]


def change(config: RunConfig, **fields: object) -> RunConfig:
    """The same run with other values of these fields, each in its section."""
    sections = {}
    assert fields.keys() <= {field for section in vars(config).values() for field in vars(section)}
    for name, section in vars(config).items():
        mine = vars(section).keys() & fields.keys()
        sections[name] = dataclasses.replace(section, **{field: fields[field] for field in mine})
    return RunConfig(**sections)


def command(config: RunConfig, *more: str) -> list[str]:
    """The same run from the command line, in its own process.

    It finds a passed doctor verdict: a check at each start would take longer than its steps.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "arithmetic", lambda _: [])
        config.run.out.mkdir(exist_ok=True)
        doctor.admit(config.run.out, Runtime.detect(config.run, config.model.parameter_count))
    flags = (flag(*field) for field in config.fields().items())
    return [sys.executable, "-m", "sota_transformer", "train", "tiny", *flags, *more]


class InterruptError(Exception):
    pass


def train_until(config: RunConfig, steps: int) -> None:
    """Train, and die without any cleanup once `steps` updates are done."""
    original = trainer.Trainer._update

    def update(self, sums):
        original(self, sums)
        if self.step == steps:
            raise InterruptError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(trainer.Trainer, "_update", update)
        train(config)
