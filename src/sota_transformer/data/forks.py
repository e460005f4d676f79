"""Where worker processes come from: light, so that the fork server can be started first of all."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import BaseContext


def worker_context() -> BaseContext:
    """How worker processes come to be."""
    # On macOS system libraries do not survive a fork, not even that of a small server.
    if sys.platform == "darwin" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sota_transformer.data.warm"])
    return context


def warm_up() -> None:
    """Let the fork server load the encoder while this process reads options and looks for files."""
    if worker_context().get_start_method() == "forkserver":
        # numpy's linear algebra, which none of us needs, would start threads: there a fork must not
        # meet them, and here they spin while the workers want the processor.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        forkserver.ensure_running()
