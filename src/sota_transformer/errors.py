"""What a user can do wrong or meet, as one exception with a documented exit code.

The numbers follow `sysexits.h`; `docs/guide.md` repeats this table for schedulers and scripts.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

USAGE = 2  # a flag or a configuration that cannot work
BAD_DATA = 65  # something that was read is damaged, malformed or does not fit
NO_INPUT = 66  # something that should be read is not there
DIVERGED = 70  # the numbers went bad and stayed bad
UNFORESEEN = 70  # a fault of this program or below it, with a traceback
LOCKED = 73  # another process holds the folder, or it cannot be created
IO_FAILED = 74  # the disk is full or failed
TEMPORARY = 75  # may work when tried again
INTERRUPTED = 130  # SIGINT
TERMINATED = 143  # SIGTERM


class SotaError(Exception):
    """One line for the user: what, where, what to do. `code` is the exit status."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


class OptionError(SotaError, ValueError):
    """An option that cannot work; to whoever makes a configuration of it a wrong value."""


class Interrupted(KeyboardInterrupt):
    """A signal arrived; `code` is the exit status."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


@contextmanager
def interruptible(*numbers: int) -> Iterator[None]:
    """Signals as Interrupted, also where C code makes something else of what a handler raises:
    numpy, when it is met while it is being imported, an ImportError.
    """
    came: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        came.append(number)
        raise Interrupted(number)

    main = threading.current_thread() is threading.main_thread()
    heard = [n for n in numbers if main and signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {n: signal.signal(n, stop) for n in heard}
    try:
        yield
    except SotaError:
        raise
    except Exception as error:
        if came:
            raise Interrupted(came[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
