"""The other processes of a run, as torchrun's variables in the environment tell of them."""

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sota_transformer.errors import SotaError

_PATIENCE = 10.0  # seconds until a process says that it waits for the others


def launched(name: str, least: int) -> int:
    """A variable that torchrun sets, or `least` without torchrun. SotaError if invalid."""
    value = os.environ.get(name, str(least))
    good = re.fullmatch("[0-9]{1,9}", value) and int(value) >= least
    if not good or (name == "RANK" and int(value) >= launched("WORLD_SIZE", 1)):
        raise SotaError(f"environment variable {name}={value} is not from torchrun; unset it")
    return int(value)


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return launched("RANK", 0) == 0


def check_networks() -> None:
    """SotaError if GLOO_SOCKET_IFNAME does not exist; gloo's own message does not name it."""
    given, here = os.environ.get("GLOO_SOCKET_IFNAME"), [name for _, name in socket.if_nameindex()]
    if given and not {*given.split(",")} <= {*here}:
        raise SotaError(f"GLOO_SOCKET_IFNAME is {given}, not one of {', '.join(here)}; unset it")


@contextmanager
def awaited(world: int) -> Iterator[None]:
    """Say for whom, if waiting takes long, and let Ctrl-C end it: torch would not notice one.

    A shell that once tried a launcher may still have its variables; then nobody else ever comes.
    """
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    line = (
        f"waiting for all {world} processes at {where}, as WORLD_SIZE says (unset it to be alone)"
    )
    notice = threading.Timer(_PATIENCE, print, (f"sota: {line}",), {"file": sys.stderr})
    notice.daemon = True
    notice.start()
    before = signal.getsignal(signal.SIGINT)
    heard = threading.current_thread() is threading.main_thread() and callable(before)
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        notice.cancel()
        if heard:
            signal.signal(signal.SIGINT, before)
