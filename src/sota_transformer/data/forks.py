"""Where worker processes come from: light, so that the fork server can be started first of all."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from types import ModuleType


def worker_context() -> BaseContext:
    """How worker processes come to be."""
    # On macOS system libraries do not survive a fork, not even that of a small server. It listens
    # in the temporary folder, at a name of 107 bytes at most: /pymp-xxxxxxxx/listener-xxxxxxxx
    # is put behind (gh-132124).
    unfit = sys.platform == "darwin" or len(os.fsencode(tempfile.gettempdir())) > 75
    if unfit or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sota_transformer.data.warm"])
    return context


@contextmanager
def bare() -> Iterator[None]:
    """For what starts a process, which would get the main module and the arguments, and needs none.

    To import the module fails where it is standard input, and starts over where it is a script
    without a guard. Python 3.13.12 and 3.14.3 hand all arguments to a fork server in one, which
    cannot be as long as a folder's worth of names (gh-144503).
    """
    main, arguments = sys.modules["__main__"], sys.argv
    sys.modules["__main__"], sys.argv = ModuleType("__main__"), arguments[:1]
    try:
        yield
    finally:
        sys.modules["__main__"], sys.argv = main, arguments


def warm_up() -> None:
    """Let the fork server load the encoder while this process reads options and looks for files."""
    if worker_context().get_start_method() == "forkserver":
        # numpy's linear algebra, which none of us needs, would start threads: there a fork must not
        # meet them, and here they spin while the workers want the processor.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        # Ctrl-C reaches the server, too, which has nothing to say; it ignores it once it runs.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with bare():
                forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
