"""`sota report`: the page shows what is in the folder, and nothing in the folder can harm it."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from sota_transformer.cli import main
from sota_transformer.data.page import table
from sota_transformer.errors import BAD_DATA, LOCKED, NO_INPUT, SotaError
from sota_transformer.presets import PRESETS
from sota_transformer.report import Curve, _ticks, chart, write_report
from sota_transformer.training.runlog import RunLog, judged, read_config, read_metrics, samples_of

LAST = {"val_loss": 3.25, "val_error": 0.01, "val_perplexity": 25.79, "val_bits_per_byte": 1.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder after 100 of its 200 steps, with a bad step and a torn last line."""
    (tmp_path / "config.json").write_text(PRESETS["tiny"]().to_json())
    lines = [
        {"step": step, "loss": 10 - step / 20, "lr": 1e-3, "tokens_per_second": 512.0}
        | {"tokens": 512 * step}
        | {"gradient_norm": float("nan") if step == 50 else 1.0, "memory": 2e9}
        for step in range(10, 101, 10)
    ]
    lines += [{"step": 50, **LAST, "val_loss": 8.0}, {"step": 100, **LAST}]
    lines += [{"step": 50, "event": "skipped", "reason": "loss <b>nan</b>"}]
    lines += [{"step": 50, "sample": "earlier words\n"}]
    lines += [{"step": 100, "sample": "last words --- step by step <script>x</script>\n"}]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 110, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    start = {"from_step": 0, "started": "today", "machine": {"device": "cpu"}, "changed": []}
    (tmp_path / "run.json").write_text(json.dumps({"attempts": [start], "data": "f00d"}))
    return tmp_path


def test_the_page_has_the_figures_of_the_folder(run: Path) -> None:
    page = write_report(run, run / "report.html").read_text()
    assert "100 of 200: not complete" in page
    assert "3.2500 +- 0.0100 nats, perplexity 25.79, 1.5000 bits/byte" in page
    assert "512 tokens/s" in page and "2.00 GB" in page and "f00d" in page
    assert page.count("last words --- step by step") == 1 == page.count("earlier words")
    for anchor, tick in (("end", "5"), ("middle", "100")):  # of the axes
        assert f'text-anchor="{anchor}">{tick}</text>' in page
    assert page.count("<svg") == 4 and page.count("<circle") == 2
    # 100 steps of 512 tokens at 512 tokens/s
    assert "<td>time in training steps</td><td>1:40</td>" in page


def test_the_page_shows_the_current_branch(run: Path) -> None:
    """The run resumed from step 40 and is now at step 60 of its new branch."""
    lines = [{"step": 40, "event": "start"}]
    lines += [{"step": step, "loss": 0.5 + step} for step in (50, 60)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(run, run / "report.html").read_text()
    assert "60 of 200: not complete" in page and "60.5000 nats" in page
    assert "perplexity" not in page and "skipped" not in page  # at 50 and 100 of the other branch
    assert "Sample at step" not in page and "last words" not in page
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 50, "sample": "words of now"}) + "\n")
    page = write_report(run, run / "report.html").read_text()
    assert "words of now" in page and "earlier words" not in page


def test_nothing_is_loaded_and_nothing_of_the_run_is_markup(run: Path) -> None:
    page = write_report(run, run / "report.html").read_text()
    assert not re.search(r"https?:|<script|<b>|src=|@import|url\(", page)
    assert "&lt;script&gt;" in page and "nan" not in re.sub(r"&lt;b&gt;nan&lt;/b&gt;", "", page)


