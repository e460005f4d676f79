"""The command `sota`: parse, call, translate errors into one line and an exit code. No logic.

A verb's module is imported when the verb is called, so help answers at once.
"""

import io
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from sota_transformer import __version__
from sota_transformer.arguments import nearest, parse, resolve, taken
from sota_transformer.config import RunConfig
from sota_transformer.errors import INTERRUPTED, IO_FAILED, TEMPORARY, UNFORESEEN, SotaError
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


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; the exit code of `errors.py`."""
    return guarded(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments))


def guarded(work: Callable[[], int]) -> int:
    """Do `work`; what goes wrong becomes one line and a code, behind a traceback if unforeseen."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that it does not have ends no run
        sys.stdout.reconfigure(errors="replace")
    try:
        return work()
    except SotaError as error:
        return _complain(str(error), error.code)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        sys.stdout = None
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", IO_FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError):
            from sota_transformer.runtime import out_of_memory

            if out_of_memory(error):
                hint = "end other programs, or try --device cpu"
                return _complain(f"out of memory; {hint}", TEMPORARY)
        traceback.print_exc()
        kind = type(error).__name__
        return _complain(
            f"{kind}, which sota did not foresee; please report it with the lines above", UNFORESEEN
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
        raise SotaError(f"no command {verb!r}{nearest(verb, VERBS)}; `sota --help` lists them")
    return VERBS[verb][1](rest)


def _usage() -> str:
    lines = [f"  sota {verb:<10} {text}" for verb, (text, _) in VERBS.items()]
    head = "Pretrain your own GPT-2-class language model on the one machine you have."
    tail = "`sota COMMAND --help` shows a command's options. Documentation: docs/guide.md"
    return "\n".join([head, "", *lines, "", tail])


def _complain(text: str, code: int) -> int:
    sys.stdout.flush()
    print(f"sota: {' '.join(text.split())}", file=sys.stderr)
    return code


def _train(arguments: list[str]) -> int:
    return train_and_show(resolve(arguments, "train"))


def train_and_show(config: RunConfig) -> int:
    """Train, or go on, and say what came of it: the last sample and where everything lies."""
    from sota_transformer.doctor import admit
    from sota_transformer.runtime import is_first_rank
    from sota_transformer.training.start import train

    train(config, admit)
    if not is_first_rank():  # the first one is still judging what it trained
        return 0
    folder = shlex.quote(str(config.run.out))
    print(f"the run is in {folder}: checkpoints, metrics.jsonl, samples.txt, config.json, run.json")
    words = "def main(" if config.data.path.name == "python" else "Once upon a time"
    print(f'try it:  sota generate {folder} --prompt "{words}"')
    # All validation text may be a quarter of an hour on a CPU.
    print(f"judge it:  sota evaluate {folder} --tokens 250000   (without: all validation text)")
    return 0


def _doctor(arguments: list[str]) -> int:
    options = parse(Doctor, "doctor", arguments)
    from sota_transformer.doctor import run_doctor

    return run_doctor(options)


def _config(arguments: list[str]) -> int:
    config = resolve(arguments, "config")
    from sota_transformer.plan import memory_estimate, padding
    from sota_transformer.schedules import describe

    share = padding(config) if config.data.path.is_dir() else 0.0  # it may be for another machine
    print(config.to_json(), end="")
    for line in (*describe(config, share), memory_estimate(config)):
        print(f"# {line}")
    return 0


def _prepare(arguments: list[str]) -> int:
    options = parse(Prepare, "prepare", arguments)
    from sota_transformer.data.prepare import prepare

    prepare(options)
    return 0


def _merge(arguments: list[str]) -> int:
    options = parse(Merge, "merge", arguments)
    from sota_transformer.data.prepare import merge

    merge(options)
    return 0


def _generate(arguments: list[str]) -> int:
    options = parse(Generate, "generate", arguments)
    from sota_transformer.commands.generate import run_generate

    return run_generate(options)


def _evaluate(arguments: list[str]) -> int:
    options = parse(Evaluate, "evaluate", arguments)
    from sota_transformer.commands.evaluate import run_evaluate

    return run_evaluate(options)


def _export(arguments: list[str]) -> int:
    options = parse(Export, "export", arguments)
    from sota_transformer.commands.transfer import run_export

    return run_export(options)


def _import(arguments: list[str]) -> int:
    options = parse(Import, "import", arguments)
    from sota_transformer.commands.transfer import run_import

    return run_import(options)


def _serve(arguments: list[str]) -> int:
    options = parse(Serve, "serve", arguments)
    from sota_transformer.commands.serve import run_serve

    return run_serve(options)


def _report(arguments: list[str]) -> int:
    options = parse(Report, "report", arguments)
    if not options.runs:
        raise SotaError("report needs at least one RUN: a folder made by `sota train`")
    if len(options.runs) == 1:
        from sota_transformer.report import write_report

        out = write_report(options.runs[0], options.out or options.runs[0] / "report.html")
    else:
        from sota_transformer.compare import write_comparison

        out = options.out or Path("comparison.html")
        print(write_comparison(options.runs, out))
    print(f"wrote {out}")
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


def _data(arguments: list[str]) -> int:
    options = parse(DataView, "data", arguments)
    from sota_transformer.data.view import describe

    describe(options)
    return 0


VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "prepare": ("turn text into token shards", _prepare),
    "merge": ("put the parts of a preparation together", _merge),
    "data": ("look at prepared data", _data),
    "plan": ("what a run takes here; with --hours H, what fits into them", _plan),
    "train": ("train a model, or go on training it", _train),
    "evaluate": ("judge a model: perplexity, bits per byte, LAMBADA, HellaSwag", _evaluate),
    "report": ("one page about a run, or a comparison of several", _report),
    "generate": ("continue prompts", _generate),
    "export": ("write the model for transformers, MLX, vLLM, llama.cpp or Ollama", _export),
    "serve": ("an OpenAI-compatible server with a page to try the model", _serve),
    "import": ("make a run of a Hugging Face folder", _import),
    "doctor": ("check this machine before it is trusted", _doctor),
    "config": ("print a resolved run and its derived numbers", _config),
}
