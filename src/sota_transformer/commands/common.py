"""Shared by the verbs that use a model: load one from a run or a Hugging Face folder."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sota_transformer.config import Run, RunConfig
from sota_transformer.data.documents import without_mark
from sota_transformer.errors import BAD_DATA, NO_INPUT, SotaError
from sota_transformer.inference.folder import is_model_folder, read_model
from sota_transformer.model.decode import lay_for_rows
from sota_transformer.model.transformer import Transformer
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint
from sota_transformer.training.runlog import read_config
from sota_transformer.words import one_line


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to use, and what is known about its origin."""

    folder: Path
    model: Transformer
    config: RunConfig | None = None
    """None for a folder that is not a run."""
    step: int | None = None

    @property
    def name(self) -> str:
        """The name to show."""
        return self.folder.resolve().name or "model"

    @property
    def data(self) -> Path | None:
        """Folder of the data it was trained on; None for an exported or imported model."""
        return self.config.data.path if self.config and self.config.data.path != Path() else None


def warn(text: str) -> None:
    """Print one line to stderr."""
    print(f"sota: {one_line(text)}", file=sys.stderr)


def open_to_generate(folder: Path, device: str, step: int | None, dtype: str) -> Opened:
    """As `open_model`, with weights laid out for token-by-token decoding.

    In bfloat16 the matrices are stored and multiplied as such; norms and logits stay float32.
    """
    opened = open_model(folder, device, step)
    if dtype == "bfloat16":
        opened.model.dtype = torch.bfloat16
        for parameter in opened.model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()
    lay_for_rows(opened.model)
    return opened


def open_model(folder: Path, device: str, step: int | None) -> Opened:
    """The model of a run or of a Hugging Face folder, in float32. SotaError 65 or 66."""
    run = Run(device=device, compile="off")  # type: ignore[arg-type]  # tyro has checked it
    if is_model_folder(folder):
        if step is not None:
            raise SotaError(f"{folder} is an exported model and has no steps; leave out --step")
        model = read_model(folder)
        runtime = Runtime.detect(run, model.config.parameter_count)
        return Opened(folder=folder, model=model.to(runtime.device))
    config = read_config(folder)
    runtime = Runtime.detect(run, config.model.parameter_count)
    model, config, step = checkpoint.load_model(folder, runtime.device, step, warn)
    return Opened(folder=folder, model=model, config=config, step=step)


def text_of(path: Path) -> str:
    """The text of a file. SotaError 66 if it is not one that can be read to its end, else 65."""
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise SotaError(f"{path}: {what}", NO_INPUT)
    return decoded(path.read_bytes(), path)


def decoded(data: bytes, path: Path) -> str:
    """A file's bytes decoded as in `sota prepare`: UTF-8, or UTF-16 with a byte order mark.

    SotaError 65 for any other encoding.
    """
    try:
        return without_mark(data).decode()
    except UnicodeDecodeError as error:
        text = f"{path} is neither UTF-8 nor UTF-16 with a byte order mark ({error.reason})"
        raise SotaError(text, BAD_DATA) from error


def check(rules: dict[str, bool]) -> None:
    """Report all broken rules in one error."""
    if broken := [text for text, holds in rules.items() if not holds]:
        raise SotaError("; ".join(broken))
