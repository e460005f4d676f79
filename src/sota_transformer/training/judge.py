"""Evaluation during a run: validation, on the same windows every time, and samples."""

import math
from typing import Any

import numpy as np

from sota_transformer.config import RunConfig
from sota_transformer.data.shards import TokenWindows
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.generate import generate, make_sampler
from sota_transformer.inference.perplexity import (
    BATCH_ROWS,
    Array,
    Perplexity,
    sequence_sums,
    summarise,
)
from sota_transformer.model.loss import PAD
from sota_transformer.model.transformer import Transformer
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint
from sota_transformer.training.runlog import RunLog, read_metrics

_SAMPLE_TOKENS = 100


class Judge:
    """Evaluates a model in eval mode, logs the result, and remembers the lowest loss."""

    def __init__(self, config: RunConfig, runtime: Runtime, log: RunLog) -> None:
        self.config, self.runtime, self.log = config, runtime, log
        self.tokenizer = Tokenizer()
        self.windows = TokenWindows(config.data.path, "val", config.model.seq_len)
        self.best: dict[str, Any] | None = None  # step, nats and tokens of the lowest loss
        self.view = [config.model.seq_len, config.data.document_mask]  # what a token may attend to

    def validate(self, model: Transformer, step: int) -> Perplexity:
        """Plain loss of the model after `step` steps, without dropout."""
        sums = self._sums(model)
        if self.runtime.device.type == "mps":  # drops work without an error: `Trainer._update`
            sums[(sums[:, 0] <= 0) & (sums[:, 1] > 0), 0] = math.nan
        result = summarise(sums)
        self.log.validation(
            {
                "step": step,
                "val_loss": result.nats,
                "val_error": result.error,
                "val_perplexity": result.perplexity,
                "val_bits_per_byte": result.bits_per_byte,
                "val_tokens": result.tokens,
            }
        )
        if math.isfinite(result.nats):
            self._compare(step, result.nats, result.tokens)
        else:
            self.log.say("note: this validation is not a number and does not count as the lowest")
        return result

    def _compare(self, step: int, nats: float, tokens: int) -> None:
        """Update the best; losses on different windows are not comparable."""
        best = self.best
        if best is None or best["tokens"] != tokens or nats < best["nats"]:
            self.best = {"step": step, "nats": nats, "tokens": tokens}

    def recall(self, state: checkpoint.State) -> None:
        """Restore the best as of `state`, unless --data-change dropped it or --override changed
        what a token may attend to.

        A run's last step is saved before it is validated, so its result is in the log only.
        """
        self.best, folder = state.trainer.get("best"), self.config.run.out
        if self.best and not checkpoint.path_of(folder, self.best["step"]).is_dir():
            self.best = None  # deleted with an abandoned branch
        for line in read_metrics(folder) if "best" in state.trainer else ():
            nats, tokens = line.get("val_loss"), line.get("val_tokens")
            if line["step"] == state.step and isinstance(nats, float) and isinstance(tokens, int):
                self._compare(state.step, nats, tokens)
        same = state.trainer.get("view", self.view) == self.view
        if self.best and not (same and self._scores(self.best["tokens"])):
            self.log.say(
                f"note: validation windows differ from before, so step {self.best['step']} no "
                "longer counts as the lowest loss; copy its checkpoint to keep it"
            )
        self.best = self.best if same else None

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss."""
        return self.best["step"] if self.best else None

    def advice(self) -> str:
        """What to print when the best step is not the last."""
        assert self.best is not None
        step, nats = self.best["step"], self.best["nats"]
        return (
            f"validation was lowest at step {step}, {nats:.4f} nats; its checkpoint is kept: "
            f"use `--step {step}` with evaluate, generate, export or serve"
        )

    def _sums(self, model: Transformer) -> Array:
        """`sequence_sums` of the validation windows. Each rank fills in its own batches and leaves
        zeros elsewhere, so the sum over ranks is bit-identical to that of a single rank.
        """
        found, masked = self._chosen(), self.config.data.document_mask
        sums, ranks = np.zeros((len(found), 3)), self.runtime.world
        for start in range(self.runtime.rank * BATCH_ROWS, len(found), ranks * BATCH_ROWS):
            batch = slice(start, start + BATCH_ROWS)
            windows = (self.windows[index] for index in found[batch])
            sums[batch] = sequence_sums(
                model, windows, self.tokenizer.token_bytes, document_mask=masked
            )
        return self.runtime.sum_array(sums)

    def _chosen(self) -> list[int]:
        """The numbers of the windows to validate on, spread evenly over the split."""
        windows = self.windows
        wanted = max(1, min(len(windows), self.config.train.eval_tokens // windows.seq_len))
        return np.linspace(0, len(windows) - 1, wanted).astype(int).tolist()

    def _scores(self, tokens: int) -> bool:
        """Whether validation scores this many tokens: padding, in foreign data, is not scored."""
        found = self._chosen()
        if tokens == len(found) * self.windows.seq_len:  # nearly always, and reads no file
            return True
        return tokens == sum(int((self.windows[index][1:] != PAD).sum()) for index in found)

    def sample(self, model: Transformer, step: int) -> None:
        """Continue the start of the validation text, with the same seed every time."""
        if self.log.silent:
            return
        prompt = [int(token) for token in self.windows[0][:16]]
        sampler = make_sampler(temperature=0.8, top_p=0.95, seed=self.config.run.seed)
        tokens = list(generate(model, prompt, sampler, _SAMPLE_TOKENS))
        self.log.sample(step, self.tokenizer.decode(prompt + tokens, cut=True))
