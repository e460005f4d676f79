"""The command line as users type it: every verb, and every mistake as one line and a code."""

import io
import resource
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
from rich.console import Console

from sota_transformer import cli
from sota_transformer.__main__ import main as started
from sota_transformer.arguments import resolve
from sota_transformer.cli import VERBS, guarded, main
from sota_transformer.commands.generate import _typed
from sota_transformer.config import Run
from sota_transformer.data import forks
from sota_transformer.errors import SotaError, interruptible
from sota_transformer.runtime import Runtime
from sota_transformer.training.start import check_folders


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_verb(capsys) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in VERBS:
        assert f"sota {verb}" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys, verb: str) -> None:
    code, out, err = run(capsys, verb, "--help")
    assert code == 0, err
    assert "usage" in out.lower()


def test_ctrl_c_is_one_line_from_the_first_moment(capsys, monkeypatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(forks, "start_fork_server", interrupted)
    monkeypatch.setattr(sys, "argv", ["sota", "prepare", "x", "--out", "y"])
    assert started() == 130
    assert capsys.readouterr().err == "sota: interrupted\n"


CTRL_C_IN_THE_FIRST_IMPORT = """
import sys

class CtrlC:
    def find_spec(self, name, *_):
        if name.startswith("sota_transformer.") and not name.endswith("__main__"):
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
from sota_transformer.__main__ import main
sys.exit(main())
"""


def test_ctrl_c_while_the_program_loads_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C_IN_THE_FIRST_IMPORT], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "sota: interrupted\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_standard_stream_counts_as_empty(tmp_path: Path, closed: str) -> None:
    """As in processes started by some services: there is no text, and nothing else fails."""
    command = f'"$0" -m sota_transformer prepare - --out "$1" {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, tmp_path / "out"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 65
    expected = (
        ""
        if closed == "2>&-"
        else "sota: no usable text in the inputs: 1 x empty file, e.g. stdin\n"
    )
    assert done.stderr == expected


def test_config_prints_the_resolved_run_and_its_numbers(capsys) -> None:
    code, out, _ = run(capsys, "config", "125m", "--steps", "1000", "--optim.learning-rate", "6e-4")
    assert code == 0
    assert '"steps": 1000' in out and '"learning_rate": 0.0006' in out
    assert "123,552,000 parameters" in out
    assert "50 warm-up steps (capped at 5% of the run; 4000 configured)" in out
    code, out, _ = run(capsys, "config", "tiny", "--steps", "1")
    assert "run: 1 step x" in out


