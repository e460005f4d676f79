"""Frozen options, golden sizes, and all problems named at once."""

import dataclasses
import json

import pytest

from sota_transformer.config import Model, Run, RunConfig
from sota_transformer.presets import PRESETS

OPTIONS = {
    "model": "layers d_model heads kv_heads d_ff seq_len vocab_size rope_base norm_eps qk_norm",
    "data": "path windows document_mask",
    "optim": "learning_rate matrix_rate cooldown final_fraction warmup_steps beta1 beta2 eps "
    "weight_decay clip_norm label_smoothing dropout_start dropout_end",
    "train": "steps batch_rows micro_rows gradient_checkpointing log_every eval_every eval_tokens "
    "sample_every save_every_minutes save_every_steps keep_checkpoints",
    "run": "out seed resume exact override data_change device dtype compile threads",
}


def test_the_list_of_options_is_frozen() -> None:
    values = dataclasses.asdict(PRESETS["tiny"]())
    assert {name: " ".join(section) for name, section in values.items()} == OPTIONS
    assert sum(len(section) for section in values.values()) <= 47


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tiny", 3_317_184), ("16m", 16_030_464), ("125m", 123_552_000), ("250m", 257_018_880)],
)
def test_sizes_are_what_their_names_say(name: str, parameters: int) -> None:
    assert PRESETS[name]().model.parameter_count == parameters


def test_the_seed_recipe_is_that_of_the_original_script() -> None:
    optim = PRESETS["125m"]().optim
    assert (optim.learning_rate, optim.beta1, optim.beta2) == (1e-3, 0.9, 0.98)
    assert (optim.weight_decay, optim.warmup_steps, optim.label_smoothing) == (0.01, 4000, 0.1)
    assert (optim.dropout_start, optim.dropout_end) == (0.1, 0.0)
    model = PRESETS["125m"]().model
    assert (model.layers, model.d_model, model.heads, model.d_ff) == (12, 768, 12, 2048)
    assert model.vocab_size == 50_258
    assert PRESETS["125m"]().train.steps == 100_000


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = PRESETS[name]()
    assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["model"].pop("layers"),
        lambda value: value["model"].update(hidden=3),
        lambda value: value["run"].update(hidden=3),
        lambda value: value["train"].update(steps="many"),
        lambda value: value["train"].update(steps=True),
        lambda value: value["train"].update(steps=0),
        lambda value: value["data"].update(windows="best_fit"),
        lambda value: value.update(extra={}),
        lambda value: value.update(optim=[]),
        lambda value: value["optim"].update(learning_rate=-1.0),
    ],
)
def test_a_changed_json_is_a_value_error(change) -> None:
    value = json.loads(PRESETS["tiny"]().to_json())
    change(value)
    with pytest.raises(ValueError):
        RunConfig.from_json(json.dumps(value))


def test_a_wrong_value_is_named_by_section_and_field() -> None:
    value = json.loads(PRESETS["tiny"]().to_json())
    value["model"]["layers"] = "2"
    with pytest.raises(ValueError, match=r"^model\.layers is invalid: '2'$"):
        RunConfig.from_json(json.dumps(value))


def test_all_problems_are_named_together() -> None:
    config = PRESETS["tiny"]()
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(
            config,
            optim=dataclasses.replace(config.optim, learning_rate=0.0, dropout_start=1.0),
            train=dataclasses.replace(config.train, steps=0),
        )
    for part in ("optim.learning_rate", "optim.dropout_start", "train.steps"):
        assert part in str(caught.value)


def test_a_step_to_resume_from_is_given_in_one_form() -> None:
    """`--resume 5` was accepted, and resumed from the newest checkpoint."""
    for resume in ("auto", "latest", "never", "step:0", "step:5", "step:00000005"):
        assert not Run(resume=resume).problems()
    for resume in ("5", "step", "step:", "step:-1", "step:5.0", "step:000000005", "at:5", "Auto"):
        assert "run.resume" in str(Run(resume=resume).problems()), resume


def test_heads_and_vocabulary_must_fit() -> None:
    sizes = {"layers": 1, "d_ff": 8, "seq_len": 8}
    assert Model(d_model=64, heads=5, kv_heads=5, **sizes).problems()
    assert Model(d_model=64, heads=4, kv_heads=3, **sizes).problems()
    assert not Model(d_model=64, heads=4, kv_heads=2, **sizes, vocab_size=50_304).problems()
    assert Model(d_model=64, heads=4, kv_heads=2, **sizes, vocab_size=50_305).problems()
