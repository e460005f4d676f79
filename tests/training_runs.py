"""What tests of whole training runs share: their outcome, their command line, and their death."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable

import pytest

from sota_transformer.config import RunConfig
from sota_transformer.training import checkpoint, trainer
from sota_transformer.training.runlog import read_metrics

MakeRun = Callable[..., RunConfig]


def final_hash(config: RunConfig) -> str:
    step = checkpoint.steps(config.run.out)[-1]
    path = checkpoint.path_of(config.run.out, step) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(config.run.out) if "loss" in line]


def change(config: RunConfig, **train_fields: object) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_fields))


def command(config: RunConfig, *more: str) -> list[str]:
    """The same run from the command line, in a process of its own."""
    flat = {
        f"--{section}.{name.replace('_', '-')}": value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
    }
    booleans = {True: "", False: "no-"}
    arguments = []
    for flag, value in flat.items():
        if isinstance(value, bool):
            section, name = flag.removeprefix("--").split(".")
            arguments.append(f"--{section}.{booleans[value]}{name}")
        else:
            arguments += [flag, str(value)]
    return [sys.executable, "-m", "sota_transformer", "train", "tiny", *arguments, *more]


class InterruptError(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Die without any clean-up once `steps` updates are made."""
    original = trainer.Trainer._update

    def update(self, sums):
        original(self, sums)
        if self.step == steps:
            raise InterruptError

    monkeypatch.setattr(trainer.Trainer, "_update", update)


def last_validation(config: RunConfig) -> dict:
    return [line for line in read_metrics(config.run.out) if "val_loss" in line][-1]
