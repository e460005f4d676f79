"""A small deterministic corpus, and runs of the real trainer on it."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sota_transformer.config import RunConfig
from sota_transformer.presets import PRESETS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small models are slower on two threads than on one, here and in processes started by tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore Ctrl-C, and processes started by tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _words(text: str) -> list[str]:
    return text.split()


def pseudo_text(seed: int, documents: int) -> list[str]:
    """Sentences of a small grammar; the same on every machine and Python."""
    source = random.Random(seed)
    nouns = _words("ship harbour captain storm lantern letter garden river winter promise")
    verbs = _words("saw remembered followed lost painted answered carried feared")
    joints = _words("while because although before after until")
    texts = []
    for _ in range(documents):
        sentences = []
        for _ in range(source.randint(3, 12)):
            a, b, c = (source.choice(nouns) for _ in range(3))
            sentences.append(
                f"The {a} {source.choice(verbs)} the {b} {source.choice(joints)} "
                f"the {c} {source.choice(verbs)} {source.randint(2, 99)} others."
            )
        texts.append(" ".join(sentences))
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(pseudo_text(7, 300)):
        (folder / f"{i:04d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.preparing import run

    out = tmp_path_factory.mktemp("data") / "small"
    run(out, corpus)
    return out


@pytest.fixture(scope="session")
def few(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data small enough to be read completely in a few short steps."""
    from tests.preparing import run

    out = tmp_path_factory.mktemp("data") / "few"
    run(out, *sorted(corpus.iterdir())[:24])
    return out


@pytest.fixture
def make_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunConfig]:
    """A run of `tiny`, shorter and narrower; keyword arguments replace fields by name.

    As narrow as possible: steps and checkpoints cost the vocabulary times the width.

    Samples are short, since they would take more time than the steps. The command line's are not.
    """
    from tests.training_runs import change

    monkeypatch.setattr("sota_transformer.training.judge._SAMPLE_TOKENS", 4)

    def make(name: str = "run", recipe: str = "seed", **changes: object) -> RunConfig:
        defaults: dict[str, object] = {
            "d_model": 16, "d_ff": 64, "seq_len": 32, "steps": 12, "batch_rows": 4,
            "log_every": 1, "eval_every": 0, "eval_tokens": 256, "sample_every": 0,
            "save_every_minutes": 0.0, "threads": 1, "device": "cpu", "path": data,
            "out": tmp_path / name, "dtype": "float32",
        }  # fmt: skip
        return change(PRESETS["tiny"](recipe), **(defaults | changes))

    return make


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """About 400 units of work of 4 KiB: enough to be seen in progress on a busy machine."""
    from tests.preparing import jsonl, texts

    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl(texts(5000)))
    return path
