"""`sota report RUN RUN...`: runs shown together are comparable, or the page says they are not."""

import json
import math
import re
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest

from sota_transformer.cli import main
from sota_transformer.compare import write_comparison
from sota_transformer.config import RunConfig
from sota_transformer.errors import BAD_DATA, LOCKED, NO_INPUT, USAGE
from sota_transformer.presets import PRESETS


def write_run(folder: Path, last: float, done: int = 200, **fields: Any) -> Path:
    """A `tiny` run of `done` steps with validation every 50; `fields` replace its defaults."""
    data, val_tokens = fields.pop("data", "f00d" * 16), fields.pop("val_tokens", 6400)
    values = json.loads(PRESETS["tiny"]().to_json())
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    values["run"]["out"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = RunConfig.from_json(json.dumps(values))
    (folder / "config.json").write_text(config.to_json())
    rows = config.train.batch_rows * config.model.seq_len
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 9 - step / 100, "tokens": step * rows}
        | {"tokens_per_second": float(step**2), "memory": 2e9}
        for step in range(20, done + 1, 20)
    ]
    lines += [
        judgement(step, last + (done - step) / 50, val_tokens) for step in range(50, done + 1, 50)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"attempts": [{"changed": []}], "data": data}))
    return folder


def judgement(step: int, nats: float, tokens: int = 6400) -> dict[str, Any]:
    figures = {"val_perplexity": math.exp(nats), "val_bits_per_byte": nats / 2}
    return {"step": step, "val_loss": nats, "val_error": 0.01, "val_tokens": tokens} | figures


def cells(text: str) -> dict[str, list[str]]:
    """The rows of a terminal's tables, by their first cell."""
    rows = (re.split(r" {2,}", line) for line in text.splitlines())
    return {row[0]: row[1:] for row in rows if len(row) > 1}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    hot = write_run(tmp_path / "hot", 3.5, optim__learning_rate=0.003, model__qk_norm=True)
    return [write_run(tmp_path / "cold", 4.0, train__log_every=20), hot]


def test_the_table_has_the_figures_and_only_the_options_that_differ(two: list[Path]) -> None:
    with (two[0] / "metrics.jsonl").open("a") as file:  # overfitted, and last validated elsewhere
        file.write(
            json.dumps(judgement(150, 3.75)) + "\n" + json.dumps(judgement(100, 1, 64)) + "\n"
        )
    for run, device in zip(two, ("cpu", "mps"), strict=True):
        starts = [{"machine": {"device": "gone"}}, {"machine": {"device": device, "threads": 2}}]
        (run / "run.json").write_text(json.dumps({"attempts": starts, "data": "f00d" * 16}))
    out = two[0].parent / "page.html"
    rows = cells(write_comparison(two, out))
    assert rows["machine: device"] == ["cpu", "mps"] and "machine: threads" not in rows
    assert rows["parameters"] == ["3,317,184", "3,317,312"]  # two layers, two heads of 32 each
    assert rows["steps"] == ["200 of 200"] * 2 and rows["tokens trained on"] == ["102,400"] * 2
    assert rows["last validation, nats"] == ["4.0000 +- 0.0100", "3.5000 +- 0.0100"]
    assert rows["last perplexity"] == ["54.60", "33.12"]
    assert rows["last bits/byte"] == ["2.0000", "1.7500"]
    assert rows["best validation, nats"] == ["3.7500 +- 0.0100", "3.5000 +- 0.0100"]
    assert rows["best at step"] == ["150", "200"]
    assert rows["tokens/s, median"] == ["12,200", "12,200"]
    assert rows["peak memory"] == ["2.00 GB"] * 2
    options = {name: row for name, row in rows.items() if name.startswith("--")}
    assert options == {
        "--model.qk-norm": ["no", "yes"],
        "--optim.learning-rate": ["0.001", "0.003"],
        "--train.log-every": ["20", "10"],
    }
    page = out.read_text()
    for name, row in rows.items():
        inner = "".join(f"<t.>{re.escape(escape(cell))}</t.>" for cell in (name, *row))
        assert re.search(inner, page), name


