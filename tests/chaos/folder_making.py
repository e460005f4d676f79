"""Random Hugging Face model folders like those in use; for folders.py.

Each starts as a model of our family and has up to three oddities, each with the outcome it allows:
some affect the configuration and the tensors (EARLY), others the files (LATE).
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from sota_transformer.config import GPT2_VOCAB, VOCAB
from sota_transformer.data.tokenizer import EOT

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GONE = object()


class Fate(IntEnum):
    """Allowed outcome of a folder; with several oddities, the highest."""

    TAKE = 0  # it has to be accepted
    KEEP = 1  # it may be refused; the oddity does not change the model
    OTHER = 2  # it may be refused; the model is as transformers reads it
    NONE = 3  # it has to be refused


TAKE, KEEP, OTHER, NONE = Fate


@dataclass
class Made:
    """A folder before it is written, and its allowed outcome."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    fate: Fate = TAKE
    oddities: list[str] = field(default_factory=list)


def base(source: random.Random) -> Made:
    """A folder of the family, in the format of transformers 4 or 5."""
    kind, head = source.choice(["llama", "qwen3"]), source.choice([2, 4, 6, 8, 8, 12, 16])
    kv, groups = source.randint(1, 4), source.choice([1, 1, 2, 3])
    theta = source.choice([100.0, 1e4, 1e4, 5e5, 10_000, 1_000_000])
    sizes = {
        "hidden_size": kv * groups * head, "intermediate_size": source.randint(1, 80),
        "num_hidden_layers": source.randint(1, 3), "num_attention_heads": kv * groups,
        "num_key_value_heads": kv, "head_dim": head, "hidden_act": "silu", "use_cache": True,
        "max_position_embeddings": source.choice([8, 9, 16, 33, 64]),
        "vocab_size": source.choice([GPT2_VOCAB, VOCAB, VOCAB, 50_304, 50_260]),
        "rms_norm_eps": source.choice([1e-6, 1e-5, 1e-3, 0.1]), "tie_word_embeddings": True,
        "bos_token_id": EOT, "eos_token_id": EOT, "attention_bias": False,
        "attention_dropout": 0.0, "initializer_range": 0.02,
    }  # fmt: skip
    made, dtype = Made({}, {}), source.choice(["float32", "float16", "bfloat16", "mixed"])
    named = "float32" if dtype == "mixed" else dtype
    if source.random() < 0.06:  # heads wider or narrower than their share
        sizes["head_dim"], made.fate = head + 2, OTHER
        made.oddities.append("head_dim")
    make = LlamaConfig if kind == "llama" else Qwen3Config
    rope = {"rope_type": "default", "rope_theta": theta}
    if source.random() < 0.5:
        made.config = json.loads(make(**sizes, rope_parameters=rope).to_json_string())
        made.config |= {"dtype": named}
    else:
        made.config = sizes | {"torch_dtype": named, "transformers_version": "4.51.3"}
        made.config |= source.choice(
            [{"rope_theta": theta, "rope_scaling": None}, {"rope_theta": theta},
             {"rope_theta": theta, "rope_parameters": rope}, {"rope_parameters": rope},
             {"rope_parameters": {"rope_theta": theta}}]
        )  # fmt: skip
        if theta == 1e4 and source.random() < 0.5:
            made.config = {k: v for k, v in made.config.items() if not k.startswith("rope_")}
        theirs = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
        made.config |= theirs if kind == "qwen3" else {"mlp_bias": False, "pretraining_tp": 1}
    name = make.__name__.replace("Config", "ForCausalLM")
    made.config |= {"model_type": kind, "architectures": [name]}
    made.tensors = _tensors(source, sizes, kind, dtype)
    return made


