"""train_sota.py: its questions, where it puts prepared data, and how it resumes."""

import importlib.util
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sota_transformer import plan
from sota_transformer.config import RunConfig
from sota_transformer.errors import BAD_DATA, INTERRUPTED, IO_FAILED, LOCKED, SotaError
from sota_transformer.training.start import train
from tests.training_runs import change

SCRIPT = Path(__file__).parents[1] / "train_sota.py"


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The script as a module, in an empty folder with two texts of the same name."""
    from tests.preparing import jsonl, texts

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        Path(name).mkdir()
        Path(name, "train.jsonl").write_bytes(jsonl(texts(200, seed=seed)))
    spec = importlib.util.spec_from_file_location("train_sota", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its help is looked up
    spec.loader.exec_module(module)
    return module


def test_texts_of_the_same_name_are_kept_apart(launcher: types.ModuleType) -> None:
    asked = (
        "a/train.jsonl",
        "b/train.jsonl",
        "a/train.jsonl",
        str(Path("b/train.jsonl").resolve()),
    )
    first, second, again, absolute = (launcher.prepared(text) for text in asked)
    assert first == again == Path("data/train")
    assert second == absolute == Path("data/train-2")
    assert launcher.prepared("data/train-2") == second
    Path("data/a").mkdir()  # someone else's
    assert launcher.prepared("a") == Path("data/a-2")


def test_damaged_data_is_reported_not_prepared_again(launcher: types.ModuleType) -> None:
    launcher.prepared("a")
    Path("data/a/manifest.json").write_text("{")
    with pytest.raises(SotaError, match="not a readable manifest") as caught:
        launcher.prepared("a")
    assert caught.value.code == BAD_DATA and "; move data/a away" in str(caught.value)
    assert [path.name for path in Path("data").iterdir()] == ["a"]


def test_python_means_the_machines_and_no_folder_of_that_name(launcher: types.ModuleType) -> None:
    Path("a").rename("python")
    assert launcher.prepared("python") == Path("data/python")
    assert not launcher.prepared_from(Path("data/python"), "python:")


def test_a_changed_text_lists_the_options(launcher: types.ModuleType) -> None:
    launcher.prepared("a")
    Path("a/more.txt").write_text("more\n")
    with pytest.raises(SotaError, match="--data data/a continues") as caught:
        launcher.prepared("a")
    assert caught.value.code == LOCKED
    assert launcher.prepared("data/a") == Path("data/a")


def test_impossible_requests_are_refused_before_the_machine_is_measured(
    launcher: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def measure(*_: object) -> None:
        pytest.fail("measured")

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "fit_budget", measure)
    lines = [json.dumps({"text": f"Document {i} of a very small set."}) for i in range(60)]
    Path("small.jsonl").write_text("\n".join(lines))
    for size in ("--quick", "--full"):
        assert launcher.main([size, "--data", "small.jsonl"]) == BAD_DATA
        assert launcher.main([size, "--data", "a", "--out", "b/train.jsonl"]) == LOCKED
        with monkeypatch.context() as patch:
            patch.setattr(
                shutil, "disk_usage", lambda _: types.SimpleNamespace(total=1e9, free=1e8)
            )
            assert launcher.main([size, "--data", "a"]) == IO_FAILED
        said = capsys.readouterr()
        assert "measuring" not in said.out
        short, taken, full = (line for line in said.err.splitlines() if line.startswith("sota: "))
        assert "a checkpoint needs" in full
        assert "split has" in short and "choose another --out" in taken


def test_a_file_dropped_on_the_terminal_is_a_path(launcher: types.ModuleType) -> None:
    Path("my 'texts'").mkdir()
    Path("it's").mkdir()
    dropped = ["my\\ \\'texts\\'", "\"my 'texts'\"", "my 'texts'"]
    assert [launcher.named(answer) for answer in dropped] == ["my 'texts'"] * 3
    assert launcher.named("it's") == "it's" and launcher.named("none's") == "none's"
    assert launcher.named("~/a b") == str(Path.home() / "a b")
    assert launcher.named("~nobody here/a") == "~nobody here/a"


def test_a_run_among_its_texts_is_no_text(launcher: types.ModuleType, make_run) -> None:
    """`--data .` in the folder with the texts: data/ and runs/ are made beside them."""
    Path("a").rename("here")
    os.chdir("here")
    assert launcher.prepared(".") == Path("data/here")
    config = make_run(steps=1)
    train(change(config, out=Path("runs/x")))
    assert Path("runs/x/samples.txt").stat().st_size
    assert launcher.prepared(".") == Path("data/here")


def test_a_run_resumes_where_and_on_the_data_it_is_told(
    launcher: types.ModuleType, make_run, capsys
) -> None:
    config = make_run(resume="step:3")
    config.run.out.mkdir()
    (config.run.out / "config.json").write_text(config.to_json())
    moved = config.run.out.rename("moved")
    asked = launcher.Options(device="cuda")
    found: RunConfig = launcher.resumed(moved, asked, Path("elsewhere"))
    assert (found.run.out, found.run.resume, found.run.device) == (moved, "auto", "cuda")
    assert found.data.path == Path("elsewhere") and found.train == config.train
    kept = launcher.resumed(moved, launcher.Options(), None)
    assert "is ignored" not in capsys.readouterr().out
    assert (kept.run.device, kept.data.path) == ("cpu", config.data.path)


def test_options_a_resumed_run_cannot_use_are_reported_or_refused(
    launcher: types.ModuleType, make_run, capsys
) -> None:
    for recipe, other in (("seed", "fast"), ("fast", "seed")):
        config = make_run(recipe, recipe)
        config.run.out.mkdir()
        (config.run.out / "config.json").write_text(config.to_json())
        asked = launcher.Options(recipe=recipe, minutes=9.0)
        assert launcher.resumed(config.run.out, asked, None).optim == config.optim
        assert "--minutes is ignored" in capsys.readouterr().out
        resume = ["--resume", str(config.run.out)]
        assert launcher.main([*resume, "--recipe", other]) == 2
        assert launcher.main([*resume, "--out", "elsewhere"]) == 2
        size = ["--full", "--data", str(config.data.path), "--recipe", recipe]
        assert launcher.main([*size, "--out", str(config.run.out)]) == 2
        first, second, third = capsys.readouterr().err.splitlines()
        assert f"started with --recipe {recipe}, not {other}" in first and "--out" in second
        assert "another --out" not in first  # --resume RUN takes no other --out
        assert "parameters, not 125m" in third


def test_a_mistake_points_to_the_scripts_help(launcher: types.ModuleType, capsys) -> None:
    assert launcher.main(["--minuts", "3"]) == 2
    assert launcher.main(["--quick", "--minutes", "x"]) == 2
    assert launcher.main(["--quick", "--recipe", "slow"]) == 2
    assert launcher.main(["--full", "--minutes", "3"]) == 2
    said, number, choice, budget = capsys.readouterr().err.splitlines()
    assert "--minutes must be a number, not 'x'; `" in number and "--quick" in budget
    assert re.search("--recipe must be one of '[a-z]{4}', '[a-z]{4}', not 'slow'", choice), choice
    assert "(did you mean '--minutes'?); `train_sota.py --help` shows" in said


def test_it_states_what_it_needs_without_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 2
    assert "--quick" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_ends_it_like_ctrl_c(
    launcher: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """What preparation leaves in the temporary folder is removed when the process exits."""
    for sign in (signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(launcher, "run", lambda _, sign=sign: signal.raise_signal(sign) or 0)
        before = signal.signal(sign, lambda *_: None)
        try:
            assert launcher.main(["--quick"]) == 128 + sign
        finally:
            signal.signal(sign, before)
        assert capsys.readouterr().err == "sota: interrupted\n"


def test_the_menu_can_be_left_and_expands_the_home_folder(tmp_path: Path) -> None:
    assert ask(tmp_path, "\x04") == (INTERRUPTED, "interrupted")
    code, said = ask(tmp_path, "4\n", "~/none\n")
    assert code == 66 and f"{tmp_path}/none does not exist" in said


def ask(home: Path, *keys: str) -> tuple[int, str]:
    """The exit code and last line after these keys, one answer at a time."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"HOME": str(home)},
    )
    os.close(theirs)
    left, said = list(keys), b""
    while True:
        if left and said.rstrip().endswith(b":"):
            os.write(ours, left.pop(0).encode())
        assert select.select([ours], [], [], 60)[0], said
        try:
            said += os.read(ours, 1 << 16)
        except OSError:  # Linux: the other side is closed
            break
    os.close(ours)
    last = said.decode().strip().splitlines()[-1]
    return process.wait(timeout=60), last.rpartition("sota: ")[2]
