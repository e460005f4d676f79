"""The command `sota`: parse, call, translate errors into one line and an exit code. No logic.

A verb's module is imported only when the verb is called, so that help prints at once.
"""

import errno
import io
import math
import os
import pkgutil
import re
import signal
import sys
import traceback
from collections.abc import Callable

from sota_transformer import __version__
from sota_transformer.arguments import nearest, parse, resolve, taken
from sota_transformer.config import RunConfig
from sota_transformer.errors import (
    INTERRUPTED,
    IO_FAILED,
    TEMPORARY,
    UNFORESEEN,
    SotaError,
    interruptible,
)
from sota_transformer.options import (
    DataView,
    Doctor,
    Evaluate,
    Export,
    Generate,
    Import,
    Merge,
    Prepare,
    Report,
    Serve,
)
from sota_transformer.words import in_shell, one_line

_CROWDED = (
    "no more processes or threads can be started; end other programs, raise the limit (ulimit -u, "
    "or the container's), or use fewer workers or threads"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return an exit code of `errors.py`."""
    return guarded(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments))


def guarded(work: Callable[[], int]) -> int:
    """Do `work`; errors become one line and an exit code, after a traceback if unexpected."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if not re.fullmatch(r"[1-9]\d{1,4}", os.environ.get("COLUMNS", "80"), re.ASCII):
        del os.environ["COLUMNS"]  # at 0 rich prints nothing, at 5 tyro never returns
    if isinstance(sys.stdout, io.TextIOWrapper):  # an unencodable character must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        with interruptible(signal.SIGINT):
            return work()
    except SotaError as error:
        return _complain(str(error), error.code)
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        sys.stdout = None
        return 0
    except OSError as error:
        if error.errno == errno.EAGAIN and error.strerror == os.strerror(errno.EAGAIN):
            return _complain(_CROWDED, TEMPORARY)  # from fork; a full pipe has another text
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", IO_FAILED)
    except KeyboardInterrupt as error:
        return _complain("interrupted", getattr(error, "code", INTERRUPTED))
    except Exception as error:
        if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
            return _complain(_CROWDED, TEMPORARY)
        if isinstance(error, RuntimeError | MemoryError):
            from sota_transformer.runtime import out_of_memory

            if out_of_memory(error):
                hint = "close other programs, try --device cpu or train with --train.micro-rows 1"
                return _complain(f"out of memory; {hint}", TEMPORARY)
        traceback.print_exc()
        kind = type(error).__name__
        return _complain(
            f"unexpected {kind}; please report it with the traceback above", UNFORESEEN
        )
    except BaseException as error:
        if isinstance(code := getattr(error, "code", None), int):  # a signal or --help
            return code
        raise


def _dispatch(arguments: list[str]) -> int:
    """Find the verb and call it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"sota-transformer {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise SotaError(f"unknown command {verb!r}{nearest(verb, VERBS)}; `sota --help` lists all")
    if verb == "plan":  # has --hours, which is not part of a run's configuration
        return _plan(rest)
    _, kind, work = VERBS[verb]
    options = resolve(rest, verb) if kind is RunConfig else parse(kind, verb, rest)
    # Ending as on Ctrl-C removes temporary files; training and serving handle signals themselves.
    own = kind is RunConfig or verb == "serve"
    with interruptible(*() if own else (signal.SIGTERM, signal.SIGHUP)):
        code = pkgutil.resolve_name(f"sota_transformer.{work}")(options)
    return code if isinstance(code, int) else 0


def _usage() -> str:
    lines = [f"  sota {verb:<10} {text}" for verb, (text, _, _) in VERBS.items()]
    head = "Pretrain your own GPT-2-class language model on the one machine you have."
    tail = "`sota COMMAND --help` shows a command's options. Documentation: docs/guide.md"
    return "\n".join([head, "", *lines, "", tail])


def _complain(text: str, code: int) -> int:
    sys.stdout.flush()
    print(f"sota: {one_line(text)}", file=sys.stderr)
    return code


def train_and_show(config: RunConfig) -> int:
    """Train or resume, then print where the run is and what to do with it."""
    from sota_transformer.doctor import admit
    from sota_transformer.launcher import is_first_rank
    from sota_transformer.training.start import train

    train(config, admit)
    if not is_first_rank():  # the first rank may still be evaluating
        return 0
    folder = in_shell(config.run.out)
    print(f"the run is in {folder}: checkpoints, metrics.jsonl, samples.txt, config.json, run.json")
    words = "def main(" if config.data.path.name == "python" else "Once upon a time"
    print(f'try it:  sota generate {folder} --prompt "{words}"')
    # The whole validation split may take a quarter of an hour on a CPU.
    print(f"evaluate it:  sota evaluate {folder}   (all validation text; less: --tokens 250000)")
    return 0


def _plan(arguments: list[str]) -> int:
    given, rest = taken("--hours", "a number of hours", arguments)
    try:
        hours = float(given or 0)
    except ValueError:
        hours = math.nan
    if not 0 <= hours < 1e6:
        raise SotaError(f"plan: --hours must be a number of hours, not {given!r}")
    config = resolve(rest, "plan")
    from sota_transformer.plan import run_plan

    return run_plan(config, rest[0], hours)


# For each verb: its text in `sota --help`, its options, and the function that does it.
VERBS: dict[str, tuple[str, type, str]] = {
    "prepare": ("turn text into token shards", Prepare, "data.prepare:prepare"),
    "merge": ("combine the parts of `sota prepare --part`", Merge, "data.prepare:merge"),
    "data": ("inspect prepared data", DataView, "data.view:describe"),
    "plan": ("estimate time, memory and disk; --hours H: what fits", RunConfig, ""),
    "train": ("train a model, or resume training", RunConfig, "cli:train_and_show"),
    "evaluate": (
        "measure perplexity, bits per byte, LAMBADA, HellaSwag",
        Evaluate,
        "commands.evaluate:run_evaluate",
    ),
    "report": ("an HTML report on a run, or on several compared", Report, "compare:run_report"),
    "generate": ("generate text from prompts", Generate, "commands.generate:run_generate"),
    "export": (
        "write the model for transformers, MLX, vLLM, llama.cpp or Ollama",
        Export,
        "commands.transfer:run_export",
    ),
    "serve": (
        "run an OpenAI-compatible server with a web page",
        Serve,
        "commands.serve:run_serve",
    ),
    "import": ("start a run from a Hugging Face model", Import, "commands.transfer:run_import"),
    "doctor": ("check that this machine is fit for training", Doctor, "doctor:run_doctor"),
    "config": ("print a run's configuration and derived numbers", RunConfig, "plan:run_config"),
}