def test_a_recipe_sets_only_what_is_not_given(capsys) -> None:
    code, out, _ = run(
        capsys, "config", "125m", "--recipe", "fast", "--data", "d", "--optim.beta1", "0.7"
    )
    assert code == 0
    assert '"qk_norm": true' in out and '"heads": 6' in out and '"beta1": 0.7' in out
    assert '"out": "runs/125m-fast-d"' in out
    assert "NorMuon 0.02" in out and "linear decay over the last 65% to 0%" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["trian"], 2, ["did you mean 'train'"]),
        (["train"], 2, ["name a preset", "16m"]),
        (["train", "17m"], 2, ["did you mean '16m'"]),
        (
            ["train", "tiny", "--stepz", "5"],
            2,
            ["unrecognized arguments: --stepz, 5 (did you mean '--steps'?)"],
        ),
        (["train", "tiny", "--optim.bta1=5"], 2, ["bta1=5 (did you mean '--optim.beta1'?); `sota"]),
        (["train", "tiny", "more"], 2, ["arguments: more; `sota train tiny --help`"]),
        (["train", "tiny", "--steps", "x"], 2, ["steps must be a whole number, not 'x'; `sota"]),
        (
            ["train", "tiny", "--override", "optim.eps=x"],
            2,
            ["optim.eps must be a number, not 'x'"],
        ),
        (["train", "tiny", "--device", "tpu"], 2, ["device must be one of 'auto', 'cpu', 'cuda'"]),
        (["train", "tiny", "--steps"], 2, ["train tiny: --train.steps needs a value; `sota train"]),
        (["evaluate", "x", "--step", "y"], 2, ["--step must be a whole number, not 'y'; `"]),
        (["plan", "tiny", "--hour", "3"], 2, ["--hour, 3 (did you mean '--hours'?)"]),
        (["train", "tiny", "--override", "nosuch=3"], 2, ["--override nosuch=3: there is no such"]),
        (["train", "tiny", "--override", "train.stepz=3"], 2, ["(did you mean 'train.steps'?)"]),
        (["train", "tiny", "--override", "steps=9", "seed=2"], 2, ["mean '--override seed=2'?)"]),
        (["train", "tiny", "--step", "5"], 2, ["--step, 5 (did you mean '--steps'?)"]),
        (["train", "tiny", "--recip=fast"], 2, ["(did you mean '--recipe'?)"]),
        (["report"], 2, ["sota: report needs at least one RUN: a folder made by `sota train`"]),
        (["prepare", "x", "--exclude", "a", "--exclude=b"], 2, ["all its values after one --exc"]),
        (["generate", "x", "--prompt", "a", "--prompt", "b"], 2, ["--prompt is given twice"]),
        (["prepare", "x", "--workes", "2"], 2, ["--workes, 2 (did you mean '--workers'?)"]),
        (["train", "tiny", "--recipe", "slow"], 2, ["--recipe must be seed or fast, not 'slow'"]),
        (["train", "tiny", "--recipe"], 2, ["--recipe needs a value: seed or fast"]),
        (["config", "tiny", "--recipe", "--steps", "5"], 2, ["--recipe needs a value: seed"]),
        (["plan", "tiny", "--hours", "x"], 2, ["--hours must be a number of hours, not 'x'"]),
        (["plan", "tiny", "--hours=nan"], 2, ["--hours must be a number of hours, not 'nan'"]),
        (["plan", "tiny", "--hours"], 2, ["--hours needs a value: a number of hours"]),
        (["train", "tiny", "--optim.lr", "1"], 2, ["(did you mean '--optim.learning-rate'?)"]),
        (["train", "tiny", "--train.lr", "1"], 2, ["(did you mean '--optim.learning-rate'?)"]),
        (["train", "tiny", "--wd=1"], 2, ["(did you mean '--optim.weight-decay'?)"]),
        (["train", "tiny", "--batch_size", "8"], 2, ["(did you mean '--train.batch-rows'?)"]),
        (["train", "tiny", "--dropout", "0"], 2, ["(did you mean '--optim.dropout-start'?)"]),
        (["generate", "x", "--temp", "0"], 2, ["(did you mean '--temperature'?)"]),
        (["train", "tiny", "--threads", "99999"], 2, ["run.threads 99999 must be at most 1024"]),
        (["train", "tiny", "--steps", "100000000"], 2, ["train.steps 100000000 must be below 1"]),
        (["train", "tiny", "--resume", f"step:{10**20}"], 2, ["must be auto, latest, never or s"]),
        (["train", "tiny", "--steps", "0"], 2, ["sota: train.steps 0 must be at least 1\n"]),
        (["train", "tiny"], 2, ["--data"]),
        (["train", "tiny", "--data", "NOWHERE"], 66, ["NOWHERE", "sota prepare"]),
        (
            ["train", "tiny", "--data", "a/b"],
            66,
            ["a/b: no such folder in ", "; change directory"],
        ),
        (["data", "a  b\n c"], 66, ["a  b c: no such folder", "--out 'a  b c'`"]),
        (["train", "tiny", "--data", "EMPTY"], 65, ["manifest.json"]),
        (["train", "tiny", "--data", "DATA/manifest.json"], 66, ["is a file", "use its folder"]),
        (["plan", "tiny", "--data", "DATA/manifest.json"], 66, ["is a file", "use its folder"]),
        (["train", "tiny", "--seed", str(2**64 - 1)], 2, ["run.seed", "below 2**63"]),
        (["config", "tiny", "--model.layers", "9" * 4000], 2, ["model.layers must be below 2**63"]),
        (["data", "DATA", "--window", "val:" + "9" * 5000], 2, ["must be SPLIT:INDEX or"]),
        (["train", "tiny", "--optim.eps", "inf"], 2, ["optim.eps must be below 2**63"]),
        (["train", "tiny", "--data", "DATA", "--out", "DATA/manifest.json"], 73, ["cannot create"]),
        (["train", "tiny", "--data", "DATA", "--model.vocab-size", "999"], 2, ["vocab"]),
        (["train", "tiny", "--data", "DATA", "--resume", "step:5"], 66, ["no checkpoint to resum"]),
        (["train", "tiny", "--data", "DATA", "--model.seq-len", "999999"], 65, ["window needs"]),
        (["plan", "tiny", "--data", "DATA", "--model.seq-len", "999999"], 65, ["window needs"]),
        (["prepare", "NOWHERE", "--out", "OUT"], 66, ["NOWHERE"]),
        (["prepare", "EMPTY", "--out", "OUT"], 66, ["EMPTY"]),
        (["prepare", "CORPUS"], 2, ["--out"]),
        (["generate", "EMPTY"], 66, ["not a run"]),
        (["evaluate", "DATA"], 66, ["is prepared data, not a run trained on it; give"]),
        (["evaluate", "NOWHERE"], 66, ["nowhere does not exist; give a folder"]),
        (["export", "EMPTY", "--out", "OUT"], 66, ["not a run"]),
        (["generate", "DATA/manifest.json"], 66, ["manifest.json is a file, not a run; give a f"]),
        (["report", "DATA/manifest.json"], 66, ["manifest.json is a file, not a run; give a f"]),
        (["generate"], 2, ["generate: missing PATH: Run folder"]),
        (["data", "DATA", "--show", "-1"], 2, ["--show -1 must be 0 or more"]),
        (
            ["data", "DATA", "--html", "NOWHERE/x"],
            73,
            ["cannot create ", "; give --html a file in an existing folder"],
        ),
        (
            ["data", "DATA", "--html", "EMPTY"],
            73,
            ["cannot create ", "; give --html a file in an existing folder"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_mistake_is_one_line_and_a_code(
    capsys, monkeypatch, tmp_path: Path, corpus: Path, data: Path, arguments, code, words
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path / "empty", "OUT": tmp_path / "out"}
    places |= {"DATA": data, "CORPUS": corpus}
    places["EMPTY"].mkdir()
    filled = [
        str(places[word.split("/")[0]]) + word[len(word.split("/")[0]) :]
        if word.split("/")[0] in places
        else word
        for word in arguments
    ]
    got, _, err = run(capsys, *filled)
    assert got == code, err
    assert err.startswith("sota: ") and err.count("\n") == 1, err
    theirs = ("Error parsing", "helptext", "RunConfig", "None", "argument --", "expected one")
    assert not any(word in err for word in theirs), err
    expected = [str(places.get(word, word)) for word in words]
    assert all(word in err for word in expected), err


def test_a_full_disk_is_code_74_and_leaves_nothing_torn(capsys, tmp_path: Path, data: Path) -> None:
    """A real file size limit makes writes fail in the middle, as on a full disk."""
    arguments = ["train", "tiny", "--data", data, "--out", tmp_path / "run", "--steps", 1]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # Python ignores SIGXFSZ
    try:
        code, _, err = run(capsys, *arguments, "--train.batch-rows", 4, "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 74, err
    assert err.startswith("sota: ") and err.count("\n") == 1, err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_documented_commands_continue_with_the_folder_that_training_makes(name: str) -> None:
    text = (Path(__file__).parents[1] / name).read_text().partition("sota prepare my_texts/")[2]
    block = [shlex.split(line, comments=True) for line in text.partition("```")[0].splitlines()]
    verbs = {words[1]: words[2:] for words in block if words[:1] == ["sota"]}
    out = str(resolve(verbs["train"], "train").run.out)
    assert {"evaluate", "generate", "export", "serve"} < {*verbs}
    assert {words[0] for words in verbs.values() if words[0].startswith("runs/")} == {out}


def test_the_whole_path_from_text_to_words(capsys, tmp_path: Path, corpus: Path) -> None:
    """README's commands in their order, on the tiny preset."""
    data, out = tmp_path / "data", tmp_path / "run"
    code, printed, err = run(
        capsys, "prepare", corpus, "--out", data, "--val-fraction", 0.1, "--workers", 1
    )
    assert code == 0, err
    assert "300" in printed
    options = ["--steps", 6, "--train.batch-rows", 4, "--train.eval-tokens", 512, "--threads", 1]
    code, printed, err = run(capsys, "train", "tiny", "--data", data, "--out", out, *options)
    assert code == 0, err
    for said in (
        "3,317,184 parameters",
        "; 1 thread; 1 process; ",
        "saved step 6",
        "validation",
        "--- sample at step 6",
    ):
        assert said in printed
    for name in ("config.json", "run.json", "metrics.jsonl", "samples.txt", "doctor.json"):
        assert (out / name).is_file()
    command = ["generate", out, "--prompt", "The ship", "--max-tokens", 8]
    code, first, err = run(capsys, *command)
    assert code == 0, err
    assert first.startswith("The ship")
    assert run(capsys, *command)[1] == first
    assert run(capsys, *command, "--seed", 1)[1] != first
    code, printed, err = run(capsys, "evaluate", out)
    assert code == 0, err
    assert "perplexity" in printed and "bits per byte" in printed
    hidden = data.rename(tmp_path / "hidden")
    code, _, err = run(capsys, "evaluate", out)
    assert code == 66 and f"does not exist; correct data.path in {out / 'config.json'}" in err
    hidden.rename(data)
    text = tmp_path / "other.txt"
    text.write_text("The captain saw the river while the storm carried 12 others. " * 30)
    code, printed, err = run(capsys, "evaluate", out, "--text", text)
    assert code == 0, err
    assert "perplexity" in printed
    code, _, err = run(capsys, "data", text)
    assert code == 66 and "first run `sota prepare" in err
    code, _, err = run(capsys, "export", out, "--out", text / "below")
    assert code == 73 and "sota: cannot create " in err, err
    code, printed, err = run(capsys, "train", "tiny", "--data", data, "--out", out, *options)
    assert code == 0 and "complete" in printed


def test_refused_training_leaves_nothing(capsys, tmp_path: Path, data: Path) -> None:
    """It used to leave a folder without a run, or a run inside the prepared data given as --out."""
    before, options = sorted(data.iterdir()), ["--steps", 1, "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    for given, out, code in (
        (tmp_path / "empty", tmp_path / "run", 65),
        (tmp_path / "none", tmp_path / "run", 66),
        (data, data, 73),
    ):
        done, _, err = run(capsys, "train", "tiny", "--data", given, "--out", out, *options)
        assert done == code and len(err.splitlines()) == 1, err
    assert not (tmp_path / "run").exists()
    assert sorted(data.iterdir()) == before


def test_the_current_folder_can_be_the_run_or_its_data(capsys, monkeypatch, tmp_path: Path) -> None:
    """`--out .` was taken for no --out, so the run went to runs/tiny-NAME; likewise --data."""
    monkeypatch.chdir(tmp_path)
    for words in (["--out", "."], ["--out=."]):
        assert f'"{tmp_path}"' in run(capsys, "config", "tiny", "--data", "d", *words)[1]
    assert f'"path": "{tmp_path}"' in run(capsys, "config", "tiny", "--data", ".")[1]
    assert '"runs/tiny-d"' in run(capsys, "config", "tiny", "--data", "d")[1]
    assert f"runs/tiny-{tmp_path.parent.name}" in run(capsys, "config", "tiny", "--data", "..")[1]


def test_the_help_shows_list_values_without_nested_brackets(capsys) -> None:
    for verb in ("prepare", "report", "evaluate", "generate"):
        assert "[[" not in run(capsys, verb, "--help")[1]
    assert "--stop TEXT ..." in run(capsys, "generate", "-h")[1]


def test_the_help_of_plan_names_its_own_option(capsys) -> None:
    for words in (["prepare"], ["export"], ["import"], ["doctor"], ["train", "tiny"]):
        assert "(default: .)" not in run(capsys, *words, "--help")[1]  # what it refuses, or not so
    assert "--hours" in run(capsys, "plan", "-h")[1]
    assert "--hours" in run(capsys, "plan", "tiny", "--help")[1]
    assert "--hours" not in run(capsys, "train", "tiny", "--help")[1]


def test_a_character_the_terminal_lacks_is_no_error(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", write_through=True))
    assert guarded(lambda: print("d\u00e9j\u00e0 vu") or 0) == 0
    assert raw.getvalue() == b"d?j? vu\n"


def test_an_extra_is_quoted_for_zsh() -> None:
    """zsh takes unquoted brackets for a pattern, and finds no such file."""
    for path in Path(cli.__file__).parent.rglob("*.py"):
        assert "install sota-transformer[" not in path.read_text(), path


@pytest.mark.parametrize("columns", ["0", "5", "\u00b2", "9" * 5000])
def test_a_terminal_of_width_zero_gets_its_lines(monkeypatch, capsys, columns: str) -> None:
    """rich printed nothing, so training was silent and the doctor's table empty."""
    monkeypatch.setenv("COLUMNS", columns)
    assert guarded(lambda: Console().print("A line of some length.") or 0) == 0
    assert capsys.readouterr().out == "A line of some length.\n"


def test_a_prompt_typed_where_the_locale_is_ascii_is_read_as_utf_8() -> None:
    for text in ("d\u00e9j\u00e0 \U0001f600", "plain"):
        assert _typed(text.encode().decode("ascii", "surrogateescape")) == text
        assert _typed(text) == text
    assert _typed("\udcff") == "\ufffd"


@pytest.mark.parametrize("line", ["{", '{"text": "y"}', '{"prompt": 3}', "[]", '"x"'])
def test_generate_names_the_invalid_prompt_line(capsys, tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n\n{line}\n')
    code, _, err = run(capsys, "generate", tmp_path, "--file", path)
    assert (code, err) == (65, f"sota: {path}:3: not an object with a string `prompt`\n")


def test_an_unexpected_error_is_not_shown_as_a_user_mistake(capsys) -> None:
    assert guarded(lambda: int("x")) == 70
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "invalid literal" in err
    assert err.endswith(
        "\nsota: unexpected ValueError; please report it with the traceback above\n"
    )


def test_no_run_starts_where_its_checkpoints_could_not_be_opened(tmp_path: Path) -> None:
    config = cli.resolve(["tiny", "--data", str(tmp_path), "--out", "r\udcff"], "train")
    with pytest.raises(SotaError, match="not UTF-8"):
        check_folders(config)


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("RANK", ""), ("RANK", "1")]
)
def test_an_invalid_launcher_variable_is_named(
    monkeypatch, capsys, tmp_path: Path, data: Path, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SotaError, match=f"{name}={value} is not from torchrun"):
        Runtime.detect(Run(), 1)
    code, _, err = run(capsys, "train", "tiny", "--data", data, "--out", tmp_path / "run")
    assert code == 2 and "not from torchrun" in err and not (tmp_path / "run").exists()


def test_generate_states_the_limit_of_the_temperature(capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "generate", tmp_path, "--temperature", "1e30")
    assert (code, "in [0, 1e6)" in err) == (2, True)


def test_a_signal_is_reported_as_such_whatever_c_code_turns_it_into(capsys) -> None:
    """numpy's import turns what a handler raises in it into an ImportError."""

    def interrupted() -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy could not import datetime") from None
        return 0

    before = signal.getsignal(signal.SIGINT)
    assert guarded(interrupted) == 130
    assert capsys.readouterr().err == "sota: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ImportError, match="of its own"), interruptible(signal.SIGINT):
        raise ImportError("of its own")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_weakref_callback_is_not_lost(capsys, number: int) -> None:
    """Every import has one. Python swallows what is raised there, with a traceback."""

    def interrupted() -> int:
        with interruptible(signal.SIGTERM):
            watched = set[int]()
            reference = weakref.ref(watched, lambda _: signal.raise_signal(number))
            del watched
            assert reference() is None
            time.sleep(5)
        return 0

    assert guarded(interrupted) == 128 + number
    assert capsys.readouterr().err == "sota: interrupted\n"
