"""The server's engine with a scripted batch: who runs, who waits, who is told what."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sota_transformer.inference.batch import Drawn
from sota_transformer.serve import engine
from sota_transformer.serve.engine import Engine

ROWS, WAITING = 2, 3


class Scripted:
    """A batch whose jobs are (name, number of tokens); each step waits to be let through."""

    made: list["Scripted"]
    begun: threading.Semaphore
    gate: threading.Semaphore

    def __init__(self, _model: object, _tokenizer: object, rows: int) -> None:
        self.rows, self.added, self.steps = rows, list[str](), 0
        self.running: dict[int, list[Any]] = {}
        self.made.append(self)

    @property
    def free(self) -> int:
        return self.rows - len(self.running)

    def add(self, key: int, job: tuple[str, int]) -> None:
        name, count = job
        assert self.free > 0
        if name == "unreadable":
            raise RuntimeError(name)
        self.added.append(name)
        self.running[key] = [name, count]

    def drop(self, key: int) -> None:
        del self.running[key]

    def step(self) -> list[tuple[int, Drawn]]:
        assert self.running
        self.begun.release()
        assert self.gate.acquire(timeout=10)
        self.steps += 1
        drawn = []
        for key, job in list(self.running.items()):
            job[1] -= 1
            if job[0] == "failing" and not job[1]:
                raise RuntimeError(job[0])
            reason = None if job[1] else "length"
            drawn.append((key, Drawn(job[1], None, [], job[0], reason, 0, False)))
            if reason:
                self.drop(key)
        return drawn


@pytest.fixture
def here(monkeypatch) -> Iterator[Engine]:
    monkeypatch.setattr(engine, "Batch", Scripted)
    Scripted.made = []
    Scripted.begun, Scripted.gate = threading.Semaphore(0), threading.Semaphore(0)
    made = Engine(None, None, ROWS, WAITING)  # type: ignore[arg-type]
    yield made
    let(50)
    made.stop()
    made._thread.join(timeout=5)
    assert not made._thread.is_alive() and not made.busy


def let(steps: int) -> None:
    Scripted.gate.release(steps)


class Told(queue.Queue[tuple[int, Drawn | None]]):
    """What was delivered."""

    def next(self, count: int) -> list[tuple[int, str | None, int]]:
        """(key, name, tokens left) of the next deliveries; the name is None for a failure."""
        found = [self.get(timeout=5) for _ in range(count)]
        return [(key, d.text, d.token) if d else (key, None, -1) for key, d in found]

    def deliver(self, key: int, drawn: Drawn | None) -> None:
        self.put((key, drawn))


def jobs(**counts: int) -> list[Any]:
    return list(counts.items())


def test_two_run_and_three_wait_in_the_order_they_came(here: Engine) -> None:
    told = Told()
    assert here.submit(jobs(a=2, b=1), told.deliver) == [0, 1]
    assert here.submit(jobs(c=1, d=1), told.deliver) == [2, 3]
    assert here.submit(jobs(e=1), told.deliver) == [4]
    assert here.submit(jobs(f=1), told.deliver) is None and here.busy == 5
    let(1)
    assert told.next(2) == [(0, "a", 1), (1, "b", 0)]
    assert here.busy == 4 and here.submit(jobs(f=1), told.deliver) == [5]
    let(3)
    rest = [(0, "a", 0), (2, "c", 0), (3, "d", 0), (4, "e", 0), (5, "f", 0)]
    assert told.next(5) == rest
    assert Scripted.made[0].added == ["a", "b", "c", "d", "e", "f"]
    assert not here.busy and len(Scripted.made) == 1 and told.empty()
    assert Scripted.made[0].steps == 4


def test_a_cancelled_job_frees_its_row_or_its_place(here: Engine) -> None:
    told = Told()
    here.submit(jobs(a=9, b=3, c=9, d=1), told.deliver)
    let(1)
    assert told.next(2) == [(0, "a", 8), (1, "b", 2)]
    assert Scripted.begun.acquire(timeout=5) and Scripted.begun.acquire(timeout=5)
    here.cancel([0, 2, 77])  # during the second step
    assert here.busy == 2
    let(1)
    assert told.next(1) == [(1, "b", 1)]
    let(1)
    assert told.next(2) == [(1, "b", 0), (3, "d", 0)]
    assert told.empty() and Scripted.made[0].added == ["a", "b", "d"]
    here.submit(jobs(g=9), told.deliver)
    let(1)
    assert told.next(1) == [(4, "g", 8)]
    here.cancel([4])
    let(3)
    assert not here.busy and here.submit(jobs(h=1), told.deliver) == [5]
    assert told.next(1) == [(5, "h", 0)]  # and no more of g


@pytest.mark.parametrize("bad", ["failing", "unreadable"])
def test_a_failure_is_told_to_all_and_ends_nothing(here: Engine, bad: str) -> None:
    told = Told()
    here.submit([("a", 9), (bad, 1), ("c", 1)], told.deliver)
    let(1)
    assert told.next(3) == [(0, None, -1), (1, None, -1), (2, None, -1)]
    assert not here.busy and len(Scripted.made) == 2
    if bad == "failing":
        let(1)
    here.submit(jobs(d=1), told.deliver)
    assert told.next(1) == [(3, "d", 0)]
    assert Scripted.made[1].added == ["d"] and told.empty()


def test_stopping_is_told_to_those_who_run_and_wait(here: Engine) -> None:
    told = Told()
    here.submit(jobs(a=9, b=9, c=9), told.deliver)
    let(1)
    assert told.next(2) == [(0, "a", 8), (1, "b", 8)]
    here.stop()
    assert here.submit(jobs(d=1), told.deliver) is None
    let(1)
    found = told.next(3)
    if found[0][1]:  # a step had begun
        found = found[2:] + told.next(2)
    assert found == [(0, None, -1), (1, None, -1), (2, None, -1)]
    here.close()
    assert not here._thread.is_alive() and told.empty()


def test_an_idle_engine_stops_too(here: Engine) -> None:
    threading.Event().wait(0.05)  # it waits for work
    here.close()
    assert not here._thread.is_alive() and here.stopping
