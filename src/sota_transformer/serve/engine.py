"""A thread that owns the model and computes the next token of all requests in one batch.

The web server's event loop never computes: it submits jobs and is called back with each token.
"""

import threading
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.batch import Batch, Drawn, Job
from sota_transformer.model.transformer import Transformer

Deliver = Callable[[int, Drawn | None], Any]
"""Called in the engine's thread with a job's key and each token, or None on failure or stopping."""


class Engine:
    """Runs at most `rows` jobs together; once `waiting` more are queued, it takes no others."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, rows: int, waiting: int) -> None:
        self._make = lambda: Batch(model, tokenizer, rows)
        self._batch = self._make()
        self._limit = rows + waiting
        self._new: deque[tuple[int, Job]] = deque()
        self._deliver: dict[int, Deliver] = {}
        self._keys = count()
        self._wake = threading.Condition()
        self.stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> int:
        """Number of running and waiting jobs."""
        return len(self._deliver)

    def submit(self, jobs: list[Job], deliver: Deliver) -> list[int] | None:
        """Keys of the jobs, or None if too many wait; jobs submitted together are never split."""
        with self._wake:
            if len(self._deliver) >= self._limit or self.stopping:
                return None
            keys = [next(self._keys) for _ in jobs]
            self._new.extend(zip(keys, jobs, strict=True))
            self._deliver |= dict.fromkeys(keys, deliver)
            self._wake.notify()
        return keys

    def cancel(self, keys: list[int]) -> None:
        """Drop jobs before the next token; ignores those already done."""
        with self._wake:
            for key in keys:
                self._deliver.pop(key, None)

    def stop(self) -> None:
        """Stop after the current token and notify all jobs; returns at once."""
        with self._wake:
            self.stopping = True
            self._wake.notify()

    def close(self) -> None:
        """Stop and wait for the thread to end."""
        self.stop()
        self._thread.join(timeout=30)

    def _loop(self) -> None:
        while (chosen := self._take()) is not None:
            try:
                for key, job in chosen:
                    self._batch.add(key, job)
                drawn = self._batch.step()
            except Exception:  # a request that makes the model fail must not end the server
                self._fail()
                continue
            for key, result in drawn:
                with self._wake:
                    deliver = self._deliver.get(key)
                    if result.reason:
                        self._deliver.pop(key, None)
                if deliver is not None:
                    deliver(key, result)
        self._fail()

    def _take(self) -> list[tuple[int, Job]] | None:
        """Wait for work and drop cancelled jobs; returns the jobs to add, None on stopping."""
        with self._wake:
            while not (self._deliver or self.stopping):
                self._wake.wait()
            if self.stopping:
                return None
            for key in self._batch.running.keys() - self._deliver.keys():
                self._batch.drop(key)
            self._new = deque(item for item in self._new if item[0] in self._deliver)
            return [self._new.popleft() for _ in range(min(self._batch.free, len(self._new)))]

    def _fail(self) -> None:
        """Notify all jobs and start over with an empty batch."""
        with self._wake:
            waiting, self._deliver = self._deliver, {}
            self._new.clear()
        self._batch = self._make()
        for key, deliver in waiting.items():
            deliver(key, None)
