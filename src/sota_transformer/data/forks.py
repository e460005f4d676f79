"""How worker processes start. Light imports only, so that the fork server can be started first."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from types import ModuleType


def worker_context() -> BaseContext:
    """The multiprocessing start method: fork server where it works, else spawn."""
    # On macOS, system libraries do not survive a fork, not even in a small server. The server's
    # socket is in the temporary folder, and its path, which ends in
    # /pymp-xxxxxxxx/listener-xxxxxxxx, may have at most 107 bytes (gh-132124).
    if sys.platform == "darwin" or len(os.fsencode(tempfile.gettempdir())) > 75:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sota_transformer.data.warm"])
    return context


@contextmanager
def starting() -> Iterator[None]:
    """Start processes without passing them the main module and arguments, which they do not need.

    Importing the main module fails if it is standard input, and runs a script again that has no
    `__main__` guard. Python 3.13.12 and 3.14.3 pass all arguments to a fork server as a single one,
    which cannot hold a folder's worth of file names (gh-144503).

    Ctrl-C reaches a new process too, which ignores it only once it runs: a process inherits that
    it is blocked until then.
    """
    resource_tracker.ensure_running()  # first: starting it unblocks Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    main, arguments = sys.modules["__main__"], sys.argv
    sys.modules["__main__"], sys.argv = ModuleType("__main__"), arguments[:1]
    try:
        yield
    finally:
        sys.modules["__main__"], sys.argv = main, arguments
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server() -> None:
    """Start the fork server, which loads the encoder while this process looks for files."""
    if worker_context().get_start_method() == "forkserver":
        # numpy's BLAS, unused here, would start threads: in the server they make forking unsafe,
        # and in this process they spin on cores that the workers need.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        with starting():
            forkserver.ensure_running()
