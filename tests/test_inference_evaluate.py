"""`sota evaluate` and `sota generate` as users call them, compared with EleutherAI's harness."""

import contextlib
import functools
import http.server
import io
import json
import random
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sota_transformer.commands.evaluate import run_evaluate
from sota_transformer.commands.generate import run_generate
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.inference.generate import generate, make_sampler
from sota_transformer.options import Evaluate, Generate
from tests.inference_models import FULL, small_model, write_run

MODEL = small_model(FULL)
TOKENIZER = Tokenizer()
WORDS = ["ship", "harbour", "captain", "storm", "lantern", "letter", "garden", "river", "winter"]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "judged", MODEL, data)


def printed(verb: Callable[[Any], int], options: Any) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert verb(options) == 0
    return out.getvalue()


def judged(run: Path, **options: Any) -> dict[str, Any]:
    return json.loads(printed(run_evaluate, Evaluate(run=run, json=True, device="cpu", **options)))


@pytest.fixture(scope="module")
def lambada_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random.Random(3)
    lines = []
    for _ in range(40):
        text = "the " + " ".join(source.choices(WORDS, k=source.randint(2, 30)))
        said = TOKENIZER.decode(list(generate(MODEL, TOKENIZER.encode(text), make_sampler(0.0), 1)))
        right = source.random() < 0.6 and said.startswith(" ") and said.strip()
        lines.append({"text": text + said if right else text + " promise"})
    path = tmp_path_factory.mktemp("lambada") / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def hellaswag_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random.Random(4)
    lines = []
    for number in range(30):
        pick = lambda n: " ".join(source.choices(WORDS, k=n))  # noqa: E731
        lines.append(
            {
                "ind": number,
                "activity_label": "Sailing [x]",
                "ctx_a": f"a {pick(5)} [title] then.",
                "ctx_b": pick(source.randint(0, 4)),
                "endings": [pick(source.randint(1, 9)) + " [step] end." for _ in range(4)],
                "label": str(source.randrange(4)),
            }
        )
    path = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def harness_tasks(lambada: Path, hellaswag: Path) -> list[dict[str, Any]]:
    """lm-eval's own two tasks, word for word, on local files."""
    from lm_eval.tasks.hellaswag.utils import process_docs

    local = {"dataset_path": "json", "test_split": "test"}
    return [
        local
        | {
            "task": "lambada_local",
            "dataset_kwargs": {"data_files": {"test": str(lambada)}},
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
        local
        | {
            "task": "hellaswag_local",
            "dataset_kwargs": {"data_files": {"test": str(hellaswag)}},
            "output_type": "multiple_choice",
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in ("acc", "acc_norm")
            ],
        },
    ]


@pytest.mark.peers
def test_lm_eval_agrees(
    run: Path, lambada_file: Path, hellaswag_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Same figures from our protocols, from lm-eval on our model, and on the exported one."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sota_transformer.commands.transfer import run_export
    from sota_transformer.inference.harness import evaluate
    from sota_transformer.options import Export

    # Listing its thousands of tasks, none of which is needed, takes longer than everything else.
    none = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", none)
    ours = {
        row["name"]: row["value"]
        for row in judged(run, lambada=lambada_file, hellaswag=hellaswag_file)["benchmarks"]
    }
    tasks = harness_tasks(lambada_file, hellaswag_file)
    run_export(Export(run=run, out=tmp_path / "hf"))
    exported = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=4)
    found = simple_evaluate(model=exported, tasks=tasks, bootstrap_iters=0)
    assert found is not None
    for results in (evaluate(MODEL, TOKENIZER, tasks), found["results"]):
        lambada, hellaswag = results["lambada_local"], results["hellaswag_local"]
        assert ours["lambada_openai accuracy"] == lambada["acc,none"]
        assert ours["lambada_openai perplexity"] == pytest.approx(
            lambada["perplexity,none"], rel=1e-5
        )
        assert ours["hellaswag acc"] == hellaswag["acc,none"]
        assert ours["hellaswag acc_norm"] == hellaswag["acc_norm,none"]
    assert 0.2 < ours["lambada_openai accuracy"] < 0.9  # both right and wrong answers occur
    assert ours["lambada_openai accuracy"] <= ours["lambada_paper accuracy"]


def test_the_validation_split_equals_transformers(run: Path, data: Path) -> None:
    import torch
    import torch.nn.functional as F

    from sota_transformer.data.shards import TokenWindows
    from tests.inference_models import as_transformers

    windows = TokenWindows(data, "val", FULL.seq_len)
    ids = torch.from_numpy(windows.read(0, windows.tokens).astype("int64"))
    other, total = as_transformers(MODEL), 0.0
    for start in range(0, len(ids) - 1, FULL.seq_len):
        part = ids[start : start + FULL.seq_len + 1]
        with torch.no_grad():
            logits = other(part[None, :-1]).logits[0].double()
        total += float(F.cross_entropy(logits, part[1:], reduction="sum"))
    found = judged(run)
    assert found["tokens"] == windows.tokens - 1
    assert found["nats"] == pytest.approx(total / (windows.tokens - 1), rel=1e-6)


