"""Turns command-line arguments into options, or into one line that says what is wrong with them.

`resolve` builds a run's configuration from a preset and overrides; `parse` reads the options of the
other verbs. tyro does the parsing; its error messages are reworded, with a suggestion if any fits.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from sota_transformer.config import RunConfig
from sota_transformer.errors import SotaError
from sota_transformer.presets import PRESETS, RECIPES, flag

_Options = TypeVar("_Options")

SHORT = {  # short form of a common option -> the full option
    "--data": "--data.path",
    "--out": "--run.out",
    "--steps": "--train.steps",
    "--seed": "--run.seed",
    "--device": "--run.device",
    "--threads": "--run.threads",
    "--resume": "--run.resume",
    "--exact": "--run.exact",
    "--data-change": "--run.data-change",
}


def resolve(arguments: list[str], verb: str) -> RunConfig:
    """The run configuration of PRESET and overrides; --out defaults to runs/PRESET-DATA."""
    names = ", ".join(PRESETS)
    own = ["--hours H (show what fits into H hours)"] if verb == "plan" else []
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: sota {verb} PRESET [OPTIONS]\n\nPRESET is one of {names}.")
        print("\n".join([f"--recipe {'|'.join(RECIPES)} sets the preset's default values.", *own]))
        print(f"`sota {verb} PRESET --help` shows every option with that preset's values.")
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise SotaError(f"name a preset first: sota {verb} PRESET [OPTIONS], one of {names}")
    name, rest = arguments[0], arguments[1:]
    if name not in PRESETS:
        raise SotaError(f"unknown preset {name!r}{nearest(name, PRESETS)}; presets: {names}")
    given, rest = taken("--recipe", " or ".join(RECIPES), rest)
    recipe = given or RECIPES[0]
    if recipe not in RECIPES:
        raise SotaError(f"--recipe must be {' or '.join(RECIPES)}, not {given!r}")
    short = ", ".join([*own, "--recipe NAME", *SHORT, "--override FIELD=VALUE"])
    default = PRESETS[name](recipe)
    words = _lengthen(rest, default)
    flags = {word.partition("=")[0] for word in words}
    config = parse(
        RunConfig,
        f"{verb} {name}",
        words,
        default=default,
        others=[*SHORT, "--recipe", "--override", *["--hours"] * (verb == "plan")],
        description=f"Short forms and more options: {short}.",
    )
    data, out = config.data.path, config.run.out
    if data == Path() and "--data.path" in flags:  # an explicit `.`, not the default
        data = Path.cwd()
    if out == Path() and "--run.out" in flags:
        out = Path.cwd()
    if out == Path() and data != Path():
        kind = name if recipe == RECIPES[0] else f"{name}-{recipe}"
        out = Path("runs") / f"{kind}-{Path(os.path.realpath(data)).name}"
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=data),
        run=dataclasses.replace(config.run, out=out),
    )


def taken(flag: str, what: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option that is parsed before all others, and the remaining arguments."""
    found, rest, words = None, list[str](), iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        found = value if equals else next(words, "")
        if not found or found.startswith("--"):
            raise SotaError(f"{flag} needs a value: {what}")
    return found, rest


def _lengthen(arguments: list[str], default: RunConfig) -> list[str]:
    """Expand --steps=5 to --train.steps=5; --override also allows the field to change on resume."""
    long, fields, words = list[str](), list[str](), iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--override":
            long.append(SHORT.get(name, name) + equals + value)
            continue
        typed = value if equals else next(words, "")
        name, _, value = typed.partition("=")
        if not name or not value:
            raise SotaError("--override needs FIELD=VALUE, such as train.steps=2000")
        field = SHORT.get(f"--{name}", name).removeprefix("--").replace("-", "_")
        if field not in default.fields():
            known = [other.removeprefix("--") for other in (*SHORT, *_flags(RunConfig, default))]
            guess = _similar(name.replace("_", "-"), known)
            raise SotaError(f"--override {typed}: there is no such field{guess}")
        fields.append(field)
        long.append(flag(field, {"true": True, "false": False}.get(value.lower(), value)))
    return [*long, "--run.override", ",".join(fields)] if fields else long


def parse(
    kind: type[_Options], verb: str, arguments: list[str], others: Sequence[str] = (), **more: Any
) -> _Options:
    """Options of `kind` from the command line; tyro's boxed error message becomes one line, which
    may suggest `others`.
    """
    import tyro

    marks = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    config = marks if "default" not in more else ()
    program = verb if verb.endswith(".py") else f"sota {verb}"
    given = [word.partition("=")[0].replace("_", "-") for word in arguments]
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        flag = f"--{field.name.replace('_', '-')}"
        if get_origin(field.type) is tuple and given.count(flag) > 1:  # tyro uses only the last
            raise SotaError(f"{verb}: {flag} is given twice; list all its values after one {flag}")
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed), _value_types():
            return tyro.cli(kind, prog=program, args=arguments, config=config, **more)
    except SystemExit as stop:
        if not stop.code:
            raise
        kept = re.sub(r"[\u2500-\u257f]|-{4,}", " ", boxed.getvalue())  # box or ASCII borders
        text = _plain(" ".join(kept.split()), [*others, *_flags(kind, more.get("default"))])
        if not re.match(r"\w+\.\w+ ", text):  # unless it already names the field and its limits
            text = f"{verb}: {text}; `{program} --help` shows all options"
        raise SotaError(text) from None


