"""`python -m sota_transformer` is the command `sota`."""

import contextlib
import gc
import sys

from sota_transformer.errors import INTERRUPTED


def main() -> int:
    """The command line's exit code; what `sota prepare` waits for longest is begun first of all."""
    try:
        if sys.argv[1:2] == ["prepare"]:
            from sota_transformer.data.forks import warm_up

            with contextlib.suppress(OSError):  # `prepare` meets it again, and says so
                warm_up()
        from sota_transformer.cli import main as command

        code = command()
    except KeyboardInterrupt:  # before `cli` could say so
        print("sota: interrupted", file=sys.stderr)
        return INTERRUPTED
    gc.freeze()  # what is left ends with the process; to look through it takes 30 ms
    return code


if __name__ == "__main__":
    raise SystemExit(main())
