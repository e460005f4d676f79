"""The training loop and the training step.

A run is a function of its configuration and its data: batch, learning rate and dropout follow from
the step, the loss is a sum over tokens divided once by their global count, and a checkpoint with
its step number is the only state. So a run that was killed and resumed ends in the same bytes as
one that was not.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sota_transformer import __version__, schedules
from sota_transformer.config import RunConfig
from sota_transformer.data.loader import BatchLoader
from sota_transformer.data.packing import BestFit, document_ids
from sota_transformer.data.shards import TokenWindows
from sota_transformer.errors import BAD_DATA, DIVERGED, TEMPORARY, SotaError
from sota_transformer.inference.perplexity import Perplexity
from sota_transformer.model.loss import IGNORED, PAD, targets_of, token_loss
from sota_transformer.model.optim import (
    clip,
    gradient_norm,
    load_state_tensors,
    optimizers,
    state_tensors,
    update,
)
from sota_transformer.model.transformer import Dropout, Transformer, same_document
from sota_transformer.runtime import PeerLostError, Runtime, out_of_memory
from sota_transformer.training import checkpoint, ranks
from sota_transformer.training.guard import PATIENCE, RETURNS, Guard
from sota_transformer.training.judge import Judge
from sota_transformer.training.micro_batch import dividing, micro_rows
from sota_transformer.training.runlog import RunLog, judged
from sota_transformer.training.signals import Signals, Stopped


class Trainer:
    """One run, in one process (one per rank)."""

    def __init__(self, config: RunConfig, runtime: Runtime, log: RunLog) -> None:
        self.config, self.runtime, self.log = config, runtime, log
        cut = BestFit if config.data.windows == "best-fit" else TokenWindows
        self.windows = cut(config.data.path, "train", config.model.seq_len)
        self.judge = Judge(config, runtime, log)
        self.micro_rows = micro_rows(config, runtime)
        self.model = self._first_model()
        self.model.gradient_checkpointing = config.train.gradient_checkpointing
        self.model.to(runtime.device)
        self.optimizers = optimizers(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.half)
        self.step = self.updates = self.tokens = 0  # without the tokens of skipped updates
        self.totals: list[float] = []  # of the last step
        self.guard = Guard()
        self.good: set[int] = set()  # checkpoints that this process has written or loaded

    def fit(self) -> Perplexity:
        """Train to the last step and evaluate the result. Stopped or an error ends it early."""
        self.runtime.optimize(self.model, self.config.data.document_mask)
        with ExitStack() as stack:
            self.signals = stack.enter_context(Signals(self.runtime.world > 1))
            seed, rank, world = self.config.run.seed, self.runtime.rank, self.runtime.world
            self.loader = BatchLoader(self.windows, seed, self._rows, rank, world)
            stack.callback(self.loader.close)
            try:
                return self._loop()
            except Stopped as stop:
                resumes = self.config.run.resume in ("auto", "latest")
                self._leave(f"stopped by {stop}{'; the same command resumes' * resumes}")
                raise
            except PeerLostError:
                self._leave("another process was lost")
                raise

    def _loop(self) -> Perplexity:
        train = self.config.train
        self._saved_at = time.monotonic()
        self._begin_interval()
        if self.guard.bad_in_a_row >= PATIENCE:  # stopped during the last of them
            self._go_back()
        elif self.step and (self._due(train.eval_every) or self._due(train.sample_every)):
            known = judged(self.config.run.out, self.step)  # a signal may have cut it short
            self._evaluate_if_due(*self.runtime.of_first(*known))
        while self.step < train.steps:
            self._train_step()
            if self.step == self._interval[1]:
                continue  # just rolled back to this step
            if self._due(train.log_every) or self.step == train.steps:
                self._log()
            self._evaluate_if_due()
            if self._save_due():
                with self._paused():
                    self._save()
        left = checkpoint.steps(self.config.run.out)[-1:] > [self.step]  # after --resume step:N
        if self.step not in self.good or left:
            self._save()
        result = self._evaluate(self.judge.validate)
        self._evaluate(self.judge.sample)
        if self.judge.best_step not in (None, self.step):
            self.log.say(self.judge.advice())
        return result

    def _evaluate_if_due(self, validated: int = 0, sampled: int = 0) -> None:
        """Validate and sample if due and not done yet."""
        train = self.config.train
        if self._due(train.eval_every) and not validated:
            before = self.judge.best
            self._evaluate(self.judge.validate)
            if self.guard.bad_in_a_row:  # nothing is saved here: keep the previous best
                self.judge.best = before
        if self._due(train.sample_every) and not sampled:
            self._evaluate(self.judge.sample)

    def _train_step(self) -> None:
        """One optimizer step over its micro-batches; waits for the GPU once, before the update."""
        self.model.train()
        windows = self.loader.batch(self.step)
        self.counted = int((windows[:, 1:] != PAD).sum())
        batch = self.runtime.put(windows)  # (B, T+1)
        targets = targets_of(batch)
        count = self.runtime.sum_((targets != IGNORED).sum()).clamp(min=1)  # over all ranks
        masked = self.config.data.document_mask
        ids = self.runtime.put(document_ids(windows[:, :-1])) if masked else None
        while True:
            try:
                sums = self._gradients(batch, targets, ids, count)
                break
            except Exception as error:  # torch.compile may raise anything
                self.model.zero_grad(set_to_none=True)
                if out_of_memory(error):
                    self._halve_micro_batch(len(batch))
                elif self.runtime.compile:
                    self._stop_compiling(error)
                else:
                    raise
        self.runtime.sum_gradients(self.model.parameters())
        self._update(sums)

    def _gradients(
        self, batch: Tensor, targets: Tensor, ids: Tensor | None, count: Tensor
    ) -> Tensor:
        """Accumulate gradients over the micro-batches of the step; (3,) sums of their losses."""
        optim = self.config.optim
        rate = self.runtime.put(np.array(schedules.dropout(self.step, self.config), np.float32))
        keys = self.runtime.put(self.loader.dropout_keys(self.step))
        sums, head = torch.zeros(3, device=batch.device), self.model.embedding.weight
        for begin in range(0, batch.shape[0], self.micro_rows):
            part = slice(begin, begin + self.micro_rows)
            dropout = Dropout(rate, keys[part]) if optim.drops_out else None
            mask = None if ids is None else same_document(ids[part])
            hidden = self.model(batch[part, :-1], dropout, mask=mask)
            losses = token_loss(
                hidden, head, targets[part], optim.label_smoothing, self.runtime.compile
            )
            self.scaler.scale(losses.smoothed / count).backward()
            sums += torch.stack([total.detach().float() for total in losses])
        return sums

    def _halve_micro_batch(self, rows: int) -> None:
        """Use smaller micro-batches for these rows; only rounding changes."""
        fewer = dividing(rows, self.micro_rows // 2)
        if not fewer:
            raise SotaError(
                f"step {self.step}: one window of {self.config.model.seq_len} tokens does not fit "
                "into memory; try --train.gradient-checkpointing or a smaller preset",
                TEMPORARY,
            )
        self.micro_rows = fewer
        text = f"step {self.step}: out of memory; continuing with a micro-batch of {fewer}"
        self.log.event({"step": self.step, "event": "micro-batch", "rows": fewer}, text)

    def _stop_compiling(self, error: Exception) -> None:
        """Repeat this step in eager mode and stay there."""
        self.runtime = self.runtime.without_compiling(error)
        self.runtime.optimize(self.model, self.config.data.document_mask)
        why = self.runtime.reasons[-1]
        text = f"step {self.step}: {why}; continuing in eager mode"
        self.log.event({"step": self.step, "event": "not compiled", "reason": why}, text)

    def _update(self, sums: Tensor) -> None:
        """Clip and update, unless the step is bad: see `Guard` and `_overflowed`."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = gradient_norm(self.model)
        totals = self.runtime.sum_(torch.stack((*sums, norm.float()))).tolist()
        # A Mac's GPU drops work without an error (pytorch#193571); this reads what was there.
        old = totals[:3] == self.totals or not math.isclose(totals[2], self.counted, rel_tol=1e-6)
        old = old and self.runtime.device.type == "mps"  # with ranks, `counted` is one's own
        learned = totals[2]
        totals[2] = max(1.0, learned)  # foreign data may have windows that are all padding
        self.totals, self.gradient_norm = totals[:3], totals[3] / self.runtime.world
        self.signals.critical(True)
        if self.scaler.is_enabled() and self._overflowed():
            problem = "float16 gradients overflowed; loss scale halved"
        else:
            problem = self.guard.problem(totals[1] / totals[2], self.gradient_norm + totals[0], old)
        if problem is None:
            clip(self.model, self.gradient_norm, self.config.optim.clip_norm)
            update(self.optimizers, self._rate(self.step))
            self.updates += 1
            self.tokens += int(learned)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.signals.critical(False)
        if problem is not None:
            text = f"step {self.step}: {problem}; update skipped"
            self.log.event({"step": self.step, "event": "skipped", "reason": problem}, text)
            if self.guard.bad_in_a_row >= PATIENCE:
                self._go_back()

    def _overflowed(self) -> bool:
        """Adapt the loss scale; whether the gradients overflowed because it was too high."""
        self.scaler.update()
        overflow = math.isfinite(self.totals[0]) and not math.isfinite(self.gradient_norm)
        return overflow and self.scaler.get_scale() >= 1  # below 1 the scale is not the cause

    def _go_back(self) -> None:
        """Roll back to before the bad steps, skip their data and halve the rate; or give up."""
        if self.guard.returns >= RETURNS:
            raise SotaError(
                f"step {self.step}: {PATIENCE} bad steps in a row, after {RETURNS} rollbacks; "
                "resume an earlier checkpoint (--resume step:N), or start over, at a lower rate "
                "(--override optim.learning_rate=RATE, for NorMuon optim.matrix_rate=RATE)",
                DIVERGED,
            )
        self.signals.critical(True)
        target = self._last_good()  # if a peer is lost here, the guard is saved as it is
        found, guard, self.guard = self.step, self.guard, Guard()
        if target is None:
            self.judge.best = None
            self.model.load_state_dict(self._first_model().state_dict())
            self.optimizers = optimizers(self.model, self.config.optim)
            self.step = self.updates = self.tokens = 0
        else:
            self.restore(ranks.load(self.runtime, self.config.run.out, target, verified=True))
        self.guard, self.good = guard, {step for step in self.good if step <= self.step}
        guard.go_back((found - self.step) * self.config.train.batch_rows)
        self.signals.critical(False)
        self.log.event(
            {"step": self.step, "event": "returned", "from": found, "shift": guard.shift},
            f"step {found}: {PATIENCE} bad steps in a row; rolled back to step {self.step}, "
            f"continuing with later data at {guard.rate:g}x the learning rate",
        )
        self._begin_interval()

    def _last_good(self) -> int | None:
        """The last checkpoint before the bad steps. The first rank decides: saving by the clock,
        the others may know different steps.
        """
        target: int | None = None
        if self.runtime.rank == 0:
            begun = self.step - self.guard.bad_in_a_row
            until = max((step for step in self.good if step <= begun), default=begun)
            target = checkpoint.latest(self.config.run.out, self.log.say, until)  # of this branch
        (step,) = self.runtime.of_first(-1 if target is None else target)
        return step if step >= 0 else None

    @property
    def step_tokens(self) -> int:
        """Tokens that a step trains on, without padding: an average for best-fit windows."""
        return schedules.step_tokens(self.config, self.windows.padding)

    def _first_model(self) -> Transformer:
        """The initial model, on the CPU, where every machine draws the same numbers."""
        model = Transformer(self.config.model, self.runtime.dtype)
        source = torch.Generator().manual_seed(self.config.run.seed)
        model.init_weights(source, muon=self.config.optim.matrix_rate > 0)
        return model

    def _rate(self, step: int) -> float:
        return self.guard.rate * schedules.learning_rate(step, self.config)

    def _rows(self, step: int) -> range:
        """Global rows of a step, shifted past those that rollbacks skipped."""
        size = self.config.train.batch_rows
        begin = step * size + self.guard.shift
        return range(begin, begin + size)

    def _due(self, every: int) -> bool:
        """Whether the step is one of every so many; for the last one `_loop` does everything."""
        return bool(every) and self.step % every == 0 and self.step < self.config.train.steps

    def _save_due(self) -> bool:
        train, elapsed = self.config.train, (time.monotonic() - self._saved_at) / 60
        by_clock = bool(train.save_every_minutes) and elapsed >= train.save_every_minutes
        due = by_clock or self._due(train.save_every_steps) or self.judge.best_step == self.step
        # During bad steps nothing is learned, and a rollback to one of them would not help.
        return self.step < train.steps and due and not self.guard.bad_in_a_row

    def _begin_interval(self) -> None:
        self.runtime.synchronize()
        self._interval = (time.monotonic(), self.step)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Stop the clock that measures tokens per second."""
        began = time.monotonic()
        yield
        self._interval = (self._interval[0] + time.monotonic() - began, self._interval[1])

    def _log(self) -> None:
        self.runtime.synchronize()
        seconds, done = time.monotonic() - self._interval[0], self.step - self._interval[1]
        totals, tokens, last = self.totals, self.step_tokens, self.step - 1
        self.log.step(
            {
                "step": self.step,
                "loss": totals[1] / totals[2],
                "smoothed_loss": totals[0] / totals[2],
                "lr": self._rate(last),
                "dropout": schedules.dropout(last, self.config),
                "gradient_norm": self.gradient_norm,
                "tokens": self.tokens,
                "tokens_per_second": done * tokens / seconds,
                "memory": self.runtime.peak_memory(),
                "seconds_left": (self.config.train.steps - self.step) * seconds / done,
            }
        )
        self._begin_interval()

    def _evaluate(self, by: Callable[[Transformer, int], Any]) -> Any:
        """Evaluate the model as it is now, with the training clock stopped."""
        self.model.eval()
        with self._paused(), self.runtime.uncompiled():
            return by(self.model, self.step)

    def _save(self, why: str = "") -> None:
        """Save and delete older checkpoints; with `why`, a run's last act, which stays critical."""
        self.signals.critical(True)
        if self.runtime.rank == 0:
            self.log.sync()
            checkpoint.save(self.config.run.out, self.state(), self.good)
            self.log.event({"step": self.step, "event": "saved"}, f"saved step {self.step}{why}")
            keep, trusted = self.config.train.keep_checkpoints, {*self.good, self.step}
            if not (why and self.guard.bad_in_a_row):  # a rollback may need an older one
                checkpoint.prune(self.config.run.out, keep, trusted, self.judge.best_step)
        self.good.add(self.step)
        self._saved_at = time.monotonic()
        self.signals.critical(bool(why))

    def _leave(self, why: str) -> None:
        """Save the current state and say so; no signal or lost peer interrupts an update."""
        self.signals.critical(True)  # torchrun sends a signal when it notices a lost peer
        self.log.end_live()
        if self.step in self.good:  # an event would drop later checkpoints from the log
            return self.log.say(f"saved step {self.step}; {why}")
        self._save(f"; {why}")

    def state(self) -> checkpoint.State:
        """Everything that a checkpoint holds."""
        return checkpoint.State(
            step=self.step,
            model=self.model.state_dict(),
            optim=state_tensors(self.model, self.optimizers),
            trainer={
                "updates": self.updates,
                "tokens": self.tokens,
                "rows": self._rows(self.step).start,
                "guard": self.guard.state(),
                "scaler": self.scaler.state_dict(),
                "best": self.judge.best,
                "view": self.judge.view,
            },
            manifest={
                "data": self.windows.fingerprint,
                "data_files": self.judge.windows.files,
                "numerics": self.numerics(),
                "model": dataclasses.asdict(self.config.model),
            },
        )

    def numerics(self) -> dict[str, Any]:
        """What can change a bit of the result besides the run's configuration and data."""
        return self.runtime.describe() | {"micro_rows": self.micro_rows, "sota": __version__}

    def restore(self, state: checkpoint.State) -> None:
        """Resume from `state`. SotaError 65 if it belongs to another model or optimizer."""
        checkpoint.restore_model(self.model, state)
        self.step = state.step
        self.good.add(state.step)
        try:
            self.updates = int(state.trainer["updates"])
            self.tokens = state.trainer.get("tokens", 0)  # none after an import
            self.guard.restore(state.trainer["guard"])
            self.judge.recall(state)
            if state.trainer.get("scaler"):
                self.scaler.load_state_dict(state.trainer["scaler"])
            if "rows" in state.trainer:  # not from the step: the batch may change
                self.guard.shift += int(state.trainer["rows"]) - self._rows(self.step).start
            load_state_tensors(self.model, self.optimizers, state.optim, self.updates)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise SotaError(f"optimizer state of step {state.step}: {error}", BAD_DATA) from error
