"""The training loop and its step.

A run is a function of its configuration and its data: batch, learning rate and dropout follow from
the step, the loss is a sum over tokens divided once by their global count, and a checkpoint plus
the step number is all there is to remember. So a run that was killed and started again ends in the
same bytes as one that was not.
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
from sota_transformer.model.loss import IGNORED, targets_of, token_loss
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
from sota_transformer.training import checkpoint
from sota_transformer.training.guard import PATIENCE, RETURNS, Guard
from sota_transformer.training.judge import Judge
from sota_transformer.training.micro_batch import dividing, micro_rows
from sota_transformer.training.runlog import RunLog, judged
from sota_transformer.training.signals import Signals, Stopped


class Trainer:
    """One run in one process (of each rank)."""

    def __init__(self, config: RunConfig, runtime: Runtime, log: RunLog) -> None:
        self.config, self.runtime, self.log = config, runtime, log
        seq_len = config.model.seq_len
        cut = BestFit if config.data.windows == "best-fit" else TokenWindows
        self.windows = cut(config.data.path, "train", seq_len)
        self.judge = Judge(config, runtime, log)
        self.micro_rows = micro_rows(config, runtime)
        self.model = self._first_model()
        self.model.gradient_checkpointing = config.train.gradient_checkpointing
        self.model.to(runtime.device)
        self.optimizers = optimizers(self.model, config.optim)
        half = runtime.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=half)  # else it idles
        self.step = self.updates = 0
        self.tokens = 0  # learned from: what no update was made of does not count
        self.guard = Guard()
        self.good: set[int] = set()  # the checkpoints that this process has written or loaded

    def fit(self) -> Perplexity:
        """Train to the last step and judge the result. Stopped or an error ends it early."""
        self.runtime.optimize(self.model, self.config.data.document_mask)
        with ExitStack() as stack:
            self.signals = stack.enter_context(Signals(self.runtime.world > 1))
            seed, rank, world = self.config.run.seed, self.runtime.rank, self.runtime.world
            self.loader = BatchLoader(self.windows, seed, self._rows, rank, world)
            stack.callback(self.loader.close)
            try:
                return self._loop()
            except Stopped as stop:
                self._leave(f"stopped by {stop}")
                raise
            except PeerLostError:
                self._leave("another process is gone")
                raise

    def _loop(self) -> Perplexity:
        train = self.config.train
        self._saved_at = time.monotonic()
        self._begin_interval()
        if self.guard.bad_in_a_row >= PATIENCE:  # stopped amid the last of them
            self._go_back()
        elif self.step and (self._due(train.eval_every) or self._due(train.sample_every)):
            known = judged(self.config.run.out, self.step)  # not where a signal came amid it
            self._judge_where_due(*self.runtime.of_first(*known))
        while self.step < train.steps:
            self._train_step()
            if self.step == self._interval[1]:
                continue  # just gone back to here
            if self._due(train.log_every) or self.step == train.steps:
                self._log()
            self._judge_where_due()
            if self._save_due():
                with self._paused():
                    self._save()
        left = checkpoint.steps(self.config.run.out)[-1:] > [self.step]  # by --resume step:N
        if self.step not in self.good or left:
            self._save()
        result = self._judged(self.judge.validate)
        self._judged(self.judge.sample)
        if self.judge.best_step != self.step:
            self.log.say(self.judge.advice())
        return result

    def _judge_where_due(self, validated: int = 0, sampled: int = 0) -> None:
        """Validate and sample where due, unless done before; the last step is judged at the end."""
        train = self.config.train
        if self._due(train.eval_every) and self.step < train.steps and not validated:
            before = self.judge.best
            self._judged(self.judge.validate)
            if self.guard.bad_in_a_row:  # no checkpoint is due here, and the best one is kept
                self.judge.best = before
        if self._due(train.sample_every) and self.step < train.steps and not sampled:
            self._judged(self.judge.sample)

    def _train_step(self) -> None:
        """One optimizer step, of micro-batches; a GPU is waited for once, before its update."""
        self.model.train()
        windows = self.loader.batch(self.step)
        batch = self.runtime.put(windows)  # (B, T+1)
        targets = targets_of(batch)
        count = self.runtime.sum_((targets != IGNORED).sum()).clamp(min=1)  # over all ranks
        masked = self.config.data.document_mask
        ids = self.runtime.put(document_ids(windows[:, :-1])) if masked else None
        while True:
            try:
                sums = self._gradients(batch, targets, ids, count)
                break
            except Exception as error:  # a compiler that is not ours may raise anything
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
        """Gradients of the step, over its micro-batches; (3,) sums of their losses."""
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
        """Go on with smaller micro-batches of these rows; the step is the same but for rounding."""
        fewer = dividing(rows, self.micro_rows // 2)
        if not fewer:
            raise SotaError(
                f"step {self.step}: not even one window of {self.config.model.seq_len} tokens fits "
                "into the memory; try --train.gradient-checkpointing, or a smaller preset",
                TEMPORARY,
            )
        self.micro_rows = fewer
        text = f"step {self.step}: out of memory; on with a micro-batch of {fewer}"
        self.log.event({"step": self.step, "event": "micro-batch", "rows": fewer}, text)

    def _stop_compiling(self, error: Exception) -> None:
        """Make this step again, and all that follow, as they are written."""
        self.runtime = self.runtime.without_compiling(error)
        self.runtime.optimize(self.model, self.config.data.document_mask)
        why = self.runtime.reasons[-1]
        text = f"step {self.step}: {why}; on without it"
        self.log.event({"step": self.step, "event": "not compiled", "reason": why}, text)

    def _update(self, sums: Tensor) -> None:
        """Clip and update, unless the loss or a gradient is not finite on any rank."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = gradient_norm(self.model)
        totals = self.runtime.sum_(torch.stack((*sums, norm.float()))).tolist()
        totals[2] = max(1.0, totals[2])  # others' files may have windows of nothing but padding
        self.totals, self.gradient_norm = totals[:3], totals[3] / self.runtime.world
        self.signals.critical(True)
        if self.scaler.is_enabled() and self._overflowed():
            problem = "float16 gradients overflowed; their scale is halved"
        else:
            problem = self.guard.problem(totals[1] / totals[2], self.gradient_norm + totals[0])
        if problem is None:
            clip(self.model, self.gradient_norm, self.config.optim.clip_norm)
            update(self.optimizers, self._rate(self.step))
            self.updates += 1
            self.tokens += int(totals[2])
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.signals.critical(False)
        if problem is not None:
            text = f"step {self.step}: {problem}; the update was not made"
            self.log.event({"step": self.step, "event": "skipped", "reason": problem}, text)
            if self.guard.bad_in_a_row >= PATIENCE:
                self._go_back()

    def _overflowed(self) -> bool:
        """Whether the scaled float16 gradients did, which is no fault of the data; adapts."""
        self.scaler.update()
        overflow = math.isfinite(self.totals[0]) and not math.isfinite(self.gradient_norm)
        return overflow and self.scaler.get_scale() >= 1  # below it is no matter of scale

    def _go_back(self) -> None:
        """To before the bad steps, on behind the data that did it, at half the rate; or give up."""
        if self.guard.returns >= RETURNS:
            raise SotaError(
                f"step {self.step}: {PATIENCE} bad steps in a row again, after {RETURNS} returns; "
                "go on from an earlier checkpoint (--resume step:N), or anew, at a lower rate "
                "(--override optim.learning_rate=RATE, NorMuon's optim.matrix_rate=RATE)",
                DIVERGED,
            )
        self.signals.critical(True)
        target = self._last_good()  # a lost peer may end this; until here the guard is to be saved
        found, guard, self.guard = self.step, self.guard, Guard()
        if target is None:
            self.judge.best = None
            self.model.load_state_dict(self._first_model().state_dict())
            self.optimizers = optimizers(self.model, self.config.optim)
            self.step = self.updates = self.tokens = 0
        else:
            self.restore(checkpoint.load(self.config.run.out, target, verified=True))
        self.guard, self.good = guard, {step for step in self.good if step <= self.step}
        guard.go_back((found - self.step) * self.config.train.batch_rows)
        self.signals.critical(False)
        self.log.event(
            {"step": self.step, "event": "returned", "from": found, "shift": guard.shift},
            f"step {found}: {PATIENCE} bad steps in a row; back to step {self.step}, on with other "
            f"data, at {guard.rate:g} of the learning rate",
        )
        self._begin_interval()

    def _last_good(self) -> int | None:
        """The last checkpoint from before the bad steps, as the first rank finds it: their clocks
        may have had the others save at another step.
        """
        target: int | None = None
        if self.runtime.rank == 0:
            begun = self.step - self.guard.bad_in_a_row
            until = max((step for step in self.good if step <= begun), default=begun)
            target = checkpoint.latest(self.config.run.out, self.log.say, until)  # not others'
        (step,) = self.runtime.of_first(-1 if target is None else target)
        return step if step >= 0 else None

    @property
    def step_tokens(self) -> int:
        """Tokens that a step learns from; with best-fit windows on the average, without padding."""
        return schedules.step_tokens(self.config, self.windows.padding)

    def learned(self, state: checkpoint.State) -> int:
        """Tokens that the run of `state` has learned from; an old checkpoint may not say."""
        return state.trainer.get("tokens", state.step * self.step_tokens)

    def _first_model(self) -> Transformer:
        """The model before the first step, on the CPU, where every machine draws the same."""
        model = Transformer(self.config.model, self.runtime.dtype)
        source = torch.Generator().manual_seed(self.config.run.seed)
        model.init_weights(source, muon=self.config.optim.matrix_rate > 0)
        return model

    def _rate(self, step: int) -> float:
        return self.guard.rate * schedules.learning_rate(step, self.config)

    def _rows(self, step: int) -> range:
        """Global rows of a step, behind those that a return left out."""
        rows = schedules.rows(step, self.config)
        return range(rows.start + self.guard.shift, rows.stop + self.guard.shift)

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _save_due(self) -> bool:
        train = self.config.train
        elapsed = (time.monotonic() - self._saved_at) / 60
        by_clock = bool(train.save_every_minutes) and elapsed >= train.save_every_minutes
        due = by_clock or self._due(train.save_every_steps) or self.judge.best_step == self.step
        # Amid bad steps nothing was learned, and to go back there would be no way out.
        return self.step < train.steps and due and not self.guard.bad_in_a_row

    def _begin_interval(self) -> None:
        self.runtime.synchronize()
        self._interval = (time.monotonic(), self.step)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """What is not training, outside the clock that measures tokens per second."""
        began = time.monotonic()
        yield
        spent = time.monotonic() - began
        self._interval = (self._interval[0] + spent, self._interval[1])

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

    def _judged(self, by: Callable[[Transformer, int], Any]) -> Any:
        """What is said of the model as it is now; it takes no time of training's."""
        self.model.eval()
        with self._paused(), self.runtime.uncompiled():
            return by(self.model, self.step)

    def _save(self) -> None:
        self.signals.critical(True)
        if self.runtime.rank == 0:
            checkpoint.save(self.config.run.out, self.state(), self.good)
            self.log.event({"step": self.step, "event": "saved"}, f"saved step {self.step}")
            keep, trusted = self.config.train.keep_checkpoints, {*self.good, self.step}
            checkpoint.prune(self.config.run.out, keep, trusted, self.judge.best_step)
        self.good.add(self.step)
        self._saved_at = time.monotonic()
        self.signals.critical(False)

    def _leave(self, why: str) -> None:
        """Save what there is and say so; neither a signal nor a lost peer comes amid an update."""
        self.signals.critical(True)  # torchrun sends a signal when it sees that a peer is gone
        self.log.end_live()
        if self.step in self.good:  # not an event: it would say that later ones are gone
            self.log.say(f"saved step {self.step}; {why}")
            return
        if self.runtime.rank == 0:
            checkpoint.save(self.config.run.out, self.state(), self.good)
        self.log.event({"step": self.step, "event": "saved"}, f"saved step {self.step}; {why}")

    def state(self) -> checkpoint.State:
        """All that a checkpoint holds."""
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
        """All that can change a bit of the result and is not the run's configuration or data."""
        return self.runtime.describe() | {"micro_rows": self.micro_rows, "sota": __version__}

    def restore(self, state: checkpoint.State) -> None:
        """Go on from `state`. SotaError 65 if it is another model's or optimizer's."""
        checkpoint.restore_model(self.model, state)
        self.step = state.step
        self.good.add(state.step)
        try:
            self.updates, self.tokens = int(state.trainer["updates"]), self.learned(state)
            self.guard.restore(state.trainer["guard"])
            self.judge.recall(state)
            if state.trainer.get("scaler"):
                self.scaler.load_state_dict(state.trainer["scaler"])
            if "rows" in state.trainer:  # not the step, so that the batch may change
                rows = int(state.trainer["rows"])
                self.guard.shift = rows - self.step * self.config.train.batch_rows
            load_state_tensors(self.model, self.optimizers, state.optim, self.updates)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise SotaError(f"optimizer state of step {state.step}: {error}", BAD_DATA) from error
