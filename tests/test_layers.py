"""The import order is the reading order, and no part does what its docstring rules out."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "sota_transformer"
ORDER = [
    "errors",
    "launcher",
    "words",
    "shapes",
    "config",
    "options",
    "presets",
    "schedules",
    "durable",
    "data",
    "model",
    "runtime",
    "inference",
    "serve",
    "training",
    "report",
    "compare",
    "probes",
    "doctor",
    "plan",
    "commands",
    "arguments",
    "cli",
    "__main__",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere; `from x import y` gives x and x.y."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_the_left(path: Path) -> None:
    assert layer(path) in ORDER, f"{path} has no place in the import order"
    own = ORDER.index(layer(path))
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "sota_transformer" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= own, (
                f"{path} imports {module}, which stands to its right"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_each_part_may_not_import(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)} - {"sota_transformer"}
    third_party = roots - set(sys.stdlib_module_names)
    name = layer(path)
    if name in ("errors", "config", "presets", "schedules", "durable", "shapes"):
        assert not third_party
    if name == "data":
        assert "torch" not in third_party
    if name == "model":
        assert not roots & {"os", "pathlib"}
        assert not any(module.startswith("torch.distributed") for module in imports(path))
    assert not roots & {"pickle", "shelve", "marshal", "dill"}


def test_sizes() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path} is over 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("arguments", [["--help"], ["config", "16m"], ["train", "16m", "--help"]])
def test_help_and_config_load_neither_numpy_nor_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from sota_transformer.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
