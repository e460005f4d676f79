"""A pool of worker processes that encodes units in order and survives the death of a worker.

Where a fork server is available, workers are forked from it: a separate process without threads
that has loaded the encoder once. Elsewhere they are spawned; this process itself is never forked.
A worker that dies takes the pool with it; the pending units are then retried one at a time, so
that the culprit can be named.

A task is a run of units, nearly always a single one. Only the units of a parquet row group, which
every reader has to decode from its start, go to one worker together.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sota_transformer.data.forks import starting, worker_context
from sota_transformer.data.sources import Source
from sota_transformer.data.units import Job, Unit, remove_spooled
from sota_transformer.errors import BAD_DATA, TEMPORARY, SotaError

if TYPE_CHECKING:  # numpy loads in the workers, and here while they start
    from sota_transformer.data.encode import Tools

_DEAD = (BrokenProcessPool, EOFError, ConnectionError)  # a worker, or the server that forks them
_RECURSION = 3000  # for deep but valid JSON; beyond it the C scanner raises, it does not crash
_LOOK_SECONDS = 1.0
_RUN_UNITS = 64  # longer row groups are shared after all: a very long run leaves others idle

Run = tuple[Unit, ...]
Counts = tuple[int, int, int]  # documents, bytes of text and tokens of an encoded unit


def runs(units: Iterable[Unit], workers: int) -> Iterator[Run]:
    """All units in order, a parquet row group as one run if enough work follows it.

    The last row groups are split into single units, so that no worker is idle at the end.
    """
    held: deque[Run] = deque()
    for key, group in groupby(units, _row_group):
        while run := tuple(islice(group, _RUN_UNITS)):
            if len(key) == 1:
                yield from _split_runs(held)
                yield run
                continue
            held.append(run)
            while held and sum(map(len, held)) >= workers * len(held[0]):
                yield held.popleft()
    yield from _split_runs(held)


def _row_group(unit: Unit) -> tuple[str | int, ...]:
    """A key shared by the units of one row group, unique for any other unit."""
    first = unit.segments[0]
    whole = first.kind != "parquet" or first.whole
    return (unit.index,) if whole else (first.path, first.offset)


def _split_runs(held: deque[Run]) -> Iterator[Run]:
    """Drain the held runs as single units."""
    while held:
        yield from ((unit,) for unit in held.popleft())


def result_path(folder: Path, unit: Unit) -> Path:
    """Path of a unit's result file."""
    return folder / f"unit-{unit.index:06d}"


