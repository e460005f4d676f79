"""How a run is judged on its way: validation, over the same windows every time, and samples."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from sota_transformer.config import RunConfig
from sota_transformer.data.shards import TokenWindows
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.generate import generate, make_sampler
from sota_transformer.inference.perplexity import Perplexity, perplexity
from sota_transformer.model.transformer import Transformer
from sota_transformer.training import checkpoint
from sota_transformer.training.runlog import RunLog, read_metrics

_SAMPLE_TOKENS = 100


class Judge:
    """Judges a model in evaluation mode, tells the log, and knows the best there was."""

    def __init__(self, config: RunConfig, log: RunLog) -> None:
        self.config, self.log = config, log
        self.tokenizer = Tokenizer()
        self.windows = TokenWindows(config.data.path, "val", config.model.seq_len)
        self.best: dict[str, Any] | None = None  # step, nats and tokens of the lowest loss
        self.view = [config.model.seq_len, config.data.document_mask]  # what a token may see

    def validate(self, model: Transformer, step: int) -> Perplexity:
        """Plain loss of the model after `step` steps, without dropout."""
        result = perplexity(
            model,
            self._validation_windows(),
            self.tokenizer.token_bytes,
            document_mask=self.config.data.document_mask,
        )
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
        self._compare(step, result.nats, result.tokens)
        return result

    def _compare(self, step: int, nats: float, tokens: int) -> None:
        """Losses over other windows do not compare."""
        best = self.best
        if best is None or best["tokens"] != tokens or nats < best["nats"]:
            self.best = {"step": step, "nats": nats, "tokens": tokens}

    def recall(self, state: checkpoint.State) -> None:
        """The best there was when `state` was saved; nothing where --data-change dropped it, or
        --override changed what a token may see.

        A run's last step is saved first and judged then, so that stands in the log alone.
        """
        self.best, folder = state.trainer.get("best"), self.config.run.out
        if state.trainer.get("view", self.view) != self.view:
            self.best = None
            return
        if self.best and not checkpoint.path_of(folder, self.best["step"]).is_dir():
            self.best = None  # deleted by a branch that was left
        for line in read_metrics(folder) if "best" in state.trainer else ():
            nats, tokens = line.get("val_loss"), line.get("val_tokens")
            if line["step"] == state.step and isinstance(nats, float) and isinstance(tokens, int):
                self._compare(state.step, nats, tokens)

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint had the lowest loss."""
        return self.best["step"] if self.best else None

    def advice(self) -> str:
        """What to say where that is not the last step."""
        assert self.best is not None
        step, nats = self.best["step"], self.best["nats"]
        return (
            f"validation was lowest at step {step}, {nats:.4f} nats; its checkpoint is kept: "
            f"`--step {step}` of evaluate, generate, export and serve takes it"
        )

    def _validation_windows(self) -> Iterator[np.ndarray]:
        """(T+1,) arrays, spread evenly over the split."""
        windows = self.windows
        wanted = max(1, min(len(windows), self.config.train.eval_tokens // windows.seq_len))
        for index in np.linspace(0, len(windows) - 1, wanted).astype(int).tolist():
            yield windows[index].astype(np.int64)

    def sample(self, model: Transformer, step: int) -> None:
        """A continuation of the first words of the validation text; the same seed every time."""
        if self.log.silent:
            return
        prompt = [int(token) for token in self.windows[0][:16]]
        sampler = make_sampler(temperature=0.8, top_p=0.95, seed=self.config.run.seed)
        tokens = list(generate(model, prompt, sampler, _SAMPLE_TOKENS))
        self.log.sample(step, self.tokenizer.decode(prompt + tokens))