def test_seeds_are_one_line_with_mean_spread_and_error(tmp_path: Path) -> None:
    """By hand: 4.0 and 4.2 have 4.1 and 0.1414; 3.0, 3.1 and 3.5 have 3.2 and 0.2646."""
    runs = [
        write_run(tmp_path / f"{rate}-{seed}", last, run__seed=seed, optim__learning_rate=rate)
        for rate, seed, last in [
            (0.001, 1, 4.0), (0.003, 1, 3.0), (0.001, 2, 4.2), (0.003, 2, 3.1), (0.003, 3, 3.5)
        ]
    ]  # fmt: skip
    page = tmp_path / "page.html"
    rows = cells(
        write_comparison(
            [*runs, write_run(tmp_path / "one", 3.0, run__seed=9, optim__eps=1e-6)], page
        )
    )
    assert rows["0.001-1, 0.001-2"] == ["1, 2", "200", "4.1000", "0.1414", "-", "-", "-"]
    error = math.sqrt(0.02 / 2 + 0.07 / 3)
    found = ["1, 2, 3", "200", "3.2000", "0.2646", "-0.9000", f"{error:.4f}", "<= 0.0200"]
    assert rows["0.003-1, 0.003-2, 0.003-3"] == found
    assert rows["one"] == ["9", "200", "3.0000", "-", "-1.1000", "-", "<= 0.0200"]
    bands = re.findall(r'<polygon points="([^"]+)"', page.read_text())
    assert len(bands) == 2 and all(len(set(band.split())) == 8 for band in bands)  # with an area


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"data": "beef" * 16},
            "data (text, split or tokenizer): f00df00df00d (a); beefbeefbeef (b)",
        ),
        ({"data": None}, "data (text, split or tokenizer): f00df00df00d (a); unknown (b)"),
        ({"val_tokens": 640}, "validation tokens: 6400 (a); 640 (b)"),
        ({"model__seq_len": 128}, "tokens per window (--model.seq-len): 64 (a); 128 (b)"),
        ({"data__document_mask": True}, "attention within documents only: no (a); yes (b)"),
    ],
)
def test_incomparable_runs_are_reported(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    first, page = write_run(tmp_path / "a", 4.0), tmp_path / "page.html"
    text = write_comparison([first, write_run(tmp_path / "b", 3.5, run__seed=2, **fields)], page)
    assert f"NOT COMPARABLE in validation: {said}\n" in text
    assert "NOT COMPARABLE" in page.read_text()
    assert cells(text)["b"] == ["2", "200", "3.5000", "-", "not comparable", "-", "-"]
    text = write_comparison([first, write_run(tmp_path / "c", 3.5, run__seed=2)], page)
    assert "NOT COMPARABLE" not in text + page.read_text()


def test_data_named_by_neither_run_may_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 4.0, data=None) for name in "ab"]
    text = write_comparison(runs, tmp_path / "page.html")
    assert "unknown (a, b)" in text
    assert cells(text)["b"][4] == "not comparable"


def test_an_unfinished_run_is_not_compared_with_a_finished_one(tmp_path: Path) -> None:
    done, page = write_run(tmp_path / "done", 4.0), tmp_path / "page.html"
    seed, other = ({"run__seed": 2}, {"optim__eps": 1e-6})
    half = [write_run(tmp_path / f"half{i}", 5.0, 100, **f) for i, f in enumerate((seed, other))]
    text = write_comparison([done, *half], page)
    assert cells(text)["done"][:3] == ["1337", "200", "4.0000"]
    assert cells(text)["half0"][4] == cells(text)["half1"][4] == "not complete"
    assert text.count("is not complete: its schedule") == 2
    assert cells(write_comparison(half, page))["half1"][4] == "+0.0000"  # both equally far


def test_a_copy_of_a_run_is_not_another_seed(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / n, 4.0, run__seed=s) for n, s in (("a", 1), ("b", 2), ("c", 1))]
    text = write_comparison(runs, tmp_path / "page.html")
    assert cells(text)["a, b"][0] == "1, 2" and "c repeats a with the same seed" in text


