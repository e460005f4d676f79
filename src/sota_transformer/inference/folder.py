"""Reads a Hugging Face folder of this family without trusting one byte of it.

The configuration has a closed list of keys, file names come from an allow-list, links are not
followed, and every shape and offset of a safetensors header is checked against the configuration
and the size of the file before anything is allocated. Nothing is run, nothing outside is opened.
"""

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sota_transformer.config import Model
from sota_transformer.errors import BAD_DATA, NO_INPUT, SotaError
from sota_transformer.inference.layout import expected_shapes, own_config, own_tensors
from sota_transformer.model.transformer import Transformer, rotary

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_JSON_BYTES = 4 << 20
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_model_folder(folder: Path) -> bool:
    """Whether this is a folder of Hugging Face's kind rather than one of our runs."""
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
        tensors = _all_tensors(folder, config)
    except SotaError as error:
        raise SotaError(f"{folder}: {error}", error.code) from error
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        model = Transformer(config)
    model.load_state_dict(own_tensors(config, tensors), assign=True)
    model.rope = rotary(config.seq_len, config.head_dim, config.rope_base)
    return model.eval()


def _open(folder: Path, name: str) -> BinaryIO:
    """A plain file inside the folder; never a link, never a pipe."""
    path = folder / name
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except FileNotFoundError as error:
        raise SotaError(f"has no {name}", NO_INPUT) from error
    except OSError as error:
        raise SotaError(f"{name}: {error.strerror}", BAD_DATA) from error


def _json(folder: Path, name: str) -> Any:
    with _open(folder, name) as file:
        data = file.read(_JSON_BYTES + 1)
    if len(data) > _JSON_BYTES:
        raise SotaError(f"{name} is larger than {_JSON_BYTES >> 20} MiB", BAD_DATA)
    return _parse(data, name)


def _parse(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SotaError(f"{name}: not JSON ({str(error)[:100]})", BAD_DATA) from error


def _all_tensors(folder: Path, config: Model) -> dict[str, Tensor]:
    """Every tensor of the configuration, once, from one file or from parts."""
    expected = expected_shapes(config)
    found: dict[str, Tensor] = {}
    for name in _files(folder):
        for key, tensor in _file_tensors(folder, name, expected).items():
            if key in found:
                raise SotaError(f"{name}: {key} is there twice", BAD_DATA)
            found[key] = tensor
    if missing := sorted(set(expected) - set(found)):
        raise SotaError(f"tensors are missing: {', '.join(missing[:5])}", BAD_DATA)
    return found


def _files(folder: Path) -> list[str]:
    """Names of the files with tensors."""
    if os.path.lexists(folder / WEIGHTS) or not os.path.lexists(folder / _INDEX):
        return [WEIGHTS]
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
    """The tensors of one file, each with a name and a shape that are expected."""
    with _open(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _JSON_BYTES):
            raise SotaError(f"{name}: not safetensors (header of {length:,} bytes)", BAD_DATA)
        header = _parse(file.read(length), name)
        if not isinstance(header, dict):
            raise SotaError(f"{name}: not safetensors (the header is no object)", BAD_DATA)
        header.pop("__metadata__", None)
        entries = sorted(
            (_entry(name, key, value, expected) for key, value in header.items()),
            key=lambda entry: entry[1],
        )
        end = 0
        for key, begin, count, kind in entries:  # without gaps or overlaps, up to the last byte
            if begin != end:
                raise SotaError(f"{name}: the offsets of {key} are wrong", BAD_DATA)
            end = begin + count * kind.itemsize
        if end != size - 8 - length:
            raise SotaError(f"{name}: {size:,} bytes are not those of its header", BAD_DATA)
        return {
            key: _read(file, name, count, kind).reshape(expected[key])
            for key, _, count, kind in entries
        }


def _entry(
    name: str, key: str, value: Any, expected: dict[str, tuple[int, ...]]
) -> tuple[str, int, int, torch.dtype]:
    """(tensor, first byte, elements, type) of a header's entry."""
    if key not in expected:
        raise SotaError(f"{name}: unknown tensor {key[:80]!r}", BAD_DATA)
    shape, kind = expected[key], None
    if isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"}:
        kind = _TYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if kind is None:
        raise SotaError(f"{name}: {key} is not float32, float16 or bfloat16", BAD_DATA)
    if value["shape"] != list(shape):
        text = str(value["shape"])[:60]
        raise SotaError(f"{name}: {key} has shape {text}, not {list(shape)}", BAD_DATA)
    count = int(np.prod(shape))
    begin, *end = value["data_offsets"] if isinstance(value["data_offsets"], list) else [None]
    if not isinstance(begin, int) or end != [begin + count * kind.itemsize]:
        raise SotaError(f"{name}: the offsets of {key} are wrong", BAD_DATA)
    return key, begin, count, kind


def _read(file: BinaryIO, name: str, count: int, kind: torch.dtype) -> Tensor:
    """The next `count` elements."""
    data = bytearray(count * kind.itemsize)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise SotaError(f"{name}: cut short", BAD_DATA)
    tensor = torch.frombuffer(data, dtype=kind)
    if not torch.isfinite(tensor).all():
        raise SotaError(f"{name}: holds numbers that are not finite", BAD_DATA)
    return tensor