def _tensors(
    source: random.Random, sizes: dict[str, Any], kind: str, dtype: str
) -> dict[str, Tensor]:
    """Weights by name, large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(source.randrange(1 << 40))
    width, hidden, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = (sizes[f"num_{x}_heads"] * head for x in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (sizes["vocab_size"], width), "norm": (width,),
    }  # fmt: skip
    for n in range(sizes["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden), "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }  # fmt: skip
        if kind == "qwen3":
            parts |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        shapes |= {f"layers.{n}.{name}": shape for name, shape in parts.items()}
    scale, found = source.choice([0.03, 1.0]), dict[str, Tensor]()
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        size = scale if name == "embed_tokens" else 1.5 * shape[-1] ** -0.5
        tensor = tensor * size if len(shape) == 2 else 1 + 0.3 * tensor
        chosen = source.choice(["float32", "float16", "bfloat16"]) if dtype == "mixed" else dtype
        found[f"model.{name}.weight"] = tensor.to(getattr(torch, chosen))
    return found


Change = Callable[[random.Random, Made], object]


def some(*choices: dict[str, Any]) -> Change:
    """Put one of these into the configuration; GONE removes a key."""
    return lambda source, made: made.config.update(source.choice(choices))


def _renamed(key: str, new: Callable[[Any], Any]) -> Change:
    return lambda _, made: made.config.update({key: new(made.config.get(key))})


def _rope(source: random.Random, made: Made) -> None:
    """Scaled rotary positions, in one of the notations in use."""
    kind = source.choice(["linear", "linear", "dynamic", "yarn", "llama3", "default", "su", None])
    words = {source.choice(["rope_type", "type"]): kind, "factor": source.choice([2.0, 8.0])}
    if kind == "llama3":
        words |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        words["original_max_position_embeddings"] = 16
    if source.random() < 0.5:
        words["rope_theta"] = source.choice([500.0, 1e4])
    made.config[source.choice(["rope_scaling", "rope_parameters"])] = words


def _named(source: random.Random, made: Made) -> str:
    return source.choice(sorted(made.tensors))


def _tensor(change: Callable[[Tensor], Tensor]) -> Change:
    """Replace one tensor."""

    def work(source: random.Random, made: Made) -> None:
        name = _named(source, made)
        made.tensors[name] = change(made.tensors[name]).contiguous()
        if change is torch.t and len(set(made.tensors[name].shape)) == 1:
            made.tensors[name] = made.tensors[name][:0]

    return work


def _holed(number: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.float().clone()
        tensor.view(-1)[len(tensor) // 2 :][:1] = number
        return tensor

    return change


def _head(other: bool, tied: bool) -> Change:
    def change(_: random.Random, made: Made) -> None:
        head = next(iter(made.tensors.values())).clone()  # the embedding, if it is there
        made.tensors["lm_head.weight"] = head.flip(0) if other else head
        made.config["tie_word_embeddings"] = tied

    return change


def _biased(source: random.Random, made: Made) -> None:
    """Biases on the projections, with or without their tensors."""
    flag, parts = source.choice([("attention_bias", "qkvo"), ("mlp_bias", ("gate", "up", "down"))])
    made.config[flag] = source.choice([True, True, 1])
    for name, tensor in list(made.tensors.items()) if source.random() < 0.7 else ():
        if name.endswith(tuple(f".{part}_proj.weight" for part in parts)):
            made.tensors[name.replace("weight", "bias")] = torch.ones(len(tensor))


def _norms(_: random.Random, made: Made) -> None:
    """The other architecture's name: missing norms, or unexpected ones."""
    made.config["model_type"] = "llama" if made.config["model_type"] == "qwen3" else "qwen3"


def _longer(count: int) -> Change:
    return _renamed("num_hidden_layers", lambda n: int(n) + count)


SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
SLIDING |= {"layer_types": GONE}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 300.0}}
KINDS = [{"model_type": kind} for kind in ("mistral", "qwen2", "gpt2", "gemma", "phi3", "x", None)]
EARLY: dict[str, tuple[Fate, Change]] = {  # on the configuration and the tensors
    "ids": (TAKE, some(*({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": x} for x in (
        0, None, -1, 50256)), {"eos_token_id": [EOT, 0]}, {"bos_token_id": None})),
    "invalid ids": (KEEP, some({"pad_token_id": 60_000}, {"eos_token_id": "</s>"})),
    "extra keys": (KEEP, some({"my_note": "x"}, {"auto_map": {}}, {"quantization_config": None})),
    "numbers as text": (KEEP, _renamed("num_hidden_layers", str)),
    "numbers as floats": (KEEP, _renamed("hidden_size", float)),
    "booleans as numbers": (KEEP, some({"attention_bias": 0}, {"use_cache": 1}, {"mlp_bias": ""})),
    "numbers as booleans": (KEEP, _renamed("num_hidden_layers", lambda n: n == 1 or n)),
    "no head_dim": (KEEP, some({"head_dim": GONE}, {"head_dim": None})),
    "no kv heads": (KEEP, some({"num_key_value_heads": GONE}, {"num_key_value_heads": None})),
    "no eps": (OTHER, some({"rms_norm_eps": GONE}, {"rms_norm_eps": None}, {"rms_norm_eps": 0})),
    "eps": (NONE, some({"rms_norm_eps": math.nan}, {"rms_norm_eps": -1.0})),
    "short": (OTHER, some({"max_position_embeddings": 7}, {"max_position_embeddings": 1})),
    "rope": (OTHER, _rope),
    "plain rope": (KEEP, some({"rope_scaling": {}}, {"partial_rotary_factor": 1.0})),
    "rope twice": (OTHER, some({"rope_theta": 300}, {"rope_parameters": {"rope_theta": 300.0}},
        {"rope_parameters": NESTED}, {"rope_parameters": NESTED | {"rope_theta": 70.0}},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 50.0})),
    "partial rope": (OTHER, some({"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}})),
    "bad rope": (OTHER, some({"rope_parameters": []}, {"rope_parameters": "default"},
        {"rope_parameters": GONE, "rope_theta": "10000"}, {"rope_theta": None})),
    "activation": (OTHER, some({"hidden_act": "gelu"}, {"hidden_act": "relu"},
        {"hidden_act": "swish"}, {"hidden_act": GONE}, {"hidden_act": None})),
    "sliding": (OTHER, some(SLIDING, SLIDING, {"sliding_window": 4},
        {"layer_types": ["sliding_attention"] * 3}, {"layer_types": ["full_attention"]})),
    "bias": (OTHER, _biased), "kind": (OTHER, some(*KINDS)), "other norms": (OTHER, _norms),
    "architectures": (KEEP, some({"architectures": ["MistralForCausalLM"]},
        {"architectures": None}, {"architectures": GONE})),
    "unclear ties": (OTHER, some(*({"tie_word_embeddings": x} for x in (
        GONE, None, 1, False, "true")))),
    "one layer more": (NONE, _longer(1)), "one layer less": (OTHER, _longer(-1)),
    "vocabulary": (OTHER, some({"vocab_size": 32_000}, {"vocab_size": 50_256})),
    "other sizes": (NONE, some({"hidden_size": 52}, {"intermediate_size": 81},
        {"num_attention_heads": 0}, {"num_key_value_heads": 5}, {"vocab_size": 50_300})),
    "equal head": (KEEP, _head(False, True)), "another head": (OTHER, _head(True, True)),
    "untied": (OTHER, _head(True, False)), "untied, equal": (OTHER, _head(False, False)),
    "inv_freq": (KEEP, lambda _, made: made.tensors.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
    "no prefix": (KEEP, lambda _, made: setattr(made, "tensors",
        {name.removeprefix("model."): each for name, each in made.tensors.items()})),
    "no tensor": (NONE, lambda source, made: made.tensors.pop(_named(source, made))),
    "another name": (NONE, lambda source, made: made.tensors.update(
        {"strange": made.tensors.pop(_named(source, made))})),
    "turned": (NONE, _tensor(torch.t)), "empty": (NONE, _tensor(lambda x: x[:0])),
    "flat": (NONE, _tensor(lambda x: x.reshape(-1, 1))),
    "nan": (NONE, _tensor(_holed(math.nan))), "infinite": (NONE, _tensor(_holed(-math.inf))),
    "float64": (KEEP, _tensor(torch.Tensor.double)), "whole": (OTHER, _tensor(torch.Tensor.int)),
}  # fmt: skip


def write(made: Made, folder: Path) -> None:
    """One file of weights and the configuration."""
    folder.mkdir(parents=True)
    values = {key: value for key, value in made.config.items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    save_file(made.tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _parts(source: random.Random, folder: Path) -> list[Path]:
    """Split the weights into two to four files with an index."""
    tensors, count = load_file(folder / WEIGHTS), source.randint(2, 4)
    where = {name: source.randrange(count) for name in tensors}
    for number, name in enumerate(source.sample(sorted(tensors), count)):
        where[name] = number  # none is empty
    paths = [folder / f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    for number, path in enumerate(paths):
        mine = {name: tensors[name] for name in tensors if where[name] == number}
        save_file(mine, path, metadata={"format": "pt"})
    named = {name: paths[number].name for name, number in where.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": named}))
    (folder / WEIGHTS).unlink()
    return paths


def _moved(source: random.Random, folder: Path, *, keep: bool, change: float = 1.0) -> None:
    """Put a tensor into another file than the index says; additionally, or only there."""
    one, two = _parts(source, folder)[:2]
    first, second = load_file(one), load_file(two)
    name = source.choice(sorted(first))
    second[name] = first[name] * change
    if not keep:
        del first[name]
    save_file(first, one, metadata={"format": "pt"})
    save_file(second, two, metadata={"format": "pt"})


def _index(source: random.Random, folder: Path, change: dict[str, Any], less: bool = False) -> None:
    """Extra names in the index, or one missing."""
    _parts(source, folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {name: index["weight_map"][min(index["weight_map"])] for name in change}
    if less:
        del index["weight_map"][source.choice(sorted(index["weight_map"]))]
    (folder / INDEX).write_text(json.dumps(index))


def _both(source: random.Random, folder: Path) -> None:
    """One file and parts, with different weights."""
    tensors = load_file(folder / WEIGHTS)
    _parts(source, folder)
    save_file({n: t * 1.5 for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def _beside(_: random.Random, folder: Path) -> None:
    """Other files beside a model: hidden ones, generation settings, files naming no token."""
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": 5}')
    (folder / "vocab.json").write_text('{"a": 0}')


def _pickled(_: random.Random, folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _linked(name: str) -> Callable[[random.Random, Path], None]:
    """A file, or the folder, is a link to elsewhere, as in Hugging Face's cache."""

    def change(_: random.Random, folder: Path) -> None:
        path = folder / name
        there = path.rename(folder.parent / f"there-{path.name}")
        path.symlink_to(os.path.relpath(there, path.parent))

    return change


def _text(change: Callable[[str], str | bytes]) -> Callable[[random.Random, Path], None]:
    def work(_: random.Random, folder: Path) -> None:
        text = change((folder / "config.json").read_text())
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return work


def _saved(source: random.Random, folder: Path) -> None:
    """Rewritten by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size=source.choice(["200KB", "5GB"]))


OTHERS = ("", "{", "{}", '{"model": {"type": "BPE", "vocab": {"the": 0}}}')
LATE: dict[str, tuple[Fate, Callable[[random.Random, Path], object]]] = {  # on the files
    "parts": (TAKE, _parts), "saved": (TAKE, _saved), "beside": (TAKE, _beside),
    "folder is a link": (TAKE, _linked("")), "read-only": (TAKE, lambda _, f: f.chmod(0o555)),
    "another tokenizer": (NONE, lambda s, f: (f / "tokenizer.json").write_text(s.choice(OTHERS))),
    "files are links": (KEEP, _linked(WEIGHTS)), "config is a link": (KEEP, _linked("config.json")),
    "a tensor in another file": (KEEP, lambda s, f: _moved(s, f, keep=False)),
    "a tensor twice": (KEEP, lambda s, f: _moved(s, f, keep=True)),
    "a tensor twice, different": (OTHER, lambda s, f: _moved(s, f, keep=True, change=1.5)),
    "a part is missing": (NONE, lambda s, f: _parts(s, f)[-1].unlink()),
    "a part is another": (NONE, lambda s, f: shutil.copy(*_parts(s, f)[:2])),
    "more in the index": (KEEP, lambda s, f: _index(s, f, {"model.layers.9.norm": 1})),
    "less in the index": (KEEP, lambda s, f: _index(s, f, {}, less=True)),
    "no index": (OTHER, lambda s, f: _parts(s, f) and (f / INDEX).unlink()),
    "one file and parts": (OTHER, _both),
    "pickled": (KEEP, _pickled), "no weights": (NONE, lambda _, f: (f / WEIGHTS).unlink()),
    "another file name": (OTHER, lambda _, f: (f / WEIGHTS).rename(f / "consolidated.safetensors")),
    "cut": (NONE, lambda s, f: os.truncate(f / WEIGHTS, s.choice([0, 7, 100, 100_000]))),
    "a byte more": (NONE, lambda _, f: (f / WEIGHTS).open("ab").write(b"x")),
    "byte order mark": (KEEP, _text(lambda text: b"\xef\xbb\xbf" + text.encode())),
    "utf-16": (KEEP, _text(lambda text: text.encode("utf-16"))),
    "key twice": (KEEP, _text(lambda text: text.replace("{", '{"num_hidden_layers": 9,', 1))),
    "no json": (NONE, _text(lambda text: text[:-2])), "a list": (NONE, _text("[{}]".format)),
    "nothing": (NONE, _text(lambda _: "")), "comment": (NONE, _text(lambda text: "// x\n" + text)),
    "no config": (NONE, lambda _, f: (f / "config.json").unlink()),
}  # fmt: skip


def _drawn(source: random.Random, table: dict[str, tuple[Fate, Any]], count: int) -> list[str]:
    """Draw oddities, preferring those where an error can go unnoticed."""
    often = [3 if fate in (TAKE, OTHER) else 1 for fate, _ in table.values()]
    return source.sample(list(table), count, counts=often)


def make(number: int, seed: int, place: Path) -> Made:
    """Folder `number` of a seed, at place/model; without its oddities at place/plain."""
    source = random.Random(f"{seed} {number}")
    made, folder = base(source), place / "model"
    write(made, place / "plain")
    early = _drawn(source, EARLY, source.choice([0, 0, 0, 0, 1, 1, 1, 2]))
    late = _drawn(source, LATE, source.choice([0, 0, 0, 1] if early else [0, 1]))
    for name in early:
        fate, change = EARLY[name]
        change(source, made)
        made.fate, made.oddities = max(made.fate, fate), [*made.oddities, name]
    write(made, folder)
    for name in late:
        fate, rearrange = LATE[name]
        if name != "saved" or not made.oddities:
            rearrange(source, folder)
            made.fate, made.oddities = max(made.fate, fate), [*made.oddities, name]
    return made
