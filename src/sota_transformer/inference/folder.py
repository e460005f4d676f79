"""Reads a Hugging Face folder of this model family without trusting any of its contents.

The configuration has a closed list of keys, file names come from an allow-list, links are not
followed, and every name and shape in a safetensors header is checked against the configuration
before anything is allocated (its offsets by `safetensors`, against the size of the file). No code
is run and no file outside the folder is opened.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sota_transformer.config import Model
from sota_transformer.data.tokenizer import EOT
from sota_transformer.durable import open_regular
from sota_transformer.errors import BAD_DATA, NO_INPUT, SotaError
from sota_transformer.inference.layout import expected_shapes, own_config, own_model
from sota_transformer.inference.tokenizer_files import vocabulary
from sota_transformer.model.transformer import Transformer

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_TOKENIZER = "tokenizer.json"
_JSON_BYTES = 4 << 20


def is_model_folder(folder: Path) -> bool:
    """Whether this is a Hugging Face model folder rather than one of our runs."""
    if (folder / "checkpoints").exists() or not (folder / "config.json").is_file():
        return False
    try:
        values = _json(folder, "config.json")
    except SotaError:
        return False
    return isinstance(values, dict) and ("model_type" in values or "architectures" in values)


def read_model(folder: Path) -> Transformer:
    """The model of a folder, float32 on the CPU, in evaluation mode. SotaError 65 or 66."""
    if not folder.is_dir():
        raise SotaError(f"{folder}: no such folder", NO_INPUT)
    try:
        config = own_config(_json(folder, "config.json"))
        _check_tokenizer(folder)
        return own_model(config, _all_tensors(folder, config))
    except SotaError as error:
        raise SotaError(f"{folder}: {error}", error.code) from error


def _open(folder: Path, name: str) -> BinaryIO:
    """Open a regular file inside the folder. SotaError 65 or 66."""
    try:
        return open_regular(folder / name)
    except FileNotFoundError as error:
        raise SotaError(f"has no {name}", NO_INPUT) from error
    except OSError as error:
        raise SotaError(f"{name}: {error.strerror}", BAD_DATA) from error


def _json(folder: Path, name: str) -> Any:
    with _open(folder, name) as file:
        data = file.read(_JSON_BYTES + 1)
    if len(data) > _JSON_BYTES:
        raise SotaError(f"{name} is larger than {_JSON_BYTES >> 20} MiB", BAD_DATA)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SotaError(f"{name}: not JSON ({str(error)[:100]})", BAD_DATA) from error


def _check_tokenizer(folder: Path) -> None:
    """SotaError 65 if the folder's tokenizer is not GPT-2's: ids would mean other tokens, and
    nothing else would reveal it.
    """
    if not os.path.lexists(folder / _TOKENIZER):
        return
    own = _json(folder, _TOKENIZER)
    model = own.get("model") if isinstance(own, dict) else None
    found = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(found, dict) or any(
        found.get(text) != token for token, text in enumerate(vocabulary()[:EOT])
    ):
        raise SotaError(f"{_TOKENIZER} is not GPT-2's, the only supported one", BAD_DATA)


def _all_tensors(folder: Path, config: Model) -> dict[str, Tensor]:
    """Every tensor of the configuration, exactly once, from one file or from parts."""
    expected = expected_shapes(config)
    found: dict[str, Tensor] = {}
    for name in _files(folder):
        for key, tensor in _file_tensors(folder, name, expected).items():
            if key in found:
                raise SotaError(f"{name}: duplicate tensor {key}", BAD_DATA)
            found[key] = tensor
    if missing := sorted(set(expected) - set(found)):
        raise SotaError(f"tensors are missing: {', '.join(missing[:5])}", BAD_DATA)
    return found


def _files(folder: Path) -> list[str]:
    """Names of the files that hold tensors."""
    if os.path.lexists(folder / WEIGHTS):
        return [WEIGHTS]
    if not os.path.lexists(folder / _INDEX):
        if os.path.lexists(folder / _PICKLED):
            text = f"{_PICKLED} can run code and is not read; save the model again by transformers"
            raise SotaError(f"{text}' save_pretrained, which writes {WEIGHTS}", NO_INPUT)
        raise SotaError(f"has no {WEIGHTS}", NO_INPUT)
    index = _json(folder, _INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise SotaError(f"{_INDEX}: needs a weight_map", BAD_DATA)
    for name in names.values():
        if not isinstance(name, str) or not _PART.fullmatch(name):
            raise SotaError(f"{_INDEX}: bad file name {str(name)[:80]!r}", BAD_DATA)
    return sorted(set(names.values()))


def _file_tensors(
    folder: Path, name: str, expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of one file, each with an expected name and shape."""
    with _open(folder, name) as file:
        try:  # by descriptor, so that the file read is the regular file that was opened
            with safe_open(f"/dev/fd/{file.fileno()}", framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no dict)
                    _check(name, key, opened.get_slice(key), expected)
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SotaError(f"{name}: not safetensors ({error})", BAD_DATA) from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise SotaError(f"{name}: contains non-finite numbers", BAD_DATA)
    return tensors


def _check(name: str, key: str, entry: Any, expected: dict[str, tuple[int, ...]]) -> None:
    """SotaError 65 for a tensor that does not match the configuration."""
    if key not in expected:
        raise SotaError(f"{name}: unknown tensor {key[:80]!r}", BAD_DATA)
    if entry.get_dtype() not in ("F32", "F16", "BF16"):
        raise SotaError(f"{name}: {key} is not float32, float16 or bfloat16", BAD_DATA)
    if entry.get_shape() != list(expected[key]):
        text = f"{str(entry.get_shape())[:60]}, not {list(expected[key])}"
        raise SotaError(f"{name}: {key} has shape {text}", BAD_DATA)
