"""Wrong versions of durable.py; the crash model has to detect each of them.

Every call that makes something durable or visible is left out in turn; that list is derived from
the source. Then come deliberate mistakes: reordered calls, missing layers.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from sota_transformer import durable

from .protocols import CaughtError, Explorer, configure, explore, explore_twice, train

SOURCE = Path(durable.__file__).read_text()
_EFFECTS = ("fsync", "fsync_folder", "rename", "replace", "mkdir", "_flush")
_EFFECTS += ("remove", "rmtree", "unlink")
# The folder already exists when `commit_folder` is called; readers and locks write nothing.
_FUNCTIONS = ("fsync_folder", "make_folder", "close", "commit_folder", "write_file")
_FUNCTIONS += ("discard", "sweep", "create", "remove")

COMMIT = "        fsync_folder(temporary)\n        temporary.rename(final)\n"
PARENT = "    fsync_folder(final.parent)\n"
HAND_MADE = {
    "commit: rename before the folder's fsync": (
        COMMIT,
        "        temporary.rename(final)\n        fsync_folder(final)\n",
    ),
    "commit: parent synced before the rename": (
        COMMIT,
        "        fsync_folder(temporary)\n    " + PARENT + "        temporary.rename(final)\n    "
        "    return\n",
    ),
    "commit: written at its final name": (
        COMMIT,
        "        fsync_folder(temporary)\n",
        '    temporary = _aside(final, "tmp")\n    temporary.mkdir()\n',
        "    temporary = final\n    temporary.mkdir()\n",
    ),
    "write_file: in place": (
        '    temporary = _aside(path, "tmp")\n    try:\n        F',
        "    temporary = path\n    path.unlink(missing_ok=True)\n    try:\n        F",
        "        temporary.replace(path)\n",
        "        pass\n",
    ),
    "discard: without a rename": (
        "    path.rename(trash)\n    fsync_folder(path.parent)\n    remove(trash)\n",
        "    remove(path)\n",
    ),
    "make_folder: only what is missing": ("chain[: missing + 1]", "chain[:missing]"),
    "sweep: of nothing": ("if _LEFTOVER.fullmatch(path.name):", "if False:"),
    "file: synced before it is flushed": (
        "                self._flush()\n                fsync(self._descriptor)\n",
        "                fsync(self._descriptor)\n                self._flush()\n",
    ),
    "verify: no hash": (
        'if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):',
        "if False:",
        "                fsync(self._descriptor)\n",
        "",
    ),
}


def _without_a_call() -> Iterator[tuple[str, ast.Module]]:
    """The module once per effect in it, without that effect."""
    total = sum(1 for _ in _effects(ast.parse(SOURCE)))
    for number in range(total):
        module = ast.parse(SOURCE)
        name, body, index = list(_effects(module))[number]
        line = ast.unparse(body[index])
        body[index] = ast.copy_location(ast.Pass(), body[index])
        yield f"{name}: without {line}", module


def _effects(module: ast.Module) -> Iterator[tuple[str, list[ast.stmt], int]]:
    """Each statement that is such a call, outside error handlers."""
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef) and function.name in _FUNCTIONS:
            handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]
            excused = {inner for handler in handlers for inner in ast.walk(handler)}
            for node in ast.walk(function):
                for block in ("body", "orelse", "finalbody"):
                    body = getattr(node, block, None)
                    for index, statement in enumerate(body if isinstance(body, list) else []):
                        if statement not in excused and _called(statement) in _EFFECTS:
                            yield function.name, body, index


def _called(statement: ast.stmt) -> str:
    call = statement.value if isinstance(statement, ast.Expr) else None
    function = call.func if isinstance(call, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def mutants() -> Iterator[tuple[str, ModuleType]]:
    """Every wrong version, by name."""
    for name, tree in _without_a_call():
        yield name, _module(tree)
    for name, changes in HAND_MADE.items():
        text = SOURCE
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert text.count(old) == 1, f"mutant {name!r} no longer fits durable.py: {old!r}"
            text = text.replace(old, new)
        yield name, _module(ast.parse(text))


def _module(tree: ast.Module) -> ModuleType:
    module = ModuleType("mutant")
    exec(compile(tree, "mutant.py", "exec"), module.__dict__)
    return module


def caught(mutant: ModuleType, stride: int = 1) -> str:
    """How the mutant was detected, or an empty string."""
    try:
        for driver in (configure, train):
            explore(Explorer(mutant, driver, impatient=True), 3)
        explore_twice(Explorer(mutant, configure, impatient=True), 3)
        explore_twice(Explorer(mutant, train, impatient=True), 3, stride)
    except (CaughtError, OSError, AssertionError) as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return ""
