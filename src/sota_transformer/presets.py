"""The four sizes, each a function that returns a complete run.

The recipe is `seed`, the project's origin taken literally; the dataclasses' defaults hold it, and
what differs between sizes stands here. Parameter counts are tested.
"""

from collections.abc import Callable

from sota_transformer.config import Data, Model, Optim, Run, RunConfig, Train


def tiny() -> RunConfig:
    """3.3 million parameters, nearly all of them the embedding: for tests and a first look."""
    model = Model(layers=2, d_model=64, heads=2, kv_heads=2, d_ff=176, seq_len=64)
    return _run(model, Train(steps=200, batch_rows=8, eval_every=50, sample_every=100))


def small() -> RunConfig:
    """16m: 16.0 million parameters, the quick test."""
    model = Model(layers=4, d_model=256, heads=4, kv_heads=4, d_ff=688, seq_len=512)
    return _run(model, Train(steps=1000, batch_rows=16))


def base() -> RunConfig:
    """125m: 123.6 million parameters, the size of GPT-2 small."""
    model = Model(layers=12, d_model=768, heads=12, kv_heads=12, d_ff=2048, seq_len=512)
    return _run(model, Train(steps=100_000, batch_rows=64, eval_every=1000, sample_every=1000))


def medium() -> RunConfig:
    """250m: 257.0 million parameters."""
    model = Model(layers=16, d_model=1024, heads=8, kv_heads=8, d_ff=2816, seq_len=512)
    return _run(model, Train(steps=100_000, batch_rows=64, eval_every=1000, sample_every=1000))


def _run(model: Model, train: Train) -> RunConfig:
    return RunConfig(model=model, data=Data(), optim=Optim(), train=train, run=Run())


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "16m": small,
    "125m": base,
    "250m": medium,
}
