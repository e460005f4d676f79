"""User errors and I/O failures as one exception type with a documented exit code.

The numbers follow `sysexits.h`; `docs/guide.md` repeats this table for schedulers and scripts.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

USAGE = 2  # a flag or a configuration that cannot work
BAD_DATA = 65  # an input is damaged, malformed or does not match
NO_INPUT = 66  # an input is missing
DIVERGED = 70  # training diverged and did not recover
UNFORESEEN = 70  # a bug in this program or a dependency, with a traceback
LOCKED = 73  # another process holds the folder, or it cannot be created
IO_FAILED = 74  # the disk is full or failed
TEMPORARY = 75  # may succeed if retried
INTERRUPTED = 130  # SIGINT
TERMINATED = 143  # SIGTERM


class SotaError(Exception):
    """One line for the user: what happened, where, what to do. `code` is the exit status."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


class OptionError(SotaError, ValueError):
    """An invalid option; also a ValueError, which callers that build a configuration expect."""


class Interrupted(KeyboardInterrupt):
    """A signal arrived; `code` is the exit status."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


@contextmanager
def handling(
    numbers: Iterable[int],
    handler: Callable[[int, Any], None],
    kind: type[BaseException],
    again: Callable[[Any], None],
) -> Iterator[None]:
    """Let `handler` receive these signals, except those that the parent process set to be ignored,
    as `nohup` does with SIGHUP.

    It raises exceptions of this `kind`. One that Python drops is passed to `again`: no exception
    leaves a weak reference callback, and imports and compilers use many of them.
    """

    def swallowed(what: Any) -> None:
        if isinstance(error := what.exc_value, kind):
            signal.signal(signal.SIGALRM, lambda *_: again(error))
            signal.setitimer(signal.ITIMER_REAL, 0.01)  # seconds
        else:
            hook(what)

    heard = [n for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {n: signal.getsignal(n) for n in (*heard, signal.SIGALRM)}
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = swallowed
        for number in heard:
            signal.signal(number, handler)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, former in before.items():
            signal.signal(number, former or signal.SIG_DFL)


@contextmanager
def interruptible(*numbers: int) -> Iterator[None]:
    """Raise Interrupted on these signals, even where C code converts what a handler raises: numpy
    turns an exception during its import into an ImportError.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        came.append(number)
        raise Interrupted(number)

    def again(error: Interrupted) -> None:
        raise error

    try:
        with handling(numbers, stop, Interrupted, again):
            yield
    except SotaError:
        raise
    except Exception as error:
        if came:
            raise Interrupted(came[0]) from error
        raise
