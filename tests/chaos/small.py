"""`python -m tests.chaos.small ARGUMENTS`: the command, with units of work of some thousand bytes.

So that small inputs are cut at as many places as large ones are. The workers get it from their fork
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
    """The command in this process, so that its fork server and workers need not begin anew, with
    units of work of another size.
    """
    from sota_transformer.cli import main as command

    units.UNIT_BYTES = unit
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command(words)
    return Finished(code, said.getvalue())


def main() -> int:
    """Run the command here."""
    load = ForkServerContext.set_forkserver_preload

    def preload(context: Any, names: list[str]) -> None:
        load(context, [*names, "tests.chaos.small"])

    ForkServerContext.set_forkserver_preload = preload  # type: ignore[method-assign]
    from sota_transformer.cli import main as command

    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