class Pool:
    """Encodes units in worker processes."""

    def __init__(self, job: Job, workers: int) -> None:
        self._job, self._workers = job, workers
        self._waiting: deque[tuple[Run, Future[list[Counts]] | None]] = deque()
        self._pool = self._start()
        self._fault: BaseException | None = None
        self._hook, threading.excepthook = threading.excepthook, self._died

    def _died(self, what: threading.ExceptHookArgs) -> None:
        self._fault = what.exc_value

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, worker_context(), _begin, (self._job,))

    def _submit(self, work: Callable[[Any], Any], item: Any) -> Any:
        """A future of `work(item)`; may start a worker."""
        with starting():
            return self._pool.submit(work, item)

    def _result(self, future: Future[Any]) -> Any:
        """The future's result. It never comes if a thread of the executor dies, as it does when it
        cannot start another: at a limit on processes.
        """
        while not futures.wait((future,), _LOOK_SECONDS).done:
            if self._fault:
                raise self._fault
        return future.result()

    def run(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Counts]]:
        """Every unit with its counts, in order; a bounded number is pending at any time."""
        for run in runs(units, self._workers):
            future = None
            with contextlib.suppress(*_DEAD):  # `_next` will notice, and start another pool
                future = self._submit(_encode, run)
            self._waiting.append((run, future))
            while self._head_done() or self._enough():
                yield from self._next()
        while self._waiting:
            yield from self._next()

    def _enough(self) -> bool:
        """Whether enough is queued to keep the other workers busy while the first run finishes."""
        lengths = [len(run) for run, _ in self._waiting]
        return sum(lengths[1:]) >= self._workers * max([4, *lengths[:1]])

    def probe(self, source: Source) -> list[tuple[int, int, int]]:
        """The pieces of a table; a worker finds them, since the file may crash its reader."""
        with contextlib.suppress(*_DEAD):
            return self._result(self._submit(_probe, source))
        self._restart()
        return self._alone(_probe, source, source.name)

    def _head_done(self) -> bool:
        future = self._waiting[0][1] if self._waiting else None
        return future is not None and future.done()

    def _next(self) -> Iterator[tuple[Unit, Counts]]:
        run, future = self._waiting[0]
        try:
            done = self._result(future or self._submit(_encode, run))
        except _DEAD:
            yield from self._one_by_one()
            return
        self._waiting.popleft()
        yield from zip(run, done, strict=True)

    def _one_by_one(self) -> Iterator[tuple[Unit, Counts]]:
        """All pending units, encoded one by one. SotaError 65 names one that fails again."""
        self._restart()
        pending = [unit for run, _ in self._waiting for unit in run]
        self._waiting.clear()
        for unit in pending:
            names = ", ".join(dict.fromkeys(part.name for part in unit.segments[:3]))
            place = f"{names} (from byte {unit.segments[0].start:,})"
            yield unit, self._alone(_encode, (unit,), place)[0]

    def _restart(self) -> None:
        """Start another pool. A worker that was starting while another died has to be killed here:
        the executor waits for it without telling it to exit (seen in Python 3.11).
        """
        for process in multiprocessing.active_children():
            process.kill()
        with contextlib.suppress(*_DEAD):
            self._pool.shutdown()
        self._pool = self._start()

    def _alone(self, work: Callable[[Any], Any], item: Any, place: str) -> Any:
        """The result of `work(item)`, run with nothing else pending. Retried once, since the first
        failure may come from a fork server that was already dying.
        """
        error: BaseException | None = None
        for _ in range(2):
            try:
                return self._result(self._submit(work, item))
            except _DEAD as caught:
                error = caught
                time.sleep(0.2)
                self._restart()
        try:
            self._result(self._submit(len, ()))
        except _DEAD:  # without any work
            raise SotaError(
                "worker processes cannot start, for the reason printed above or out of memory; "
                "raise the limit on processes or memory, or use fewer --workers",
                TEMPORARY,
            ) from error
        raise SotaError(
            f"a worker died twice on {place}: out of memory, or a file that crashes its reader; "
            "remove that file from the inputs, or use fewer --workers",
            BAD_DATA,
        ) from error

    def close(self, *, stop: bool = False) -> None:
        """Shut the workers down; `stop` terminates them at once."""
        threading.excepthook = self._hook
        if stop:
            for process in multiprocessing.active_children():
                process.terminate()
        with contextlib.suppress(*_DEAD, RuntimeError):  # a thread that never started
            self._pool.shutdown(cancel_futures=True)


class _Worker:
    """State of this worker process, created once."""

    tools: "Tools"


def _begin(job: Job) -> None:
    """Set up a worker: the parent handles Ctrl-C, and the worker exits when the parent is gone."""
    from sota_transformer.data.encode import Tools

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.setrecursionlimit(_RECURSION)
    # Arrow's default allocator, mimalloc, does not return freed memory: tens of MB per worker.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    threading.Thread(target=_watch, daemon=True).start()
    _Worker.tools = Tools(job)


def _watch() -> None:
    """Exit with the parent: an orphan would wait for work forever, and its fork server for it."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _probe(source: Source) -> list[tuple[int, int, int]]:
    from sota_transformer.data.tables import probe

    return probe(source, _Worker.tools.job.options.text_field)


def _encode(run: Run) -> list[Counts]:
    return [_encode_one(unit) for unit in run]


def _encode_one(unit: Unit) -> Counts:
    """Encode a unit into its result file, unless a valid one exists."""
    from sota_transformer.data.encode import encode_unit, load, store

    path = result_path(_Worker.tools.job.folder, unit)
    encoded = load(path, unit.key, check=True)
    if encoded is None:
        encoded = encode_unit(unit, _Worker.tools)
        store(encoded, path, unit.key)
    remove_spooled(unit.segments)
    tokens, text_bytes = len(encoded.tokens), int(encoded.text_bytes.sum(dtype="int64"))
    return len(encoded.lengths), text_bytes, tokens