def test_a_folder_that_is_no_run_is_one_line(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == NO_INPUT
    (run / "run.json").write_text("{")
    assert main(["report", str(run)]) == BAD_DATA
    (run / "run.json").write_text('{"attempts": [1, {}], "data": [2]}')
    assert main(["report", str(run)]) == 0
    (run / "run.json").unlink()
    assert main(["report", str(run)]) == 0
    (run / "metrics.jsonl").write_text('{"step": 5, "val_loss": "x"}\n')
    assert main(["report", str(run)]) == 0
    (run / "metrics.jsonl").unlink()
    assert main(["report", str(run)]) == NO_INPUT
    said = capsys.readouterr()
    assert "report.html" in said.out and len(said.err.splitlines()) == 3


@pytest.mark.parametrize(
    "line",
    [
        f'{{"step": 1{"0" * 400}, "loss": 3.0}}',
        f'{{"step": 110, "loss": 1{"0" * 400}}}',
        f'{{"step": 110, "val_loss": 1{"0" * 400}, "val_perplexity": 1, "val_bits_per_byte": 1}}',
        "[" * 100_000,
        '{"step": 110, "event": "\\ud800"}',
        '{"step": 110, "sample": 3}',
        "[110]",
    ],
)
def test_a_damaged_line_costs_no_report(run: Path, line: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    assert main(["report", str(run)]) == 0


def test_an_unwritable_page_is_named_as_given(run: Path, capsys) -> None:
    (run / "folder").mkdir()
    for out in (run / "none" / "a.html", run / "folder"):
        assert main(["report", str(run), "--out", str(out)]) == LOCKED
        said = capsys.readouterr().err
        assert said.startswith(f"sota: cannot create {out}: ")
        assert said.endswith("; give --out a file in an existing folder\n")
    assert not list(run.glob(".tmp*"))


def test_a_page_is_written_to_a_device_without_replacing_it(run: Path, tmp_path: Path) -> None:
    """Otherwise root would lose /dev/null."""
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("page.html")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (link, pipe):
            write_report(run, path)
        assert os.read(reader, 15) == (tmp_path / "page.html").read_bytes()[:15] != b""
    finally:
        os.close(reader)
    assert link.is_symlink() and pipe.is_fifo()


def test_torch_is_not_loaded(run: Path) -> None:
    code = f"import sys; from sota_transformer.cli import main; main(['report', {str(run)!r}])\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (3.007, 10.8), (1, 100_000), (1e-5, 1e-3)])
def test_ticks_are_few_and_within(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)


@pytest.mark.parametrize("last", [1000, 300_000, 100_000_000, 2_000_000_000])
def test_labels_of_a_chart_are_whole_numbers_inside_it(last: int) -> None:
    """The step at the right edge, where every complete run ends, was cut: 2,00 for 2,000."""
    page = chart("Speed", [Curve([(last / 100, last / 100), (last, last / 10)])], unit="tokens")
    width = int(re.findall(r'viewBox="0 0 (\d+)', page)[0])
    labels = re.findall(r'<text x="([\d.]+)" [^>]*text-anchor="(\w+)">([^<]+)<', page)
    assert f"{last:,}" in [text for _, _, text in labels] and ">tokens</text>" in page
    for x, anchor, text in labels:
        half = 7 * len(text.replace(",", "")) / 2  # 11 px digits are about 7 wide
        assert float(x) - half * (2 if anchor == "end" else 1) >= 0
        assert anchor == "end" or float(x) + half <= width


def test_a_line_of_one_point_shows() -> None:
    page = chart("Loss", [Curve([(1, 2.0)], name="new"), Curve([(1, 3.0), (2, 2.5)], name="old")])
    assert page.count("<circle") == 1 and "new step 1: 2.0000" in page


def test_the_page_fits_a_phone(run: Path) -> None:
    page = write_report(run, run / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width' in page
    assert page.count('<div class="wide"><svg role="img"') == 4  # scrolled, not shrunk


def test_a_column_of_text_is_not_set_as_numbers() -> None:
    """On paper, the commands in Starts were cut off at the right edge."""
    page = table(("step", "command"), [("1", "sota"), ("2", "sota train tiny --data /" + "a" * 60)])
    assert '<th>step</th><th class="text">command</th>' in page
    assert '<td>1</td><td class="text">sota</td>' in page


def test_a_branch_that_was_never_saved_leaves_no_gap(run: Path) -> None:
    """Resumed from step 40 and killed before a save, then resumed from the original step 100."""
    path = run / "metrics.jsonl"
    here = [{"step": 40, "event": "saved"}, {"step": 70, "event": "saved"}]
    here += [{"step": 100, "event": "saved"}, {"step": 100, "sample": "a\n--- step 7\nb"}]
    left = [{"step": 40, "event": "start"}, {"step": 50, "loss": 99.0}, {"step": 50, **LAST}]
    after = [{"step": 100, "event": "start"}, {"step": 110, "loss": 4.5}]
    with path.open("a") as file:
        file.write("\n" + "".join(json.dumps(line) + "\n" for line in here + left + after))
    lines = read_metrics(run)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses == {step: 10 - step / 20 for step in range(10, 101, 10)} | {110: 4.5}
    page = write_report(run, run / "report.html").read_text()
    assert "step 50: 8.0000" in page and "110 of 200" in page and "Sample at step 100" in page
    # The branch again, this time saved at 60: now 70 and 100 are gone, 40 is of the first start.
    saved = [*left, {"step": 60, "event": "saved"}, {"step": 60, "event": "start"}]
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in saved))
    losses = {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}
    assert losses == {10: 9.5, 20: 9.0, 30: 8.5, 40: 8.0, 50: 99.0}


@pytest.mark.parametrize("seed", range(4))
def test_only_lines_that_led_to_the_model_count(tmp_path: Path, seed: int) -> None:
    """Random runs that save, are killed and resume from any checkpoint, tracked start by start.

    A save deletes later checkpoints, and a start without any starts from scratch.
    """
    random, acts = Random(seed), ["val_loss", "sample", "event", "save", "start", "lost"]
    for length in range(2, 80):
        lines: list[dict[str, Any]] = []
        starts: list[tuple[int | None, int, dict[tuple[int, str], int]]] = []
        disk: dict[int, int] = {}  # step of a checkpoint -> the start that wrote it
        step = 0
        for n in range(length):
            act = random.choice(["loss"] * 5 + acts)
            if not starts or act == "start":
                step = random.choice(list(disk)) if disk else 0
                starts.append((disk.get(step), step, {}))
                lines.append({"step": step, "event": "start"})
            elif act == "lost" and step > max(disk, default=0):  # killed before reporting its save
                starts.append((len(starts) - 1, step, {}))
                lines.append({"step": step, "event": "start"})
            elif act == "save" and step:
                disk = {at: who for at, who in disk.items() if at < step}
                disk[step] = len(starts) - 1
                lines.append({"step": step, "event": "saved"})
            else:
                kind = act if step and act not in ("save", "lost") else "loss"
                step += kind == "loss"
                value = random.choice("ab") if kind == "event" else 1
                starts[-1][2][step, f"{kind} {value}"] = n
                lines.append({"step": step, kind: value, "n": n})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        expected: dict[tuple[int, str], int] = {}
        at, until = len(starts) - 1, length
        while at is not None:
            before, begun, made = starts[at]
            expected = {key: n for key, n in made.items() if key[0] <= until} | expected
            at, until = before, min(until, begun)
        found = read_metrics(tmp_path)
        assert sorted(line["n"] for line in found) == sorted(expected.values()), text
        assert [line["step"] for line in found] == sorted(key[0] for key in expected)


def test_lines_abandoned_by_going_back_within_a_start_do_not_count(tmp_path: Path) -> None:
    """From step 8 back to 4, saved at 6, and killed: no model includes steps 7 and 8."""
    lines: list[dict[str, Any]] = [{"step": 0, "event": "start"}]
    lines += [{"step": step, "loss": 1.0} for step in range(1, 9)]
    lines += [{"step": 8, "event": what} for what in ("saved", "start")]
    lines += [{"step": 9, "loss": 2.0}, {"step": 4, "event": "returned"}]
    lines += [{"step": step, "loss": 3.0} for step in (5, 6)]
    lines += [{"step": 6, "event": what} for what in ("saved", "start")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == sorted(steps) and len(steps) == 7
    found = [(line["step"], line["loss"]) for line in read_metrics(tmp_path) if "loss" in line]
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 3.0), (6, 3.0)]


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"3", b'{"model": 3}', b"\xff", None])
def test_a_damaged_configuration_is_bad_data(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SotaError) as caught:
        read_config(tmp_path)
    assert caught.value.code == BAD_DATA and str(path) in str(caught.value)