def test_a_change_of_data_starts_a_new_curve_and_is_reported(two: list[Path]) -> None:
    record = json.loads((two[0] / "run.json").read_text())
    changed = ["data fingerprint was a, is b", "optim.eps was 1, is 2"]
    record["attempts"].append({"from_step": 150, "changed": changed})
    (two[0] / "run.json").write_text(json.dumps(record))
    with (two[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(judgement(150, 1.0)) + "\n")
    text = write_comparison(two, two[0] / "page.html")
    assert cells(text)["best validation, nats"][0] == "4.0000 +- 0.0100"
    said = f"cold was changed during training, at step 150: {', '.join(changed)}"
    assert said in text and f"<p>{said}</p>" in (two[0] / "page.html").read_text()
    record["attempts"].append({"from_step": 200, "changed": changed})  # and no validation since
    (two[0] / "run.json").write_text(json.dumps(record))
    text = write_comparison(two, two[0] / "page.html")
    assert cells(text)["last validation, nats"] == ["-", "3.5000 +- 0.0100"]
    assert "cold has no validation yet." in text and "cold" not in cells(text)
    record["attempts"].append({"from_step": 100, "changed": []})  # back to before both
    record["attempts"].insert(1, {"from_step": 0, "changed": ["optim.eps was 2, is 1"]})
    (two[0] / "run.json").write_text(json.dumps(record))
    text = write_comparison(two, two[0] / "page.html")
    assert cells(text)["best validation, nats"][0] == "1.0000 +- 0.0100"
    assert "at step 0" not in text and "at step 100" not in text  # the second changed nothing


def test_curves_are_over_tokens_and_distinguishable(tmp_path: Path) -> None:
    """Step 50 is between two logged ones: 50 x 8 x 64 tokens, twice that for twice the batch."""
    runs = [write_run(tmp_path / f"r{i}", 4.0, optim__eps=1 / (i + 2)) for i in range(9)]
    runs.append(write_run(tmp_path / "big", 3.0, train__batch_rows=16))
    with (runs[0] / "metrics.jsonl").open("a") as file:  # would flatten the curves
        file.write(json.dumps(judgement(5, 11.0)) + "\n")
    write_comparison(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<title>r0 tokens 25,600: 7.0000</title>" in page
    assert "<title>big tokens 51,200: 6.0000</title>" in page
    assert "11.0000" not in page
    legends = re.findall(r'<p class="legend">(.*?)</p>', page)
    assert len(legends) == 2 == page.count('<svg role="img"')
    looks = re.findall(r'style="([^"]*)"', legends[0])
    assert len(set(looks)) == 10 and all("stroke-dasharray" in look for look in looks)
    for look in looks:  # in both legends and on the lines of both charts
        assert page.count(look) == 4


def test_tokens_between_logged_steps_are_those_of_that_time(tmp_path: Path) -> None:
    """The batch was doubled since: step 50 still had 50 x 8 x 64 tokens, not twice as many."""
    runs = [write_run(tmp_path / name, 4.0, run__seed=ord(name)) for name in "ab"]
    for run in runs:
        config = json.loads((run / "config.json").read_text())
        config["train"]["batch_rows"] = 16
        (run / "config.json").write_text(json.dumps(config))
    write_comparison(runs, tmp_path / "page.html")
    assert "<title>a tokens 25,600: 7.0000</title>" in (tmp_path / "page.html").read_text()


def test_what_counts_is_the_last_validation(tmp_path: Path) -> None:
    """An earlier one, over fewer tokens, makes no run incomparable."""
    first = write_run(tmp_path / "a", 4.0)
    lines = (first / "metrics.jsonl").read_text().splitlines(keepends=True)
    early = json.dumps(judgement(50, 7.0, 640)) + "\n"
    at = next(n for n, line in enumerate(lines) if json.loads(line).get("val_loss") == 7.0)
    (first / "metrics.jsonl").write_text("".join([*lines[:at], early, *lines[at + 1 :]]))
    text = write_comparison([first, write_run(tmp_path / "b", 3.5, run__seed=2)], tmp_path / "page")
    assert "NOT COMPARABLE" not in text
    assert cells(text)["a, b"][1:3] == ["200", "3.7500"]


def test_seeds_never_validated_at_the_same_step_are_lines_of_their_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 4.0, run__seed=ord(name)) for name in "ab"]
    for run, only in zip(runs, (200, 150), strict=True):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        kept = [line for line in lines if line.get("val_loss") is None or line["step"] == only]
        kept.sort(key=lambda line: line["step"])
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    rows = cells(write_comparison(runs, tmp_path / "page.html"))
    assert rows["a"][1:3] == ["200", "4.0000"] and rows["b"][1:3] == ["150", "5.0000"]


def test_bad_input_is_one_line(two: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    cold, hot = map(str, two)
    (tmp_path / "link").symlink_to(cold)
    (tmp_path / "loop").symlink_to("loop")
    silent = write_run(tmp_path / "silent", 4.0)
    (silent / "metrics.jsonl").write_text('{"step": 5, "lo')
    damaged = write_run(tmp_path / "damaged", 4.0)
    (damaged / "run.json").write_text("{")
    out = str(tmp_path / "none" / "page.html")
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "model.gguf").touch()
    (exported / "q4.gguf").touch()
    for arguments, code, said in [
        ([cold, str(exported)], NO_INPUT, "exported is a GGUF export"),
        ([cold, f"{exported}/q4.gguf"], NO_INPUT, "q4.gguf is a GGUF export"),
        ([cold, f"{exported}/none.gguf"], NO_INPUT, "none.gguf does not exist"),
        ([cold, str(tmp_path / "nothing")], NO_INPUT, "nothing does not exist"),
        ([cold, str(tmp_path)], NO_INPUT, "is not a run (no config.json)"),
        ([cold, f"{cold}/config.json"], NO_INPUT, "is a file, not a run"),
        ([cold, hot, f"{cold}/"], USAGE, "cold is given twice"),
        ([cold, str(tmp_path / "link")], USAGE, "cold is given twice"),
        ([cold, str(tmp_path / "loop")], BAD_DATA, "loop"),
        ([cold, str(silent)], NO_INPUT, "silent has logged nothing yet"),
        ([cold, str(damaged)], BAD_DATA, "run.json"),
        ([cold, hot, "--out", out], LOCKED, out),
    ]:
        assert main(["report", *arguments]) == code, said
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and said in printed.err and not printed.out
    assert not Path("comparison.html").exists()


