"""Maps our configuration and tensor names to Hugging Face's and back, without any file access.

A model without QK-norm is a LlamaForCausalLM, one with it a Qwen3ForCausalLM. Our fused matrices
stack theirs by rows: `qkv` holds q, k and v, `gate_up` holds gate and up. The embedding is tied, so
there is no `lm_head`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sota_transformer.config import GPT2_VOCAB, MOST_VOCAB, Model
from sota_transformer.data.tokenizer import EOT
from sota_transformer.errors import BAD_DATA, SotaError
from sota_transformer.model.loss import PAD
from sota_transformer.model.transformer import Transformer, rotary

_LARGEST_ROTARY = 1 << 26  # positions x head dimension
_SIZES = {  # our name: theirs, and the largest accepted value
    "layers": ("num_hidden_layers", 512),
    "d_model": ("hidden_size", 65_536),
    "heads": ("num_attention_heads", 1024),
    "kv_heads": ("num_key_value_heads", 1024),
    "d_ff": ("intermediate_size", 262_144),
    "seq_len": ("max_position_embeddings", 1 << 17),
    "vocab_size": ("vocab_size", MOST_VOCAB),
}
# Other allowed keys of a config.json, with the values that our model supports.
_NEEDED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "is_decoder": (False, True),
}
_APART = {  # checked individually
    "model_type", "tie_word_embeddings", "layer_types", "head_dim", "rms_norm_eps", "rope_theta",
    "rope_parameters",
}  # fmt: skip
_ANY = {  # ignored: they do not change what the model computes
    "architectures", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "torch_dtype", "transformers_version", "initializer_range", "use_cache", "_name_or_path",
}  # fmt: skip


def huggingface_config(config: Model, dtype: str) -> dict[str, Any]:
    """The content of config.json; `dtype` is that of the exported tensors."""
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, (theirs, _) in _SIZES.items()}
    values |= {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        # In both forms: transformers 5 reads the second, other programs the first.
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": EOT,
        "eos_token_id": EOT,
        "pad_token_id": PAD if config.vocab_size > PAD else EOT,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.qk_norm:
        return values | {"use_sliding_window": False, "sliding_window": None}
    return values | {"mlp_bias": False}


def own_config(values: Any) -> Model:
    """Our configuration from a config.json. SotaError 65 for any other model family."""
    if not isinstance(values, dict):
        raise SotaError("config.json: needs a JSON object", BAD_DATA)
    if (kind := values.get("model_type")) not in ("llama", "qwen3"):  # their keys differ
        needs = f"model_type {kind!r} (needs 'llama' or 'qwen3')"
        raise SotaError(f"config.json: unsupported model: {needs}"[:600], BAD_DATA)
    known = {*_NEEDED, *_APART, *_ANY, *(theirs for theirs, _ in _SIZES.values())}
    if unknown := sorted(set(values) - known):
        raise SotaError(f"config.json: unknown keys {', '.join(map(repr, unknown[:9]))}", BAD_DATA)
    found = [
        f"{key} {values[key]!r} (needs {' or '.join(map(repr, allowed))})"
        for key, allowed in _NEEDED.items()
        if key in values and values[key] not in allowed
    ]
    if values.get("tie_word_embeddings") is not True:
        found.append("tie_word_embeddings is not true (needs tied embeddings)")
    if found:
        raise SotaError(f"config.json: unsupported model: {'; '.join(found)}"[:600], BAD_DATA)
    values = {"num_key_value_heads": values.get("num_attention_heads")} | values
    sizes = {ours: _whole(values, theirs, most) for ours, (theirs, most) in _SIZES.items()}
    if sizes["vocab_size"] < GPT2_VOCAB:
        raise SotaError(
            f"config.json: vocab_size {sizes['vocab_size']} is below GPT-2's {GPT2_VOCAB:,}; only "
            "the GPT-2 tokenizer is supported",
            BAD_DATA,
        )
    return _model(values, sizes)


def _model(values: dict[str, Any], sizes: dict[str, int]) -> Model:
    """The configuration, from checked sizes."""
    rope = {} if values.get("rope_parameters") is None else values["rope_parameters"]
    # The type has two key names; any other key would be for another type.
    if not isinstance(rope, dict) or any(
        value != "default" for key, value in rope.items() if key != "rope_theta"
    ):
        raise SotaError("config.json: rope_parameters must be of type default", BAD_DATA)
    model = Model(
        **sizes,
        rope_base=_real(rope.get("rope_theta", values.get("rope_theta", 10_000.0)), "rope_theta"),
        norm_eps=_real(values.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        qk_norm=values["model_type"] == "qwen3",
    )
    problems = model.problems()
    if values.get("head_dim", model.head_dim) != model.head_dim:
        problems.append(f"head_dim {values['head_dim']!r} is not hidden_size / num_attention_heads")
    if values.get("layer_types") not in (None, ["full_attention"] * model.layers):
        problems.append("layer_types must be full_attention, once for each layer")
    if model.seq_len * model.head_dim > _LARGEST_ROTARY:
        problems.append(f"max_position_embeddings {model.seq_len} is too long for this head_dim")
    if problems:
        raise SotaError(f"config.json: {'; '.join(problems)}", BAD_DATA)
    return model


def _whole(values: dict[str, Any], name: str, largest: int) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 < value <= largest:
        text = repr(value)[:40]
        raise SotaError(f"config.json: {name} {text} must be from 1 to {largest:,}", BAD_DATA)
    return value


def _real(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise SotaError(f"config.json: {name} {value!r} must be above 0", BAD_DATA)
    return float(value)


def _parts(config: Model) -> Iterator[tuple[str, str, slice]]:
    """(their name, our name, the rows in ours) of every tensor."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    whole = slice(None)
    yield "model.embed_tokens.weight", "embedding.weight", whole
    yield "model.norm.weight", "norm.weight", whole
    for layer in range(config.layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        edges = (0, queries, queries + keys, queries + 2 * keys)
        for name, begin, end in zip("qkv", edges, edges[1:], strict=False):
            rows, fused = slice(begin, end), f"{ours}.attention.qkv.weight"
            yield f"{theirs}.self_attn.{name}_proj.weight", fused, rows
        yield f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight", whole
        both = f"{ours}.mlp.gate_up.weight"
        yield f"{theirs}.mlp.gate_proj.weight", both, slice(config.d_ff)
        yield f"{theirs}.mlp.up_proj.weight", both, slice(config.d_ff, None)
        yield f"{theirs}.mlp.down_proj.weight", f"{ours}.mlp.down.weight", whole
        yield f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", whole
        yield f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight", whole
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield f"{theirs}.self_attn.{name}.weight", f"{ours}.attention.{name}.weight", whole


def huggingface_tensors(model: Transformer) -> dict[str, Tensor]:
    """The weights by Hugging Face name, float32 on the CPU; views if the model is there too."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return {theirs: state[ours][rows] for theirs, ours, rows in _parts(model.config)}


def expected_shapes(config: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by Hugging Face name."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {theirs: tuple(state[ours][rows].shape) for theirs, ours, rows in _parts(config)}


def own_model(config: Model, tensors: dict[str, Tensor]) -> Transformer:
    """The model in float32, in evaluation mode; `tensors` has the names of `expected_shapes`."""
    pieces: dict[str, list[Tensor]] = {}
    for theirs, ours, _ in _parts(config):
        pieces.setdefault(ours, []).append(tensors[theirs].float())
    with torch.device("meta"):  # allocates no memory for weights that are replaced below
        model = Transformer(config)
    model.load_state_dict({name: torch.cat(parts) for name, parts in pieces.items()}, assign=True)
    model.rope = rotary(config.seq_len, config.head_dim, config.rope_base)
    return model.eval()