def panel(log: RunLog) -> str:
    """What the terminal has shown since the last call."""
    file = log.console.file
    assert isinstance(file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    file.seek(0)
    file.truncate()
    return shown


def test_the_panel_of_a_resumed_run_starts_where_it_is(tmp_path: Path, monkeypatch) -> None:
    """It shows the latest of each kind, and plain lines continue where it ends."""
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal is not redrawn
    with RunLog(tmp_path, 100) as log:
        log.console = Console(file=(file := io.StringIO()), force_terminal=True, width=80)
        log.begin_live(73)
        log.end_live()
        shown = panel(log)
        assert "73/100" in shown and " 0/100" not in shown
        log.begin_live(73)
        values = {"step": 80, "loss": 2.71828, "lr": 3e-4, "tokens_per_second": 1234.5}
        values |= {"memory": 2.5e9, "dropout": 0.125, "seconds_left": 3723.9}
        log.validation({"step": 80, "val_tokens": 99, **LAST})
        log.step(values)
        until = time.monotonic() + 10
        while "80/100" not in shown and time.monotonic() < until:  # drawn four times a second
            time.sleep(0.05)
            shown = file.getvalue()
        assert "80/100" in shown
        log.sample(80, "".join(f"line {n};\n" for n in range(20)))
        log.end_live()
        shown = panel(log)
        told = ["80/100", "2.7183", "1,234", "2.50 GB", "3.00e-04", "0.125", "1:02:03"]
        told += ["3.2500", "25.79", "1.5000", "line 0;", "line 11;"]
        assert all(text in shown for text in told) and "line 12;" not in shown
        assert "step     80/100" not in shown and not re.search(r"[\r\n]line 0;", shown)
        log.step(values | {"step": 81, "seconds_left": 59.9})
        assert "81/100  loss 2.7183" in (line := panel(log)) and "0:59" in line
        log.sample(81, "at last")
        assert "at last" in panel(log)
    assert [line["step"] for line in read_metrics(tmp_path)] == [80, 80, 80, 81, 81]


@pytest.mark.parametrize("torn", [True, False])
def test_a_line_after_half_a_line_counts(tmp_path: Path, torn: bool) -> None:
    """As left by a killed process; otherwise there is no empty line."""
    before = b'{"step": 1, "loss": 3.0}\n' + b'{"step": 2, "sample": "caf\xc3' * torn
    for start in (b"", before):
        (tmp_path / "metrics.jsonl").write_bytes(start)
        for _ in range(2):
            with RunLog(tmp_path, 10, silent=False) as log:
                log.console.quiet = True
                log.event({"step": 3, "event": "x"}, "")
        lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
        assert lines[:-2] == start.splitlines()
        assert [json.loads(line)["step"] for line in lines[-2:]] == [3, 3]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
    with RunLog(tmp_path, 10, silent=True) as log:
        log.event({"step": 4, "event": "x"}, "")
        log.sample(4, "text")
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == lines
    assert not (tmp_path / "samples.txt").exists()


def test_validations_and_samples_belong_to_their_step(run: Path) -> None:
    found = [judged(run, step) for step in (50, 60, 100)]
    assert found == [(True, True), (False, False), (True, True)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 110, "val_loss": 3.0}\n{"step": 120, "sample": "x"}\n')
    assert [judged(run, step) for step in (110, 120)] == [(True, False), (False, True)]


def test_a_sample_that_looks_like_a_heading_is_one_sample(tmp_path: Path) -> None:
    text = "a\n--- step 9\nb\n\n--- step 2\n"
    with RunLog(tmp_path, 10, silent=False) as log:
        log.console.quiet = True
        log.sample(3, text)
        log.sample(5, "c")
    assert samples_of(read_metrics(tmp_path)) == {3: text.strip(), 5: "c"}
