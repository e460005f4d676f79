"""`python -m sota_transformer` is the command `sota`."""

import gc
import sys


def main() -> int:
    """The command line's exit code; starts the slowest part of `sota prepare` before all else."""
    try:
        if sys.argv[1:2] == ["prepare"]:
            import contextlib

            from sota_transformer.data.forks import start_fork_server

            with contextlib.suppress(OSError):  # `prepare` meets it again and reports it
                start_fork_server()
        from sota_transformer.cli import main as command

        code = command()
    except KeyboardInterrupt:  # before `cli` can handle it
        from sota_transformer.errors import INTERRUPTED  # at the top, its import could be hit

        print("sota: interrupted", file=sys.stderr)
        return INTERRUPTED
    gc.freeze()  # saves 30 ms of garbage collection at exit
    return code


if __name__ == "__main__":
    raise SystemExit(main())
