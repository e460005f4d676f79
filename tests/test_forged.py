"""Folders with correct checksums that we did not write."""

import copy
import functools
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sota_transformer.commands.transfer import run_export
from sota_transformer.data.merge import Merger
from sota_transformer.data.prepare import _existing
from sota_transformer.data.shards import TokenWindows
from sota_transformer.data.view import describe
from sota_transformer.durable import canonical_json, seal
from sota_transformer.errors import BAD_DATA, USAGE, SotaError
from sota_transformer.options import DataView, Export, Prepare
from sota_transformer.report import write_report
from sota_transformer.runtime import Runtime
from sota_transformer.training import changes, checkpoint
from sota_transformer.training.runlog import RunLog
from sota_transformer.training.start import train
from sota_transformer.training.trainer import Trainer
from tests.preparing import jsonl, run, texts
from tests.training_runs import MakeRun, change

VALUES = [None, True, -1, 0.5, 10**30, "", "../x", "/etc/hostname", [], [None], {}, {"x": {}}]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a value."""
    named = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else named:
        yield (*at, key)
        yield from places(item, (*at, key))


def mutants(good: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field removed, with an extra one inside, or of another type or size."""
    for at in places(good):
        for value in ["gone", "more", *VALUES]:
            forged = copy.deepcopy(good)
            inner: Any = forged
            for key in at[:-1]:
                inner = inner[key]
            if value == "gone":
                del inner[at[-1]]
            elif value == "more":
                if isinstance(inner[at[-1]], dict):
                    inner[at[-1]]["x"] = None
            else:
                inner[at[-1]] = value
            yield f"{at} {value}", forged


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A small prepared folder whose input held something that is not text."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(30)) + b"not json\n")
    run(tmp_path / "data", tmp_path / "a.jsonl", val_fraction=0.3, near_dedup=0.9)
    return tmp_path / "data"


def use(folder: Path) -> None:
    """Every way to read a prepared folder: view it, train on it, append to it."""
    describe(DataView(folder=folder, html=folder.parent / "page.html"))
    describe(DataView(folder=folder, show=0))
    describe(DataView(folder=folder, list_split="train"))
    for split in ("train", "val"):
        windows = TokenWindows(folder, split, 16)
        windows.read(0, windows.tokens)
    options = {"inputs": ("x",), "out": folder, "append": True, "near_dedup": 0.9}
    manifest = _existing(Prepare(**options))
    assert manifest is not None
    Merger(folder.parent / "new", 1, 1, 0.9).load_existing(folder, manifest)


def judge(folder: Path, what: str) -> bool:
    """Whether a forged folder is refused in one line; it may also be good enough."""
    try:
        use(folder)
    except SotaError as error:
        assert error.code in (BAD_DATA, USAGE), (what, error)  # USAGE: it needs another --exclude
        return True
    except Exception as error:
        error.add_note(what)
        raise
    return False


def test_a_forged_manifest_ends_in_one_line(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads((prepared / "manifest.json").read_text())
    use(prepared)
    refused = []
    for what, forged in mutants(good):
        (prepared / "manifest.json").write_bytes(canonical_json(seal(forged)))
        refused += [what] * judge(prepared, what)
    for field in ("files", "splits", "inputs", "rejects", "requests", "options", "fingerprint"):
        assert f"('{field}',) gone" in refused
    assert any("../x" in what for what in refused) and len(refused) > 400


def arrays(good: np.ndarray) -> Iterator[np.ndarray]:
    """Other types, shapes and values."""
    for dtype in ("<u2", "<u8", "<f8", ">u2", "?", "S4"):
        yield good.astype(dtype)
    yield from (good[:0], good[: len(good) // 2], good[::-1], good.reshape(1, -1), good.ravel()[0])
    yield from (np.concatenate([good, good]), np.full_like(good, np.iinfo(good.dtype).max))
    yield np.array([None])


@pytest.mark.parametrize(
    "name", ["train-00000.npy", "train-00000.ends.npy", "val-00000.hashes.npy"]
)
def test_a_forged_array_ends_in_one_line(
    prepared: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.loads((prepared / "manifest.json").read_text())
    contents = [b"", b"\x93NUMPY\1\0\x10\0" + b"{" * 16, b"PK\3\4" + b"x" * 200, b"\x80\x04K\1."]
    for array in arrays(np.load(prepared / name)):
        packed = io.BytesIO()
        np.save(packed, array)
        contents.append(packed.getvalue())
    refused = 0
    for content in contents:
        (prepared / name).write_bytes(content)
        good["files"][name] = {
            "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
        (prepared / "manifest.json").write_bytes(canonical_json(seal(good)))
        refused += judge(prepared, f"{content[:100]!r}")
    assert refused > 10


@pytest.mark.parametrize("name", ["manifest.json", "trainer.json"])
def test_a_forged_checkpoint_ends_in_one_line(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As if its hashes had been verified."""
    config = make_run(steps=2)
    train(config)
    path = checkpoint.path_of(config.run.out, 2) / name
    runtime = Runtime.detect(config.run, config.model.parameter_count)
    trainer = Trainer(config, runtime, RunLog(config.run.out, 2, silent=True))
    monkeypatch.setattr(checkpoint, "_tensors", functools.cache(checkpoint._tensors))
    refused = set()
    for what, forged in mutants(json.loads(path.read_text())):
        path.write_bytes(canonical_json(seal(forged) if name == "manifest.json" else forged))
        try:
            state = checkpoint.load(config.run.out, 2, verified=True)
            changes.of_data(config, state, trainer)
            changes.of_numerics(state, trainer)
            trainer.restore(state)
            assert trainer.judge.best is None or trainer.judge.advice()
        except SotaError as error:
            assert error.code == BAD_DATA, (what, error)
            refused.add(what)
        except Exception as error:
            error.add_note(what)
            raise
    some = {"('rows',) -1", "('guard', 'losses') {}", "('best',) {}"}
    assert refused >= (some if name == "trainer.json" else {"('data_files',) []", "('model',) -1"})


def test_odd_records_of_a_run_stop_no_command(make_run: MakeRun, tmp_path: Path) -> None:
    """Files without a checksum: run.json, and the lines of metrics.jsonl shown by a model card."""
    config = make_run(steps=1)
    train(config)
    out = config.run.out
    lines = (out / "metrics.jsonl").read_text()
    odd = {"step": 1, "val_loss": {}, "val_perplexity": "x"}
    (out / "metrics.jsonl").write_text(f"{lines}{json.dumps(odd)}\n")
    run_export(Export(run=out, out=tmp_path / "model", format="hf"))
    write_report(out, tmp_path / "report.html")
    for steps, content in enumerate((b'{"attempts": [NaN]}', b"[" * 100_000), 2):
        (out / "run.json").write_bytes(content)
        longer = make_run(steps=steps)
        train(change(longer, override="train.steps"))
        assert len(json.loads((out / "run.json").read_text())["attempts"]) == 1
