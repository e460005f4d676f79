"""`sota evaluate RUN --against RUN`: two models on the same text."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sota_transformer.commands.evaluate import run_evaluate
from sota_transformer.commands.transfer import run_export
from sota_transformer.data.shards import TokenWindows
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.inference.perplexity import sequence_sums
from sota_transformer.options import Evaluate, Export
from tests.inference_models import FULL, small_model, write_run

ONE = small_model(FULL)
OTHER = copy.deepcopy(ONE)
with torch.no_grad():
    OTHER.embedding.weight.mul_(0.97)  # a slightly less confident model
WINDOWS = 32
TOKENS = WINDOWS * FULL.seq_len


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "one", ONE, data), write_run(folder / "other", OTHER, data)


def judged(capsys: pytest.CaptureFixture[str], run: Path, **options: Any) -> dict[str, Any]:
    options = {"tokens": TOKENS, "json": True, "device": "cpu"} | options
    assert run_evaluate(Evaluate(run=run, **options)) == 0
    return json.loads(capsys.readouterr().out)


def table(capsys: pytest.CaptureFixture[str], run: Path, **options: Any) -> str:
    options = {"tokens": TOKENS, "device": "cpu"} | options
    assert run_evaluate(Evaluate(run=run, **options)) == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_the_error_is_that_of_the_differences(runs, data: Path, capsys) -> None:
    one, other = runs
    both, alone = judged(capsys, one, against=other), judged(capsys, other)
    found = both["against"]
    assert all(found[name] == alone[name] for name in ("nats", "error", "tokens", "bits_per_byte"))
    assert found["difference"] == pytest.approx(both["nats"] - alone["nats"], abs=1e-9)
    windows = TokenWindows(data, "val", FULL.seq_len)
    length = FULL.seq_len
    whole = [windows.read(at, at + length + 1) for at in range(0, TOKENS, length)]
    sums = [sequence_sums(model, whole, Tokenizer().token_bytes) for model in (ONE, OTHER)]
    means = (sums[0][:, 0] - sums[1][:, 0]) / length
    by_hand = means.std(ddof=1) / math.sqrt(WINDOWS)
    assert found["paired_error"] == pytest.approx(by_hand)
    assert found["paired_error"] < 0.2 * min(both["error"], alone["error"])


def test_the_table_names_a_better_model_only_if_the_text_shows_it(runs, capsys) -> None:
    one, other = runs
    assert table(capsys, other, against=one).endswith("better on this text")
    assert table(capsys, one, against=other).endswith("worse on this text")
    assert table(capsys, one, against=one).endswith("no significant difference on this text")
    assert table(capsys, one, against=other, tokens=FULL.seq_len).split() == [
        "difference",
        f"{judged(capsys, one, against=other, tokens=FULL.seq_len)['against']['difference']:+.4f}",
    ]


def test_an_export_can_be_compared_with_a_run_and_lists_what_it_does_not_know(
    runs, tmp_path: Path, capsys
) -> None:
    one, other = runs
    assert run_export(Export(run=other, out=tmp_path / "export")) == 0
    capsys.readouterr()
    by_run = judged(capsys, one, against=other)["against"]
    options: dict[str, Any] = {"tokens": TOKENS, "json": True}
    assert run_evaluate(Evaluate(run=one, against=tmp_path / "export", **options)) == 0
    printed = capsys.readouterr()
    by_export = json.loads(printed.out)["against"]
    assert by_export["difference"] == pytest.approx(by_run["difference"], abs=1e-6)
    assert "the training data of" in printed.err
    with pytest.raises(SotaError, match="no-such"):
        run_evaluate(Evaluate(run=one, against=tmp_path / "no-such"))


def test_data_that_has_moved_is_found_by_correcting_its_path(
    runs, data: Path, tmp_path: Path, capsys
) -> None:
    """A run copied to a machine where its data lies elsewhere."""
    run, gone = write_run(tmp_path / "run", ONE, data), tmp_path / "gone"
    recorded = (run / "config.json").read_text()
    (run / "config.json").write_text(recorded.replace(str(data), str(gone)))
    with pytest.raises(SotaError, match=r"gone, the run's data, .* correct data\.path in .*/run/"):
        judged(capsys, run)
    (run / "config.json").write_text(recorded)
    assert judged(capsys, run)["nats"] == judged(capsys, runs[0])["nats"]


def test_a_run_is_not_taken_for_raw_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(SotaError, match="give a folder created by `sota prepare`"):
        TokenWindows(tmp_path, "train", 8)
