"""Imported into a zygote: shrinks the presets of `train_sota.py` to a second of training each."""

import dataclasses

import train_sota
from sota_transformer.config import Model, RunConfig, Train
from sota_transformer.presets import PRESETS, Recipe, tiny

from .launches import WIDTHS

TRAIN = Train(steps=6, batch_rows=4, eval_every=4, eval_tokens=64, log_every=1, sample_every=0,
              save_every_steps=2)  # fmt: skip


def _little(width: int, recipe: Recipe) -> RunConfig:
    model = Model(layers=1, d_model=width, heads=1, kv_heads=1, d_ff=8, seq_len=16)
    preset = tiny(recipe)
    model = dataclasses.replace(model, qk_norm=preset.model.qk_norm)
    return dataclasses.replace(preset, model=model, train=TRAIN)


for _name, _width in WIDTHS.items():
    PRESETS[_name] = lambda recipe="seed", width=_width: _little(width, recipe)
train_sota.QUICK_SEQ_LEN = 16
train_sota.QUICK_EVAL_TOKENS = 64
