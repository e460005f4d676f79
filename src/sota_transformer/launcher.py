"""The other processes of a run, as torchrun's variables in the environment tell of them."""

import fcntl
import ipaddress
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sota_transformer.errors import SotaError

_PATIENCE = 10.0  # seconds until a process says that it waits for the others
_SIOCGIFADDR = 0x8915  # of Linux's sockios.h: an interface's IPv4 address


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


def called(store: Any, rank: int, world: int, seconds: float) -> str:
    """A prefix under which these processes and no earlier ones meet in the launcher's `store`.

    torchrun keeps its store when it starts processes again; torch would find the addresses of the
    dead there, and counting restarts does not help, because machines may count differently. So
    the first process calls by a new name, and each other answers a call that none before it has.
    """
    if rank == 0:
        call = uuid.uuid4().hex
        store.set("call", call)
        store.wait([f"{call} {other}" for other in range(1, world)])
        store.set(f"{call} complete", "")
        return call
    store.set(f"address {rank}", own_address(os.environ.get("MASTER_ADDR", "")))
    heard, mine, until = "", False, time.monotonic() + seconds
    while time.monotonic() < until:
        call = store.get("call").decode()  # waits for the first one
        if call != heard:
            heard, mine = call, store.add(f"{call} {rank}", 1) == 1
        if mine and store.check([f"{call} complete"]):
            return call
        time.sleep(0.1)
    raise RuntimeError(f"process {rank} met nobody in {seconds:.0f} s")


def choose_network(store: Any, rank: int, world: int) -> None:
    """Let gloo use the network on which this machine reaches the others, unless one was chosen.

    It would take the address of the host's name, which Debian sets to 127.0.1.1.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or sys.platform != "linux":
        return
    others = (store.get(f"address {other}").decode() for other in range(1, world) if other != rank)
    for host in (os.environ.get("MASTER_ADDR", ""), *others):
        mine = own_address(host)
        if mine and not ipaddress.ip_address(mine).is_loopback and (name := _interface(mine)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def own_address(host: str) -> str:
    """This machine's address as `host` sees it; empty if `host` cannot be reached."""
    with suppress(OSError):
        family, kind, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing
            return probe.getsockname()[0]
    return ""


def _interface(address: str) -> str | None:
    """The network interface with this address, on Linux."""
    wanted = ipaddress.ip_address(address)
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if bytes.fromhex(digits) == wanted.packed:
                return name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                found = fcntl.ioctl(any_socket, _SIOCGIFADDR, name.encode().ljust(40, b"\0"))
                if found[20:24] == wanted.packed:
                    return name
    return None


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