def _value_types() -> Any:
    """How tyro parses and shows options with several values, or with none by default; on its own
    it puts brackets around each value, offers {None} as one, and shows the absent Path() as `.`.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def plain(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        several = get_origin(info.type) is tuple
        kinds = [kind for kind in get_args(info.type) if kind not in (type(None), ...)]
        if info.type is Path:
            kinds = [Path]
        if kinds not in ([int], [float], [str], [Path]):
            return None
        kind = kinds[0]
        name = "TEXT" if kind is str else kind.__name__.upper()
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*" if several else 1,
            metavar=name + " ..." * several,
            instance_from_str=lambda words: tuple(map(kind, words)) if several else kind(words[0]),
            is_instance=lambda value: (
                value is None or isinstance(value, tuple if several else kind)
            ),
            str_from_instance=lambda value: [
                str(None if one == Path() else one)
                for one in (value if isinstance(value, tuple) else [value])
            ],
        )

    return registry


def _flags(kind: type, default: RunConfig | None) -> list[str]:
    """Every option of `kind`; of a run's configuration those of its sections."""
    fields = (field for field in dataclasses.fields(kind) if field.default != dataclasses.MISSING)
    names = default.fields() if default else [field.name for field in fields]
    return [f"--{name.replace('_', '-')}" for name in names]


_REWORDED = (  # tyro 1.0's message, our message
    (r"Error parsing (\S+): invalid literal for int\(\) .*?: (.*) Argument helptext.*",
     r"\1 must be a whole number, not \2"),
    (r"Error parsing (\S+): could not convert .* float: (.*) Argument helptext.*",
     r"\1 must be a number, not \2"),
    (r"Error parsing (\S+: .*) Argument helptext.*", r"\1"),
    (r"Error parsing \S+: (.*)", r"\1"),
    (r"invalid choice ('.*') for argument '(.*?)'\. Expected one of \((.*?)(?:, 'None')?\)\.",
     r"\2 must be one of \3, not \1"),
    (r"Missing value for argument .*?'([-.\w]+)'.*", r"\1 needs a value"),
    (r"Missing from .*?: (\S+) (.*?)\.? \(required\).*", r"missing \1: \2"),
    (r"Unrecognized options: (.*?)(?: (?:Perhaps you meant|Arguments similar to).*)?",
     r"unrecognized arguments: \1"),
)  # fmt: skip
_TITLES = r"(Value error|Invalid choice|Missing argument|Required options|Unrecognized options) "


def _plain(text: str, known: list[str]) -> str:
    """tyro's message reworded, or as it is if unknown, without its title and footer."""
    text = re.sub(r" For full helptext.*", "", re.sub(_TITLES, "", text, count=1))
    text = text.replace("'None', ", "")  # the default, not something to pass
    text = next(
        (found.expand(new) for old, new in _REWORDED if (found := re.fullmatch(old, text))), text
    )
    unrecognized = "unrecognized arguments: "
    if unknown := re.match(rf"{unrecognized}(--[^\s,=]+)", text):
        text += _similar(unknown[1], known)
    elif "--override" in known and (change := re.match(rf"{unrecognized}([\w.-]+=\S+)", text)):
        text += f" (did you mean '--override {change[1]}'?)"  # a second value after one --override
    return text


def _similar(flag: str, known: list[str]) -> str:
    """Suggest the option that `flag` abbreviates, as --optim.lr, --temp or --batch-size do, by its
    initials or its beginning; else the nearest, if any is close.
    """
    short = _own(flag).replace("_", "-")
    first = short.partition("-")[0]
    for option in known if len(short) > 1 else ():
        name = _own(option)
        initials = "".join(word[0] for word in name.split("-"))
        if initials == short or name.startswith((short, f"{first}-")):
            return f" (did you mean {option!r}?)"
    # By its own name, too: the options of a section share the section's.
    alike = [o for o in known if difflib.SequenceMatcher(None, short, _own(o)).ratio() > 0.5]
    return nearest(flag, alike, 0.7)


def _own(option: str) -> str:
    """An option's name without its section."""
    return option.removeprefix("--").rpartition(".")[2]


def nearest(word: str, known: Any, alike: float = 0.6) -> str:
    """A suggestion of the most similar known word; empty if none is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=alike)
    return f" (did you mean {close[0]!r}?)" if close else ""
