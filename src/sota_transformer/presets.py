"""The four sizes, each a function that returns the complete configuration of a run.

The recipe `seed` follows the project's origin to the letter: it is in the defaults of the
dataclasses, and this module has what differs between sizes. `fast` reaches the same loss in far
fewer tokens: NorMuon, linear decay to zero, no label smoothing or dropout, normalised queries and
keys. Parameter counts are tested; the evidence for `fast` is in docs/results.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from sota_transformer.config import Data, Model, Optim, Run, RunConfig, Train

Recipe = Literal["seed", "fast"]
RECIPES: tuple[Recipe, ...] = ("seed", "fast")


def tiny(recipe: Recipe = "seed") -> RunConfig:
    """3.3 million parameters, nearly all in the embedding: for tests and a first look."""
    model = Model(layers=2, d_model=64, heads=2, kv_heads=2, d_ff=176, seq_len=64)
    return _run(model, Train(steps=200, batch_rows=8, eval_every=50, sample_every=100), recipe)


def small(recipe: Recipe = "seed") -> RunConfig:
    """16m: 16.0 million parameters, the quick test."""
    model = Model(layers=4, d_model=256, heads=4, kv_heads=4, d_ff=688, seq_len=512)
    return _run(model, Train(steps=1000, batch_rows=16), recipe)


def base(recipe: Recipe = "seed") -> RunConfig:
    """125m: 123.6 million parameters, the size of GPT-2 small."""
    heads = 12 if recipe == "seed" else 6  # of width 128: half the attention memory, no worse
    model = Model(layers=12, d_model=768, heads=heads, kv_heads=heads, d_ff=2048, seq_len=512)
    train = Train(steps=100_000, batch_rows=64, eval_every=1000, sample_every=1000)
    return _run(model, train, recipe)


def medium(recipe: Recipe = "seed") -> RunConfig:
    """250m: 257.0 million parameters."""
    model = Model(layers=16, d_model=1024, heads=8, kv_heads=8, d_ff=2816, seq_len=512)
    train = Train(steps=100_000, batch_rows=64, eval_every=1000, sample_every=1000)
    return _run(model, train, recipe)


def _run(model: Model, train: Train, recipe: Recipe) -> RunConfig:
    optim = Optim()
    if recipe == "fast":
        model = dataclasses.replace(model, qk_norm=True, norm_eps=1e-6)
        optim = Optim(
            learning_rate=0.15,
            matrix_rate=0.02,
            cooldown=0.65,
            final_fraction=0.0,
            warmup_steps=10,
            beta1=0.8,
            beta2=0.998,  # half-life 350 updates: most tokens seldom occur in a small batch
            eps=1e-10,
            weight_decay=0.05,
            clip_norm=0.0,
            label_smoothing=0.0,
            dropout_start=0.0,
        )
    return RunConfig(model=model, data=Data(), optim=optim, train=train, run=Run())


PRESETS: dict[str, Callable[..., RunConfig]] = {
    "tiny": tiny, "16m": small, "125m": base, "250m": medium,
}  # fmt: skip


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe of a run: `fast` if it uses NorMuon."""
    return "fast" if config.optim.matrix_rate else "seed"


def command(name: str, config: RunConfig) -> list[str]:
    """The command line that trains `config`, based on the preset `name`."""
    recipe = recipe_of(config)
    known = PRESETS[name](recipe).fields()
    changed = {field: value for field, value in config.fields().items() if value != known[field]}
    own = ["--recipe", recipe] if recipe != RECIPES[0] else []
    return ["sota", "train", name, *own, *(flag(*each) for each in changed.items())]


def flag(field: str, value: Any) -> str:
    """A field as a command-line option."""
    section, _, name = field.replace("_", "-").partition(".")
    if isinstance(value, bool):
        return f"--{section}.{'' if value else 'no-'}{name}"
    return f"--{section}.{name}={value}"
