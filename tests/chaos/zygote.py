"""A process that has imported everything and forks one `sota` after another on request.

The fork runs the real command from its first line; it only saves the seconds spent on imports, so
that hundreds of kills fit into minutes. The zygote itself never computes anything: a fork of a
process with threads would hang.
"""

import ctypes
import importlib
import json
import os
import sys
import time
import traceback
from multiprocessing import util
from typing import Any

import torch._dynamo  # noqa: F401  (likewise: the optimizer imports it, for seconds)

from sota_transformer import cli, durable
from sota_transformer.training import start  # noqa: F401  (imported here, once, for all children)


def _bound() -> None:
    """Drop root's override of permissions, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    header, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for place in range(3):  # effective, permitted, inheritable
        sets[place] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _child(order: dict[str, Any]) -> None:
    """Become the command."""
    os.setsid()
    os.chdir(order["folder"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(order["given"], os.O_RDWR), 0)  # a terminal becomes its controlling one
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = os.open("/proc/self/status", os.O_RDONLY)  # before strace counts opens
    while order["traced"] and b"TracerPid:\t0" in os.pread(status, 4096, 0):
        time.sleep(0.005)
    os.close(status)
    if order["traced"]:  # predictable names for strace
        durable.secrets.token_hex = lambda count: "00" * count
    code = 1
    try:
        if order["bound"]:
            _bound()
        program, *rest = order["arguments"]
        if program.endswith(".py"):
            sys.argv = [program, *rest]
            code = importlib.import_module(program.removesuffix(".py")).main(rest)
        else:
            sys.argv = ["sota", program, *rest]
            code = cli.main([program, *rest])
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            util._exit_function()  # our processes and shared resources
        finally:
            os._exit(code)


def _wait(pid: int, seconds: float) -> int | None:
    """The exit status as in a shell, or None if it is still running."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def main() -> None:
    """Serve orders, one JSON line each, until the input ends."""
    durable._BUFFER_BYTES = 4 << 20  # small checkpoints take several, like large ones
    for name in sys.argv[1:]:
        importlib.import_module(name)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for line in sys.stdin:
        order = json.loads(line)
        if "arguments" in order:
            pid = os.fork()
            if not pid:
                _child(order)
            print(json.dumps(pid))
        else:
            print(json.dumps(_wait(order["wait"], order["seconds"])))


if __name__ == "__main__":
    main()
