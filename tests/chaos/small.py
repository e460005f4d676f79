"""`python -m tests.chaos.small ARGUMENTS`: `sota` with units of work of a few thousand bytes.

Small inputs are then split in as many places as large ones. The workers inherit it from their fork
server, which loads this module too.
"""

import contextlib
import io
import sys
from multiprocessing.context import ForkServerContext
from typing import Any

from sota_transformer.data import documents, streams, tables, units

from .commands import Finished

UNIT_BYTES = 3000
units.UNIT_BYTES = tables.UNIT_BYTES = UNIT_BYTES
units._TEXT_SLACK = 100
streams.CHUNK = 1001
documents._AT_ONCE, documents._BLOCK = 2000, 100


def here(words: list[str], unit: int) -> Finished:
    """Run the command in this process, with units of work of `unit` bytes, so that the fork server
    and workers need not be started again.
    """
    from sota_transformer.cli import main as command

    units.UNIT_BYTES = unit
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command(words)
    return Finished(code, said.getvalue())


def main() -> int:
    """Run the command."""
    load = ForkServerContext.set_forkserver_preload

    def preload(context: Any, names: list[str]) -> None:
        load(context, [*names, "tests.chaos.small"])

    ForkServerContext.set_forkserver_preload = preload  # type: ignore[method-assign]
    from sota_transformer.cli import main as command

    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
