"""Small numbers of all tests of the real commands; `python -m tests.chaos` runs more.

They have the marker `chaos`; the data and checkpoint fuzzers also have a quick sample.
"""

import dataclasses
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sota_transformer.config import RunConfig
from sota_transformer.errors import BAD_DATA, SotaError
from sota_transformer.model.transformer import Transformer
from sota_transformer.training import checkpoint
from sota_transformer.training.runlog import read_config

from . import (
    cuts,
    documents,
    faults,
    folders,
    inputs,
    journeys,
    judging,
    launches,
    policies,
    ranks,
    reading,
    servings,
    soak,
    stops,
    windows,
)
from .commands import (
    Bench,
    Zygote,
    contents,
    corpus,
    fresh,
    make_bench,
    model_of,
    prepare_arguments,
    sota,
    train_arguments,
)

needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


def test_damaged_checkpoints_are_skipped_by_name(tmp_path: Path) -> None:
    result = reading.fuzz_checkpoints(tmp_path, 250, seed=3)
    assert result.bad == [] and result.cases >= 250


def test_damaged_data_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    result = reading.fuzz_data(tmp_path / "data", 500, seed=3)
    assert result.bad == [] and result.cases >= 500


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def zygote(bench: Bench) -> Iterator[Zygote]:
    with Zygote(bench.root) as zygote:
        yield zygote


@pytest.mark.chaos
def test_kills_in_training(bench: Bench, zygote: Zygote) -> None:
    result = soak.soak_train(bench, zygote, 12, seed=4)
    assert result.wrong == [] and result.kills >= 12


@pytest.mark.chaos
def test_kills_in_preparation(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "texts", 2, 20_000)
    assert sota(prepare_arguments(texts, tmp_path / "reference", 1), tmp_path).code == 0
    result = soak.soak_prepare(texts, tmp_path / "reference", tmp_path, 12, seed=4)
    assert result.wrong == [] and result.kills >= 12


@pytest.mark.chaos
def test_sigterm(bench: Bench, zygote: Zygote) -> None:
    result = stops.stop_train(bench, zygote, 6, seed=4)
    assert result.wrong == [] and result.slowest < stops.LEAVE_SECONDS


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("during", "options", "not_yet"),
    [
        ("compilation", "--run.compile on", "step      1/"),
        ("validation", "--train.eval-every 1 --train.eval-tokens 65536", " nats"),
        ("sampling", "--train.sample-every 1", "--- sample"),
    ],
)
def test_sigterm_during(bench: Bench, tmp_path: Path, during, options: str, not_yet: str) -> None:
    words = [*train_arguments(bench.data, fresh(bench, tmp_path / "run")), *options.split()]
    log, caches = tmp_path / "log", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    process = ranks.start([sys.executable, "-m", "sota_transformer", *words], log, **caches)
    begun = "starting from scratch" if during == "compilation" else "step      1/"
    while begun not in log.read_text():
        assert process.poll() is None and time.sleep(0.01) is None, log.read_text()
    time.sleep(1.0 if during == "compilation" else 0.0)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, log.read_text()
    assert time.monotonic() - began < stops.LEAVE_SECONDS
    said = log.read_text()
    assert not_yet not in said and "Traceback" not in said
    assert "; stopped by SIGTERM" in said.splitlines()[-1]
    assert sota(words, tmp_path).code == 0
    if during != "compilation":
        assert model_of(tmp_path / "run") == bench.model


@pytest.mark.chaos
def test_changing_numbers_of_processes(bench: Bench) -> None:
    assert ranks.elastic(bench).wrong == []


@pytest.mark.chaos
def test_deaths_and_signals_under_torchrun(bench: Bench) -> None:
    result = ranks.accidents(bench, len(ranks.ACCIDENTS), seed=4)
    assert result.wrong == [] and result.kills == len(ranks.ACCIDENTS)


@pytest.mark.chaos
def test_malformed_documents(tmp_path: Path) -> None:
    assert documents.hostile(tmp_path, 2500, seed=4).wrong == []


