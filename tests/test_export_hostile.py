"""A model folder from anywhere: whatever it holds, it is read or refused, with no side effects."""

import json
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sota_transformer.commands.transfer import run_export
from sota_transformer.errors import SotaError
from sota_transformer.inference.folder import read_model
from sota_transformer.options import Export
from tests.inference_models import KINDS, small_model, write_run


@pytest.fixture(scope="module", params=sorted(KINDS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "mine", small_model(KINDS[request.param]))
    out = tmp_path_factory.mktemp("exports") / "hf"
    assert run_export(Export(run=run, out=out)) == 0
    return out


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch PWNED",)


def header(entries: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def rewrite(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _index(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _overlap(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    entries["model.layers.0.mlp.up_proj.weight"]["data_offsets"] = entries[
        "model.layers.0.mlp.gate_proj.weight"
    ]["data_offsets"]
    path.write_bytes(header(entries, data[8 + size :]))


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def _link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/passwd")


def _fifo(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


WEIGHTS: dict[str, Callable[[Path], object]] = {
    "pickle": lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Bomb())),
    "zip of torch": lambda f: torch.save({"x": torch.ones(3)}, f / "model.safetensors"),
    "header of 2^63": lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 63)),
    "header beyond the file": lambda f: (f / "model.safetensors").write_bytes(
        struct.pack("<Q", 1 << 20) + b"{}"
    ),
    "deep header": lambda f: (f / "model.safetensors").write_bytes(
        struct.pack("<Q", 100_000) + b"[" * 100_000
    ),
    "empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "cut short": lambda f: os.truncate(f / "model.safetensors", 1_000_000),
    "trailing byte": lambda f: (f / "model.safetensors").open("ab").write(b"x"),
    "overlapping offsets": _overlap,
    "unknown tensor": lambda f: save_file(
        load_file(f / "model.safetensors") | {"evil": torch.ones(1)}, f / "model.safetensors"
    ),
    "missing tensors": lambda f: (f / "model.safetensors").write_bytes(header({})),
    "not finite": _nan,
    "link": _link,
    "fifo": _fifo,
    "path in an index": lambda f: _index(f, "../../etc/passwd"),
    "absolute path in an index": lambda f: _index(f, "/etc/passwd"),
    "a billion layers": lambda f: rewrite(f, num_hidden_layers=10**9),
    "many layers": lambda f: rewrite(f, num_hidden_layers=500),
    "a huge width": lambda f: rewrite(f, hidden_size=65_536, head_dim=16_384),
    "a huge context": lambda f: rewrite(f, max_position_embeddings=1 << 40),
    "layers as text": lambda f: rewrite(f, num_hidden_layers="2"),
    "layer types as a number": lambda f: rewrite(f, layer_types=2),
    "layer types of fewer layers": lambda f: rewrite(f, layer_types=["full_attention"]),
    "sliding layers": lambda f: rewrite(f, layer_types=["full_attention", "sliding_attention"]),
    "unknown key": lambda f: rewrite(f, auto_map={"AutoModelForCausalLM": "evil.Model"}),
    "attention implementation": lambda f: rewrite(f, _attn_implementation_internal="evil/kernel"),
    "another family": lambda f: rewrite(f, model_type="gpt2"),
    "another activation": lambda f: rewrite(f, hidden_act="gelu"),
    "another rope": lambda f: rewrite(f, rope_parameters={"rope_type": "yarn", "factor": 4}),
    "another rope by its old name": lambda f: rewrite(
        f, rope_parameters={"type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "rope as a list": lambda f: rewrite(f, rope_parameters=[]),
    "half a rope": lambda f: rewrite(f, rope_parameters={"partial_rotary_factor": 0.5}),
    "another vocabulary": lambda f: rewrite(f, vocab_size=32_000),
    "another tokenizer": lambda f: (f / "tokenizer.json").write_text(
        (f / "tokenizer.json").read_text().replace('"Ġthe": 262', '"Ġder": 262')
    ),
    "a tokenizer of another kind": lambda f: (f / "tokenizer.json").write_text('{"model": {}}'),
    "config as a list": lambda f: (f / "config.json").write_text("[]"),
    "deep config": lambda f: (f / "config.json").write_text("[" * 100_000),
    "config with NaN": lambda f: rewrite(f, rms_norm_eps=float("nan")),
    "config of 10 MB": lambda f: rewrite(f, _name_or_path="x" * 10_000_000),
}


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_hostile_folders_are_refused(
    exported: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    WEIGHTS[name](folder)
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching[0] and event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(os.fspath(arguments[0]))

    sys.addaudithook(watch)
    began = time.process_time()  # not what other programs take
    with pytest.raises(SotaError) as caught:
        read_model(folder)
    watching[0] = False
    assert caught.value.code == 65
    assert time.process_time() - began < 5
    assert [path for path in opened if not path.startswith(str(folder))] == []
    assert [path.name for path in tmp_path.iterdir()] == ["hostile"]  # no PWNED


def test_pickled_weights_are_refused_with_what_to_do(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.raises(SotaError, match=r"has no model\.safetensors") as caught:
        read_model(tmp_path)
    torch.save({"x": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SotaError, match=r"which writes model\.safetensors"):
        read_model(tmp_path)
    assert caught.value.code == 66