def test_long_evaluations_report_progress(
    run: Path, lambada_file: Path, hellaswag_file: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """A line on stderr from time to time, up to the end; none if it is quick."""
    (tmp_path / "a.txt").write_text("The captain saw the storm. " * 50)
    asked: list[dict[str, Any]] = [{}, {"text": (tmp_path,)}, {"tokens": 500, "stride": 16}]
    asked += [{"lambada": lambada_file, "limit": 9}, {"hellaswag": hellaswag_file, "limit": 9}]
    for options in asked:
        monkeypatch.setattr("sota_transformer.data.progress._PLAIN_SECONDS", 60)
        quiet = judged(run, **options)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr("sota_transformer.data.progress._PLAIN_SECONDS", 0)
        assert judged(run, **options) == quiet
        lines = capsys.readouterr().err.splitlines()
        form = r"evaluate: +([\d.]+)%  ([\d,]+) tokens \([\d,]+/s\)  \d+ s left"
        found = [re.fullmatch(form, line) for line in lines]
        shares = [float(match[1]) for match in found if match]
        assert len(shares) == len(lines) > 1 and shares == sorted(shares) and shares[-1] == 100
        if "tokens" in quiet:
            assert f" {quiet['tokens']:,} tokens (" in lines[-1]


def test_the_table_names_the_protocol_and_published_figures(run: Path, lambada_file: Path) -> None:
    table = printed(run_evaluate, Evaluate(run=run, lambada=lambada_file, device="cpu"))
    assert "last token" in table and "whole word, lm-eval" in table
    published = table.partition("published, same protocol, on the whole published test set:")[2]
    assert "0.3256 GPT-2 124M" in published and "0.4599 GPT-2 124M" in published
    assert "lambada_standard" not in table  # not measured here


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server at the hub's addresses that serves the files of a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield tmp_path / "datasets"
        server.shutdown()


def put(hub: Path, repository: str, split: str, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = hub / repository / "resolve/refs/convert/parquet" / split / "0000.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_benchmarks_come_from_the_hub_once(
    run: Path, lambada_file: Path, hellaswag_file: Path, hub: Path, monkeypatch
) -> None:
    pytest.importorskip("pyarrow.parquet")
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    texts, questions = read(lambada_file), read(hellaswag_file)
    put(hub, "EleutherAI/lambada_openai", "default/test", texts)
    put(hub, "cimec/lambada", "plain_text/test", [{"domain": None, **text} for text in texts])
    put(hub, "Rowan/hellaswag", "default/validation", questions)
    from_hub = judged(run, lambada=Path("hub"), hellaswag=Path("hub"))["benchmarks"]
    local = judged(run, lambada=lambada_file, hellaswag=hellaswag_file)["benchmarks"]
    values = {row["name"]: row["value"] for row in from_hub}
    assert values | {row["name"]: row["value"] for row in local} == values
    assert values["lambada_standard accuracy"] == values["lambada_openai accuracy"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(lambada_file))  # as a home that cannot be written to
    with pytest.raises(SotaError, match="set XDG_CACHE_HOME"):
        judged(run, lambada=Path("hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(hub.parent / "cache"))
    shutil.rmtree(hub)
    assert judged(run, lambada=Path("hub"), hellaswag=Path("hub"))["benchmarks"] == from_hub


def test_without_the_hub_one_line_says_what_to_do(
    run: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    bad = hub / "Rowan/hellaswag/resolve/refs/convert/parquet/default/validation/0000.parquet"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"<html>")
    for options, code in (({"lambada": Path("hub")}, 66), ({"hellaswag": Path("hub")}, 65)):
        with pytest.raises(SotaError) as caught:
            run_evaluate(Evaluate(run=run, device="cpu", **options))  # type: ignore[arg-type]
        assert caught.value.code == code
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SotaError, match="offline, use --lambada FILE"):
        run_evaluate(Evaluate(run=run, device="cpu", lambada=Path("hub")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no examples"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"x": 1}', "field `text`"),
        ('{"text": "one"}', "two words"),
        ('{"text": 5}', "field `text`"),
        ('{"text": "one", "ctx": 5, "endings": ["a"], "label": 0}', "two words"),
        ('{"text": "one", "ctx": "x", "endings": "ab", "label": 0}', "two words"),
        ('{"text": "one", "ctx": "x", "endings": ["a", ""], "label": "0"}', "two words"),
        ("[" * 100_000, "not JSON"),
        (
            '{"text": "one", "activity_label": "a", "ctx_a": "b", "ctx_b": "", '
            '"endings": ["c", "[step]"], "label": 0}',
            "two words",
        ),
    ],
)
def test_bad_files_are_one_line(run: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(SotaError, match=message) as caught:
        run_evaluate(Evaluate(run=run, lambada=path, device="cpu"))
    assert caught.value.code == 65
    with pytest.raises(SotaError):
        run_evaluate(Evaluate(run=run, hellaswag=path, device="cpu"))


def test_a_question_in_another_form_is_told_the_form(run: Path, tmp_path: Path) -> None:
    (path := tmp_path / "x.jsonl").write_text('{"question": "one", "choices": ["a", "b"]}')
    told = "each line needs ctx, endings and label, the index of the right ending"
    with pytest.raises(SotaError, match=told):
        run_evaluate(Evaluate(run=run, hellaswag=path, device="cpu"))


def test_missing_and_unreadable_inputs(run: Path, tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    for options, code in (
        ({"text": (tmp_path / "none",)}, 66),
        ({"text": (tmp_path / "binary.txt",)}, 65),
        ({"text": (tmp_path / "empty",)}, 66),
        ({"lambada": tmp_path / "none"}, 66),
        ({"step": 77}, 66),
        ({"stride": -1}, 2),
    ):
        with pytest.raises(SotaError) as caught:
            run_evaluate(Evaluate(run=run, device="cpu", **options))  # type: ignore[arg-type]
        assert caught.value.code == code, options


def greedy(prompt: str, count: int) -> str:
    ids = list(generate(MODEL, TOKENIZER.encode(prompt), make_sampler(0.0), count))
    return TOKENIZER.decode(ids)


def test_generate_prints_the_prompt_and_its_continuation(run: Path, capsys) -> None:
    for prompt in ("Once upon", "The river. " * MODEL.config.seq_len):  # too long for the context
        options = Generate(run=run, prompt=(prompt,), max_tokens=9, temperature=0, device="cpu")
        assert printed(run_generate, options) == prompt + greedy(prompt, 9) + "\n"
        assert ("the model sees the last" in capsys.readouterr().err) == (len(prompt) > 9)


def test_generate_in_bfloat16_is_deterministic_and_nearly_the_same(run: Path) -> None:
    asked = {"run": run, "prompt": ("Once upon",), "max_tokens": 9, "device": "cpu", "json": True}
    first, again, exact = (
        json.loads(printed(run_generate, Generate(dtype=dtype, logprobs=0, **asked)))  # type: ignore[arg-type]
        for dtype in ("bfloat16", "bfloat16", "float32")
    )
    assert first == again
    ours, theirs = (line["logprobs"][0] for line in (first, exact))
    assert ours["logprob"] != theirs["logprob"]  # it really was another dtype
    if ours["id"] == theirs["id"]:
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=0.5)


def test_generate_many_from_a_file_as_json(run: Path, tmp_path: Path) -> None:
    prompts = [f"prompt {number} of" for number in range(20)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = Generate(
        run=run, file=path, max_tokens=6, temperature=0, json=True, logprobs=2, device="cpu"
    )
    lines = [json.loads(line) for line in printed(run_generate, options).splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        assert line["text"] == greedy(line["prompt"], 6)
        best = [place["alternatives"][0]["id"] for place in line["logprobs"]]
        assert best == line["tokens"]


def test_generate_reads_standard_input_and_stops(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = greedy("The river", 12)
    options = Generate(
        run=run, file=Path("-"), max_tokens=12, temperature=0, stop=(whole[5:8],), device="cpu"
    )
    for data in (b"The river\n", "The river\r\n".encode("utf-16")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        shown = printed(run_generate, options)
        assert shown == "The river" + whole[: whole.index(whole[5:8])] + "\n"


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_are_read_as_prepare_reads_them(run: Path, tmp_path: Path, codec: str) -> None:
    """A byte order mark is not text, UTF-16 with one is text, and anything else is one line."""
    text, asked = "Caf\u00e9 by the river, \u65e5\u672c.", {"run": run, "device": "cpu"}
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    assert judged(run, text=(tmp_path / "a.txt",))["tokens"] == len(TOKENIZER.encode(text))
    (tmp_path / "b.txt").write_bytes("One\r\n \u00e9 two\n".encode(codec))
    (tmp_path / "c.jsonl").write_bytes('{"prompt": "\u00e9"}\n'.encode(codec))
    for name, prompts in (("b.txt", ["One", " \u00e9 two"]), ("c.jsonl", ["\u00e9"])):
        options = Generate(file=tmp_path / name, max_tokens=1, json=True, **asked)  # type: ignore[arg-type]
        lines = printed(run_generate, options)
        assert [json.loads(line)["prompt"] for line in lines.splitlines()] == prompts
    (tmp_path / "d.txt").write_bytes("\u00e9 in another".encode("latin-1"))
    for command, options in (
        (run_generate, Generate(file=tmp_path / "d.txt", **asked)),  # type: ignore[arg-type]
        (run_evaluate, Evaluate(text=(tmp_path / "d.txt",), **asked)),  # type: ignore[arg-type]
    ):
        with pytest.raises(SotaError, match="neither UTF-8 nor UTF-16") as caught:
            command(options)  # type: ignore[operator]
        assert caught.value.code == 65


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0},
        {"top_p": 1.5}, {"min_p": 2.0}, {"top_k": -1}, {"seed": -1}, {"logprobs": 3},
        {"repetition_penalty": 0.0}, {"prompt": ("a",), "file": Path("b")},
        {"file": Path("/nonexistent")},
    ],
)  # fmt: skip
def test_generate_refuses_what_cannot_work(run: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SotaError):
        run_generate(Generate(run=run, device="cpu", **options))