@pytest.mark.chaos
def test_random_inputs_against_plain_readers(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    result = inputs.inputs(tmp_path / "work", 30, seed=4)
    assert result.wrong == [] and result.documents > 100 and result.damaged > 1


@pytest.mark.chaos
def test_preparation_decisions_against_brute_force(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    assert policies.policies(tmp_path / "work", 8, seed=4).wrong == []


@pytest.mark.chaos
def test_random_model_folders_against_transformers(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    result = folders.folders(tmp_path / "work", 60, seed=4)
    assert result.wrong == [] and result.taken > 15 and result.exported > 4 and result.trained > 1


@pytest.mark.chaos
def test_journeys(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    assert journeys.journeys(tmp_path / "root", 2, seed=4).wrong == []


@pytest.mark.chaos
def test_servers_whose_runs_change_underneath(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    result = servings.servings(tmp_path / "root", 1, seed=1)
    assert result.wrong == [] and result.done["answers"] > 3


@pytest.mark.chaos
def test_the_launcher_and_its_menu(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    result = launches.launches(tmp_path / "root", 1, seed=4)
    assert result.wrong == [] and result.done["menu"]


@pytest.mark.chaos
def test_reported_figures_are_what_the_model_computes(tmp_path: Path) -> None:
    result = judging.judging(tmp_path, 2, seed=4)
    assert result.wrong == [] and result.compared > 1000 and result.asked["answers"]


@pytest.mark.chaos
def test_what_a_run_reads_and_reports_against_plain_numpy(tmp_path: Path) -> None:
    result = windows.windows(tmp_path / "work", 3, seed=4)
    assert result.wrong == [] and result.windows > 100 and result.rows > 20


@pytest.mark.chaos
def test_two_runs_in_one_folder(bench: Bench, zygote: Zygote) -> None:
    assert stops.two_at_once(bench, zygote, 2).wrong == []


@pytest.mark.chaos
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="mounts disks")
def test_power_cuts(bench: Bench, zygote: Zygote) -> None:
    result = cuts.power_cuts(bench, zygote, 10, seed=4)
    assert result.wrong == [] and result.cuts == 10 and result.blocks > 0


@pytest.mark.chaos
def test_full_disks(bench: Bench, zygote: Zygote) -> None:
    try:
        result = stops.full_disks(bench, zygote, [4, 25, 45])
    except PermissionError as error:
        pytest.skip(str(error))
    assert result.wrong == [] and result.kills >= 2


@pytest.mark.chaos
def test_full_disks_in_preparation(bench: Bench) -> None:
    try:
        result = stops.full_disks_prepare(bench, [64, 400, 900])
    except PermissionError as error:
        pytest.skip(str(error))
    assert result.wrong == [] and result.kills >= 1


@pytest.mark.chaos
@needs_strace
def test_faults_at_system_calls_of_a_checkpoint(bench: Bench, zygote: Zygote) -> None:
    result = faults.sweep_train(bench, zygote, 12, seed=7)
    assert result.wrong == result.missed == [] and sum(result.faults.values()) >= 10


@pytest.mark.chaos
@needs_strace
def test_faults_at_system_calls_of_a_preparation(bench: Bench, zygote: Zygote) -> None:
    result = faults.sweep_prepare(bench, zygote, 12, seed=7)
    assert result.wrong == result.missed == [] and sum(result.faults.values()) >= 10


@pytest.mark.chaos
def test_evaluate_on_damaged_runs(bench: Bench, zygote: Zygote) -> None:
    before = contents(bench.run)
    assert reading.fuzz_evaluate(bench, zygote, 15, seed=4).bad == []
    assert contents(bench.run) == before


def test_no_changed_byte_of_a_configuration_gives_another_model(
    make_run: Callable[..., RunConfig],
) -> None:
    config = make_run(d_model=4, heads=1, kv_heads=1, d_ff=4, layers=1)
    weights = Transformer(config.model, torch.float32).state_dict()
    written = {"model": dataclasses.asdict(config.model)}  # as `Trainer.state` does
    config.run.out.mkdir()
    checkpoint.save(
        config.run.out, checkpoint.State(step=1, model=weights, optim={}, manifest=written)
    )
    path = config.run.out / "config.json"
    path.write_text(config.to_json())
    load_model(config)
    text, seen, accepted = path.read_text(), {config.model}, []
    for offset in range(text.index("}")):  # of the section "model"
        for new in "09e":
            path.write_text(text[:offset] + new + text[offset + 1 :])
            try:
                model = read_config(config.run.out).model
                if model not in seen:
                    seen.add(model)
                    load_model(config)
                    accepted.append(model)
            except SotaError as error:
                assert error.code == BAD_DATA
    assert accepted == [] and len(seen) > 10


def load_model(config: RunConfig) -> None:
    cpu = torch.device("cpu")
    checkpoint.load_model(config.run.out, cpu, None, lambda _: None)
