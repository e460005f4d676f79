"""Stop on a signal: at once, but never halfway through a change of state."""

import signal
import time
from types import FrameType
from typing import Self

from sota_transformer.errors import handling


class Stopped(BaseException):
    """A signal asked the run to stop; raised at once, except while the state is changing."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into Stopped; a second one ends the process at once.

    `launched`: torchrun forwards what the terminal has sent to every process, so a Ctrl-C arrives
    twice.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    _ECHO_SECONDS = 1.0

    def __init__(self, launched: bool = False) -> None:
        self._echo_until = 0.0
        self._launched = launched
        self._received: int | None = None
        self._critical = False

    def __enter__(self) -> Self:
        self._handling = handling(self._NUMBERS, self._handle, Stopped, self._raise)
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received is not None:
            if time.monotonic() < self._echo_until:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received = number
        if self._launched:
            self._echo_until = time.monotonic() + self._ECHO_SECONDS
        self._raise()

    def _raise(self, *_: object) -> None:
        if not self._critical and self._received is not None:
            raise Stopped(self._received)

    def critical(self, inside: bool) -> None:
        """Between True and False, weights, moments and step change together: no interruption."""
        self._critical = inside
        self._raise()
