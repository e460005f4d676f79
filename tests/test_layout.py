"""A config.json is read if our model computes the same, and refused otherwise."""

import dataclasses
from typing import Any

import pytest
import torch

from sota_transformer.errors import BAD_DATA, SotaError
from sota_transformer.inference.layout import (
    expected_shapes,
    huggingface_config,
    huggingface_tensors,
    own_config,
    own_model,
)
from tests.inference_models import KINDS, WIDE, as_transformers, small_model


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def refused(values: Any) -> str:
    with pytest.raises(SotaError) as caught:
        own_config(values)
    assert caught.value.code == BAD_DATA
    return str(caught.value)


def test_our_own_config_comes_back(kind: str) -> None:
    config = dataclasses.replace(KINDS[kind], rope_base=12_345.0, norm_eps=3e-5)
    values = huggingface_config(config, "bfloat16")
    assert own_config(values) == config
    del values["rope_parameters"]  # as older programs write it
    assert own_config(values) == config
    assert own_config(values | {"rope_parameters": None, "rope_scaling": None}) == config
    other = {"rope_type": "default", "rope_theta": 10.0}  # transformers 5 reads this one
    assert own_config(values | {"rope_parameters": other}).rope_base == 10.0


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("hidden_act", ["gelu", None], ["silu"]),
        ("attention_bias", [True, None], [False]),
        ("mlp_bias", [True], [False]),
        ("rope_scaling", [{"rope_type": "linear", "factor": 2.0}], [None]),
        ("use_sliding_window", [True], [False]),
        ("sliding_window", [16], [None]),
        ("attention_dropout", [0.1], [0, 0.0]),
        ("pretraining_tp", [2], [1]),
        ("tie_word_embeddings", [False, None, 1], [True]),
        ("head_dim", [8, 32, None, "16"], [16]),
        ("layer_types", [["full_attention"] * 3, ["full_attention"]], [["full_attention"] * 2]),
        ("layer_types", [["full_attention", "sliding_attention"], "full"], [None]),
        ("rms_norm_eps", [0, -1e-6, "1e-6", True, 1e12, None], [1e-6, 1]),
        ("rope_parameters", [{"rope_type": "yarn"}, {"rope_theta": 0}, [], 5], [{}, None]),
        ("model_type", ["gpt2", "mistral", None], []),
        ("auto_map", [{}], []),
        ("num_hidden_layers", [0, -2, 2.0, "2", True, None, 513], [1, 512]),
        ("hidden_size", [0, 65, 65_540], [64, 65_536]),
        ("num_attention_heads", [0, 3, 1028], [2, 4, 16]),
        ("num_key_value_heads", [0, 3, 8], [1, 2, 4, None]),
        ("intermediate_size", [0, 262_145], [1, 262_144]),
        ("max_position_embeddings", [0, (1 << 17) + 1], [1 << 17]),
        ("vocab_size", [0, 50_256, 1 << 30], [50_257, 50_258, 50_304]),
    ],
)
def test_each_value_that_changes_the_model(
    kind: str, key: str, wrong: list[Any], right: list[Any]
) -> None:
    values = huggingface_config(KINDS[kind], "float32")
    for value in wrong:
        assert "config.json: " in refused(values | {key: value}), value
    for value in right:
        changed = values | {key: value}
        if key in ("hidden_size", "num_attention_heads"):
            del changed["head_dim"]
        if value is None and key == "num_key_value_heads":
            del changed[key]
        if value == 2 and key == "num_attention_heads":
            changed["num_key_value_heads"] = 1
        own_config(changed)


def test_a_rotary_table_has_a_limit() -> None:
    """2^26 angles, 2^17 positions of 2^9 dimensions: 256 MB."""
    values = huggingface_config(dataclasses.replace(WIDE, seq_len=1 << 17), "float32")
    del values["head_dim"]
    own_config(values | {"hidden_size": 2048})
    assert "too long for this head_dim" in refused(values | {"hidden_size": 2056})


def test_every_tensor_is_where_transformers_has_it(kind: str) -> None:
    """Against weights that were copied by hand, and its own shapes for our config."""
    model = small_model(KINDS[kind])
    other = as_transformers(model)
    assert huggingface_config(model.config, "float32")["architectures"] == [type(other).__name__]
    theirs = other.state_dict()
    del theirs["lm_head.weight"]  # tied
    ours = huggingface_tensors(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert expected_shapes(model.config) == {n: tuple(t.shape) for n, t in theirs.items()}
    state = own_model(model.config, {name: t.double() for name, t in theirs.items()}).state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor) and state[name].dtype == torch.float32
