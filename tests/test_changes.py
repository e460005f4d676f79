"""The table of `training/changes.py`, row by row: refused, allowed with a flag, reported, free."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sota_transformer import cli
from sota_transformer.commands.evaluate import run_evaluate
from sota_transformer.commands.transfer import run_export, run_import
from sota_transformer.config import RunConfig
from sota_transformer.data.loader import BatchLoader
from sota_transformer.data.shards import TokenWindows
from sota_transformer.errors import BAD_DATA, USAGE, SotaError
from sota_transformer.options import Evaluate, Export, Import
from sota_transformer.report import write_report
from sota_transformer.runtime import Runtime
from sota_transformer.training import changes, checkpoint, trainer
from sota_transformer.training.runlog import RunLog
from sota_transformer.training.signals import Stopped
from sota_transformer.training.start import train
from sota_transformer.training.trainer import Trainer
from tests.preparing import run
from tests.training_runs import MakeRun, change, final_hash, logged, train_until


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `begun` keeps what it trained, for later tests."""
    return tmp_path_factory.mktemp("runs") / "died"


@pytest.fixture
def begun(make_run: MakeRun, died: Path) -> RunConfig:
    """A run of 12 steps that died after 7; its newest checkpoint is of step 6."""
    config = make_run(save_every_steps=3)
    if not died.exists():
        train_until(config, 7)
        config.run.out.rename(died)
    shutil.copytree(died, config.run.out)
    return config


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Step -> the global rows that it read."""
    seen, original = dict[int, list[int]](), BatchLoader.batch

    def batch(self, step):
        seen[step] = self.row_numbers(step).tolist()
        return original(self, step)

    monkeypatch.setattr(BatchLoader, "batch", batch)
    return seen


def refused(config: RunConfig, code: int, *words: str) -> None:
    before = (config.run.out / "config.json").read_bytes()
    with pytest.raises(SotaError) as caught:
        train(config)
    assert caught.value.code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value
    assert (config.run.out / "config.json").read_bytes() == before


def changed(config: RunConfig) -> Any:
    return json.loads((config.run.out / "run.json").read_text())["attempts"][-1]["changed"]


def test_another_model_is_refused_even_with_an_override(
    begun: RunConfig, make_run: MakeRun
) -> None:
    other = make_run(save_every_steps=3, layers=3, d_ff=32)
    refused(other, BAD_DATA, "model.layers was 2, is 3", "model.d_ff was 64, is 32")
    asked = change(other, override="model.layers,model.d_ff")
    refused(asked, BAD_DATA, "model.layers was 2, is 3")
    other = make_run(save_every_steps=3, matrix_rate=0.02)
    for asked in (other, change(other, override="optim.matrix_rate")):  # which would not help
        refused(asked, BAD_DATA, "AdamW", "optim.matrix_rate was 0.0, is 0.02", "another --out")


def test_before_the_first_checkpoint_everything_may_change(make_run: MakeRun, capsys) -> None:
    """As after a first start that ran out of memory; --exact forbids it."""
    train_until(make_run(), 2)
    other = make_run(layers=1, batch_rows=2, steps=2)
    with pytest.raises(SotaError, match=r"--exact: model\.layers was 2, is 1"):
        train(change(other, exact=True))
    train(other)
    assert changed(other) == [
        "model.layers was 2, is 1", "train.steps was 12, is 2", "train.batch_rows was 4, is 2",
    ]  # fmt: skip
    assert "changed: model.layers was 2, is 1" in capsys.readouterr().out
    lines = [(line["step"], line["tokens"]) for line in logged(other, "loss")]
    assert lines == [(1, 64), (2, 128)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run.seed", 5),
        ("model.seq_len", 16),
        ("data.windows", "best-fit"),
        ("train.batch_rows", 8),
        ("optim.learning_rate", 5e-4),
        ("optim.warmup_steps", 7),
        ("train.steps", 15),
    ],
)
def test_what_decides_the_result_needs_an_override(
    begun: RunConfig, make_run: MakeRun, rows: dict[int, list[int]], capsys, field, value
) -> None:
    other = make_run(save_every_steps=3, **{field.split(".")[1]: value})
    refused(other, USAGE, f"{field} was ", f", is {value}", f"--override {field}=")
    refused(change(other, override="optim.eps"), USAGE, field)
    train(change(other, override=f"optim.eps,{field}"))
    line, *rate = changed(other)
    assert line.startswith(f"{field} was ") and line.endswith(f", is {value}")
    now = {"optim.learning_rate": 2.75e-4, "train.steps": 6.89e-4}.get(field)
    assert rate == ([f"learning rate at step 6 was 5.50e-04, is {now:.2e}"] if now else [])
    assert f"changed: {line}" in capsys.readouterr().out
    assert rows[6][0] == 24  # where the run had been, for any batch size
    assert len(rows[6]) == other.train.batch_rows
    assert train(other) is None  # complete: the change is part of the run now
    refused(begun, USAGE, f"{field} was {value}")


@pytest.mark.parametrize("windows", ["stream", "best-fit"])
def test_reported_tokens_count_past_and_future_steps_at_their_batch_size(
    make_run: MakeRun, tmp_path: Path, capsys, windows: str
) -> None:
    """Not all steps at the current batch size, nor the earlier steps at it, nor padding."""
    begun = make_run(steps=6, windows=windows)
    train(begun)
    before = capsys.readouterr().out
    other = make_run(steps=2000, windows=windows, batch_rows=8)
    train_until(change(other, override="train.steps,train.batch_rows"), 8)
    cut = Trainer(other, Runtime.detect(other.run, 1), RunLog(tmp_path, 2000, silent=True))
    first = checkpoint.load(begun.run.out, 6).trainer["tokens"]
    now = logged(begun, "loss")[-1]["tokens"]
    expected, there = first + 1994 * cut.step_tokens, cut.windows.tokens
    said = capsys.readouterr().out
    assert (f"run: 6 steps x 128 tokens = {first:,} tokens" in before) == (windows == "stream")
    assert f"run: 2,000 steps, 6 with {first:,} tokens and 1,994 x {cut.step_tokens:,}" in said
    assert f" = {expected:,} tokens, " in said
    assert f"training tokens, {expected / there:.2f} epochs" in said
    assert f"note: {expected / there:.1f} epochs over the data" in said
    write_report(begun.run.out, tmp_path / "page.html")
    expected = now + 1993 * cut.step_tokens
    page = (tmp_path / "page.html").read_text()
    assert f"7 with {now:,} tokens and 1,993 x {cut.step_tokens:,} = {expected:,} tokens" in page
    run_export(Export(run=begun.run.out, out=tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Trained for 6 of 2,000 steps on {first:,} tokens, in windows of 32" in card


def test_returning_to_an_earlier_last_step_leaves_no_later_one(
    begun: RunConfig, make_run: MakeRun
) -> None:
    """`sota generate` and the next start would take the later one."""
    other = make_run(save_every_steps=3, steps=3)
    train(change(other, override="train.steps", resume="step:3"))
    assert checkpoint.steps(begun.run.out) == [3]
    assert train(other) is None


def test_nor_does_returning_to_a_step_validated_before(make_run: MakeRun) -> None:
    judged = {"save_every_steps": 3, "eval_every": 3, "sample_every": 3}
    config = make_run(steps=6, **judged)
    train(config)
    other = make_run(steps=3, **judged)
    train(change(other, override="train.steps", resume="step:3"))
    assert checkpoint.steps(config.run.out) == [3]


def test_the_command_line_overrides_a_field_and_its_value() -> None:
    override = ["--override", "steps=50", "--override=optim.learning-rate=0.01"]
    config = cli.resolve(["tiny", "--steps", "9", *override, "--exact"], "train")
    assert config.train.steps == 50 and config.optim.learning_rate == 0.01
    assert config.run.override == "train.steps,optim.learning_rate" and config.run.exact
    for value in (True, False):
        override = ["--override", f"data.document_mask={value}"]
        config = cli.resolve(["tiny", *override], "train")
        assert config.data.document_mask == value
        assert config.run.override == "data.document_mask"
    config = cli.resolve(
        ["tiny", "--override", "data.path=a=b", "--data-change", "refuse"], "train"
    )
    assert config.data.path == Path("a=b")  # as Spark names its folders
    with pytest.raises(SotaError, match="FIELD=VALUE"):
        cli.resolve(["tiny", "--override", "steps"], "train")
    with pytest.raises(SotaError, match="stepz"):
        cli.resolve(["tiny", "--override", "stepz=4"], "train")


@pytest.fixture
def other_data(tmp_path: Path) -> Path:
    from tests.conftest import pseudo_text

    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(pseudo_text(8, 120)):
        (folder / f"{i}.txt").write_text(text)
    run(tmp_path / "other", folder)
    return tmp_path / "other"


@pytest.mark.parametrize("how", ["continue", "restart-epoch"])
def test_other_data_is_refused_or_admitted_in_two_ways(
    begun: RunConfig, other_data: Path, rows: dict[int, list[int]], capsys, how
) -> None:
    windows = TokenWindows(other_data, "train", 32)
    old = TokenWindows(begun.data.path, "train", 32).fingerprint
    other = change(begun, path=other_data)
    refused(other, BAD_DATA, old[:12], windows.fingerprint[:12], "train-00000.npy", "--data-change")
    train(change(other, data_change=how))
    (line,) = changed(other)
    assert old[:12] in line and f"changed: {line}" in capsys.readouterr().out
    assert rows[6][0] == (24 if how == "continue" else len(windows))
    assert train(other) is None
    state = checkpoint.load(other.run.out, 12)
    assert state.manifest["data"] == windows.fingerprint
    assert state.trainer["rows"] == rows[11][-1] + 1


def test_a_loss_on_other_data_is_no_spike(begun: RunConfig, other_data: Path) -> None:
    """Compared with losses on the old data, each step would be skipped and the rate halved."""
    state = checkpoint.load(begun.run.out, 6)
    state.trainer["guard"]["losses"] = [1.0] * 64
    state.trainer["best"] = {"step": 6, "nats": 0.1, "tokens": 256}  # nor is it the lowest there
    checkpoint.save(begun.run.out, state)
    other = change(begun, path=other_data)
    train(change(other, data_change="continue"))
    state = checkpoint.load(begun.run.out, 12)
    assert state.trainer["updates"] == 12 and state.trainer["best"] is None


def test_evaluating_on_other_data_than_the_runs_is_reported(
    begun: RunConfig, other_data: Path, tmp_path: Path, capsys
) -> None:
    shutil.copytree(begun.data.path, tmp_path / "data")
    train(change(begun, path=tmp_path / "data"))
    for told in (False, True):
        run_evaluate(Evaluate(run=begun.run.out, tokens=40, device="cpu"))
        assert ("was not trained on" in capsys.readouterr().err) == told
        shutil.rmtree(tmp_path / "data")
        shutil.copytree(other_data, tmp_path / "data")


def test_only_the_model_of_an_imported_run_has_to_match(
    begun: RunConfig, make_run: MakeRun, other_data: Path, tmp_path: Path, monkeypatch
) -> None:
    """Imported from a run or its export, with or without data; its first step fixes the rest."""
    run_export(Export(run=begun.run.out, out=tmp_path / "model"))
    weights = checkpoint.load(begun.run.out, 6).model
    for source, data in ((tmp_path / "model", None), (begun.run.out, other_data)):
        out = tmp_path / f"of-{source.name}"
        with monkeypatch.context() as patch, pytest.raises(SotaError, match="the same command"):
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1e9, free=1000))
            run_import(Import(model=source, out=out, data=data))
        assert not out.exists()
        run_import(Import(model=source, out=out, data=data))
        imported = checkpoint.load(out, 0).model
        assert all(torch.equal(imported[name], tensor) for name, tensor in weights.items())
        refused(change(make_run(layers=3), out=out), BAD_DATA, "model.layers was 2, is 3")
        config = change(make_run(steps=2, batch_rows=2, learning_rate=1e-4), out=out)
        train(config)
        assert "train.batch_rows was 16, is 2" in changed(config)
        assert all("." in line.split()[0] for line in changed(config))  # fields: no rate leaps
        assert checkpoint.load(out, 2).manifest["data"] is not None
        other = change(make_run(steps=3, batch_rows=4, learning_rate=1e-4), out=out)
        refused(other, USAGE, "--override train.steps=VALUE --override train.batch_rows=VALUE")
    stopped = make_run("stopped")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Trainer, "_train_step", lambda _: signal.raise_signal(signal.SIGTERM))
        train(stopped)
    assert checkpoint.steps(stopped.run.out) == [0]  # whose weights follow from its seed
    refused(change(stopped, seed=7), USAGE, "run.seed was 1337, is 7")


def test_data_is_known_by_its_content(begun: RunConfig, make_run: MakeRun, tmp_path: Path) -> None:
    """Neither folder names nor the host or the clock are part of a run."""
    reference = make_run("reference", save_every_steps=3)
    train(reference)
    shutil.copytree(begun.data.path, tmp_path / "moved-data")
    shutil.move(begun.run.out, tmp_path / "moved-run")
    moved = change(begun, out=tmp_path / "moved-run", exact=True)
    moved = dataclasses.replace(
        moved, data=dataclasses.replace(moved.data, path=tmp_path / "moved-data")
    )
    train(moved)
    assert final_hash(moved) == final_hash(reference) and changed(moved) == []


def test_changes_that_may_cost_bit_equality_are_reported_and_exact_refuses_them(
    begun: RunConfig, make_run: MakeRun, monkeypatch, capsys
) -> None:
    said = ["micro_rows was 4, is 2", "dtype was float32, is bfloat16", "threads was 1, is 2"]
    said += ["sota was ", "processes was 1, is "]
    fields = {"save_every_steps": 3, "micro_rows": 2, "dtype": "bfloat16", "threads": 2}
    other = make_run(**fields)
    monkeypatch.setattr(trainer, "__version__", "99.0")
    original = trainer.Runtime.describe
    monkeypatch.setattr(
        trainer.Runtime, "describe", lambda self: original(self) | {"torch": "3.0", "world": 3}
    )
    refused(change(other, exact=True), USAGE, "--exact", "torch was ", *said)
    train_until(other, 7)  # bfloat16 is slow here
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("not bit-exact")]
    assert all(text in line for text in said) and changed(other) == []


@pytest.mark.parametrize(("rows", "said"), [(1, 0), (2, 0), (4, 0), (5, 1), (6, 1), (8, 1)])
def test_who_adds_two_micro_batches_costs_no_bit(make_run: MakeRun, rows: int, said: int) -> None:
    now = {"world": 2, "micro_rows": 2, "torch": "1"}
    config: Any = make_run(batch_rows=rows)
    trainer: Any = SimpleNamespace(config=config, micro_rows=2, numerics=lambda: now | {"new": 1})
    for before, others in (({}, 0), ({"torch": "0"}, 1), ({"micro_rows": 3}, 1)):
        state: Any = SimpleNamespace(manifest={"numerics": now | {"world": 1} | before})
        found = changes.of_numerics(state, trainer)
        assert len(found) == others + (said or "micro_rows" in before)
    assert changes.of_numerics(cast(Any, SimpleNamespace(manifest={})), trainer) == []


def test_exact_refuses_an_override_too(begun: RunConfig, make_run: MakeRun) -> None:
    other = make_run(save_every_steps=3, steps=15)
    refused(change(other, override="train.steps", exact=True), USAGE, "train.steps was 12")


def test_fields_without_effect_may_change(begun: RunConfig, make_run: MakeRun, capsys) -> None:
    free = {"log_every": 2, "eval_every": 1, "sample_every": 4, "keep_checkpoints": 3}
    free |= {"eval_tokens": 64, "save_every_steps": 2, "gradient_checkpointing": True}
    train(make_run(**free, exact=True))
    assert "not bit-exact" not in capsys.readouterr().out
    train(reference := make_run("reference"))
    assert final_hash(begun) == final_hash(reference)


def test_a_newer_format_is_refused(begun: RunConfig, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    refused(begun, BAD_DATA, "has format 1; this version reads 0")