def test_runs_without_validation_are_reported_as_such(two: list[Path], monkeypatch, capsys) -> None:
    for run, charts in zip(two, (2, 1), strict=True):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(line for line in lines if "val_" not in line))
        monkeypatch.chdir(run.parent)
        assert main(["report", "cold", "hot"]) == 0
        text = capsys.readouterr().out
        assert f"{run.name} has no validation yet." in text and "NOT COMPARABLE" not in text
        assert text.endswith("wrote comparison.html\n")
        page = Path("comparison.html").read_text()
        assert page.count('<svg role="img"') == charts
        assert page.count("Last validation") == charts - 1
        assert len(re.findall("</svg> cold<", page)) == 1  # in the legend of training alone
    assert cells(text)["best validation, nats"] == ["-", "-"] and "spread" not in text


@pytest.mark.parametrize(
    "line",
    [
        {"step": -5, "loss": 3.0, "tokens": 4, "val_loss": 2.0},
        {"step": 0, "val_loss": 2.0, "tokens": 7},
        {"step": 40, "tokens": 7, "sample": "x"},
        judgement(200, math.nan),
        {**judgement(200, 4.0), "val_error": "x", "val_tokens": [1, {}]},
        {"step": 10**18, "tokens": 1e18, "loss": -1e308, "tokens_per_second": math.inf},
    ],
)
def test_a_damaged_line_costs_no_comparison(two: list[Path], line: dict[str, Any]) -> None:
    with (two[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    text = write_comparison(two, two[0] / "page.html")
    assert cells(text)["last validation, nats"][1] == "3.5000 +- 0.0100"
    (two[0] / "metrics.jsonl").write_text(json.dumps(judgement(-5, 4.0)) + "\n" + json.dumps(line))
    write_comparison(two, two[0] / "page.html")


def test_a_seed_that_diverged_is_shown_as_such(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{i}", 4.0, run__seed=i) for i in range(2)]
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(judgement(step, math.nan)) + "\n" for step in (50, 200))
    rows = cells(write_comparison(runs, tmp_path / "page.html"))
    assert rows["last validation, nats"][1] == "nan +- 0.0100"
    assert (
        rows["best validation, nats"][1] == "5.0000 +- 0.0100" and rows["best at step"][1] == "150"
    )
    assert rows["r0, r1"][2:4] == ["nan", "-"]


def test_a_single_window_has_no_error(two: list[Path]) -> None:
    with (two[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(judgement(200, 3.5) | {"val_error": None}) + "\n")
    rows = cells(write_comparison(two, two[0] / "page.html"))
    assert rows["last validation, nats"][1] == "3.5000"
    assert rows["hot"][4:] == ["-0.5000", "-", "-"]


def test_names_are_distinguishable_and_never_markup(tmp_path: Path, two: list[Path]) -> None:
    evil = '<b onload="x">&\x1b[31m'
    places = ["a/x/run", "b/x/run", evil]
    runs = [write_run(tmp_path / place, 4.0, data=place) for place in places]
    text = write_comparison(runs, tmp_path / "page.html")
    assert cells(text)["a/x/run"] and cells(text)["b/x/run"] and "\x1b" not in text
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|<script|<b |src=|@import|url\(", page)
    assert page.count("&lt;b onload=&quot;x&quot;&gt;&amp;") > 5


def test_the_table_fits_the_terminal(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = [write_run(tmp_path / f"r{i}", 4.0, optim__eps=1 / (i + 2)) for i in range(7)]
    tables = write_comparison(runs, tmp_path / "page.html").split("\n\n+- after")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert tables.count("tokens trained on") == 3
    assert set(re.findall(r"\br\d\b", tables)) == {f"r{i}" for i in range(7)}


def test_torch_is_not_loaded(two: list[Path]) -> None:
    words = ["report", *map(str, two), "--out", str(two[0] / "page.html")]
    code = f"import sys; from sota_transformer.cli import main; assert not main({words!r})\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
