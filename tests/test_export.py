"""Exports checked by the programs that read them, hostile folders, and kill -9 in between."""

import contextlib
import json
import mmap
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sota_transformer import durable
from sota_transformer.cli import resolve
from sota_transformer.commands.common import open_model
from sota_transformer.commands.evaluate import run_evaluate
from sota_transformer.commands.transfer import run_export, run_import
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.inference import export, layout
from sota_transformer.inference.folder import read_model
from sota_transformer.inference.generate import generate, make_sampler
from sota_transformer.model.transformer import Transformer
from sota_transformer.options import Evaluate, Export, Import
from sota_transformer.training.start import train
from tests.inference_models import KINDS, WIDE, small_model, write_run
from tests.preparing import PrivateMap
from tests.training_runs import change

TOKENIZER = Tokenizer()
PROMPTS = ["The", "Once upon a time", "def main(", "漢字 and é", "1 2 3 4 5 6 7 8"]
HOSTILE_TEXT = [
    "a <|endoftext|> b <|pad|>", "\ufeff tab\t\r\n\n  spaces   ", "I'll we've 'tis", "🙂👩‍👧 é́",
    "x" * 300, "\x00\x01", " ", "١٢٣ 123", "<|endoftext|>",
]  # fmt: skip


GGUF_SIZES = {
    "context_length": "seq_len", "embedding_length": "d_model", "block_count": "layers",
    "feed_forward_length": "d_ff", "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim", "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_base", "vocab_size": "vocab_size",
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request: pytest.FixtureRequest) -> Transformer:
    return small_model(KINDS[request.param])


@pytest.fixture(scope="module")
def run(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mine", model)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "hf"
    assert run_export(Export(run=run, out=out)) == 0
    return out


def greedy(model: Transformer, prompt: str, count: int = 16) -> list[int]:
    return list(generate(model, TOKENIZER.encode(prompt), make_sampler(0.0), count))


def test_transformers_computes_the_same_logits_and_text(model: Transformer, exported: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert other.config.architectures == [type(other).__name__]  # by which vLLM takes it
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for prompt in PROMPTS:
        ids = torch.tensor([TOKENIZER.encode(prompt)])
        assert tokenizer(prompt, return_tensors="pt")["input_ids"].tolist() == ids.tolist()
        with torch.no_grad():
            ours, theirs = model.logits(model(ids)), other(ids).logits
            assert theirs.shape[-1] == 50_258
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
            text = other.generate(ids, max_new_tokens=16, do_sample=False)
        assert text[0, ids.shape[1] :].tolist()[:16] == greedy(model, prompt)


def test_what_a_config_leaves_out_is_as_in_transformers(model: Transformer) -> None:
    values = layout.huggingface_config(model.config, "float32")
    for name in ("rope_theta", "rope_parameters", "rms_norm_eps"):
        del values[name]
    ours, theirs = layout.own_config(values), AutoConfig.for_model(**values)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_base == theirs.rope_parameters["rope_theta"]


def test_transformers_reads_the_tokenizer(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for text in HOSTILE_TEXT:
        ids = TOKENIZER.encode(text)
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == ids, text
        assert "<|" in text or tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == TOKENIZER.decode(ids)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (50256, 50257, 50258)
    settings = json.loads((exported / "tokenizer_config.json").read_bytes())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # for transformers 4


def test_fine_tuning_can_end_and_mark_a_text(exported: Path) -> None:
    """TRL appends the end to a text as a string, and chat templates spell their markers."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer("Yes." + tokenizer.eos_token)["input_ids"] == [5297, 13, 50256]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    assert tokenizer("<|user|>Yes.")["input_ids"] == [50258, 5297, 13]


def test_transformers_never_writes_padding(exported: Path, tmp_path: Path) -> None:
    model = read_model(exported)
    with torch.no_grad():
        model.embedding.weight[50_257] = 30 * model.embedding.weight[greedy(model, "The", 1)[0]]
    out = tmp_path / "loud"
    with durable.commit_folder(out, {}) as writer:
        export.write_huggingface(writer, model, "float32", "")
    other = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([TOKENIZER.encode("The")])
    assert other(ids).logits[0, -1].argmax() == 50_257
    assert 50_257 not in other.generate(ids, max_new_tokens=12)[0]


def test_transformers_4_reads_an_export_back(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It called `dtype` `torch_dtype`, and passed on what it did not know, which then failed."""
    load = AutoModelForCausalLM.from_pretrained

    def older(folder: Path, *, local_files_only: bool, use_safetensors: bool) -> object:
        return load(folder, local_files_only=local_files_only, use_safetensors=use_safetensors)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", older)
    assert run_export(Export(run=run, out=tmp_path / "out", dtype="bfloat16")) == 0
    assert "read back by transformers" in capsys.readouterr().out


def test_the_same_run_exports_to_the_same_bytes(run: Path, exported: Path, tmp_path: Path) -> None:
    assert run_export(Export(run=run, out=tmp_path / "again")) == 0
    names = sorted(path.name for path in exported.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (exported / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert durable.verify(exported) == []


def test_gguf_holds_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once, by the export: the gguf package takes seconds for a vocabulary, of any model."""
    gguf, readers = pytest.importorskip("gguf"), []
    read = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *how: readers.append(read(*how)) or readers[0])
    monkeypatch.setattr(mmap, "mmap", PrivateMap)  # also on a drive without shared maps
    run = write_run(tmp_path / "mine", small_model(WIDE))
    assert run_export(Export(run=run, out=tmp_path / "out", format="gguf")) == 0
    field = {name: value.contents() for name, value in readers[0].fields.items()}
    assert field["tokenizer.ggml.eos_token_id"] == EOT
    assert len(field["tokenizer.ggml.tokens"]) == 50_258
    assert field["tokenizer.ggml.merges"][0] == "Ġ t"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_gguf_holds_the_model(
    model: Transformer, run: Path, tmp_path: Path, monkeypatch, capsys, dtype: str
) -> None:
    gguf = pytest.importorskip("gguf")
    from sota_transformer.inference import gguf_file

    monkeypatch.setattr(gguf_file, "_add_tokenizer", lambda *_: None)
    options = Export(run=run, out=tmp_path / "out", format="gguf", dtype=dtype)  # type: ignore[arg-type]
    assert run_export(options) == 0
    path = tmp_path / "out" / "model.gguf"
    reader = gguf.GGUFReader(path)
    field = {name: value.contents() for name, value in reader.fields.items()}
    kind = "qwen3" if model.config.qk_norm else "llama"
    config = model.config
    assert field["general.architecture"] == kind
    assert field["general.quantization_version"] == 2  # the format demands it where q8_0 is
    assert {name: field[f"{kind}.{name}"] for name in GGUF_SIZES} == {
        name: getattr(config, ours) for name, ours in GGUF_SIZES.items()
    }
    epsilon = field[f"{kind}.attention.layer_norm_rms_epsilon"]
    assert epsilon == pytest.approx(config.norm_eps, rel=1e-6)
    if dtype == "float32":  # llama.cpp turns neighbouring rows of a head, and Qwen's as ours
        theirs = layout.huggingface_tensors(model)
        for letter, heads in (("q", config.heads), ("k", config.kv_heads)):
            rows = torch.arange(heads * config.head_dim).view(heads, 2, -1)
            order = (rows if config.qk_norm else rows.mT).flatten()
            stored = next(t for t in reader.tensors if t.name == f"blk.1.attn_{letter}.weight")
            weight = theirs[f"model.layers.1.self_attn.{letter}_proj.weight"]
            assert torch.equal(torch.tensor(stored.data), weight[order])
    types = {tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert types == {
        {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(dtype, dtype),
        "f32",
    }
    said, recipe = capsys.readouterr().out, (path.parent / "Modelfile").read_text()
    assert f"llama-completion -m {path} " in said
    assert f"ollama create mine -f {path.parent / 'Modelfile'} &&" in said
    assert "FROM ./model.gguf" in recipe
    assert ("\nREQUIRES 0.30.0\n" in recipe) == model.config.qk_norm  # older ones split like Qwen's


def test_llama_cpp_writes_the_same_text(model: Transformer, run: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    assert run_export(Export(run=run, out=tmp_path / "out", format="gguf")) == 0
    other = llama_cpp.Llama(
        str(tmp_path / "out" / "model.gguf"), n_ctx=64, n_threads=1, verbose=False, logits_all=True
    )
    for text in HOSTILE_TEXT[1:]:
        ids = other.tokenize(text.encode(), add_bos=False, special=False)
        assert "\x00" in text or ids == TOKENIZER.encode(text), text
    for prompt in PROMPTS:
        ids = TOKENIZER.encode(prompt)
        other.reset()
        theirs = []
        for token in other.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            theirs.append(token)
            if len(theirs) == 16:
                break
        assert theirs == greedy(model, prompt)


@pytest.mark.peers
def test_mlx_lm_writes_the_same_text(model: Transformer, exported: Path) -> None:
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm import load

    other, tokenizer = load(str(exported))
    for prompt in PROMPTS:
        assert tokenizer.encode(prompt) == TOKENIZER.encode(prompt)
        ids = TOKENIZER.encode(prompt)
        for token in greedy(model, prompt, 8):
            assert int(mx.argmax(other(mx.array([ids]))[0, -1, :50_257]).item()) == token
            ids.append(token)


def test_an_export_can_be_used_and_imported(
    model: Transformer, exported: Path, tmp_path: Path
) -> None:
    assert open_model(exported, "cpu", None).config is None
    assert run_import(Import(model=exported, out=tmp_path / "run")) == 0
    opened = open_model(tmp_path / "run", "cpu", None)
    assert opened.step == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], tensor), name
    with pytest.raises(SotaError):
        run_import(Import(model=exported, out=tmp_path / "run"))
    with pytest.raises(SotaError, match="an imported model has no validation split; give --text"):
        run_evaluate(Evaluate(run=tmp_path / "run", device="cpu"))


def test_an_imported_run_trains_on(
    model: Transformer,
    exported: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command printed by `sota import` is the one that continues."""
    out = tmp_path / "run"
    run_import(Import(model=exported, out=out, data=data, steps=2))
    command = capsys.readouterr().out.partition("train it further:")[2]
    config = resolve([*shlex.split(command)[2:], "--train.batch-rows=16"], "train")
    assert config.model == model.config and config.run.out == out
    monkeypatch.setattr("sota_transformer.training.judge._SAMPLE_TOKENS", 4)
    train(change(config, device="cpu", threads=1, eval_tokens=256))
    before, after = model.state_dict(), open_model(out, "cpu", 2).model.state_dict()
    moved = [float((after[name] - tensor).abs().max()) for name, tensor in before.items()]
    assert 0 < max(moved) < 0.01  # two steps away from the imported weights, not from new ones


def test_import_refuses_data_that_training_would_refuse(exported: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(b"\1\1" * 20)
    with pytest.raises(SotaError, match="has 20 tokens, but a window needs 65"):
        run_import(Import(model=exported, out=tmp_path / "run", data=tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_folder_saved_by_transformers_in_parts_is_read(
    model: Transformer, exported: Path, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(exported)
    other.save_pretrained(tmp_path, max_shard_size="5MB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for name, tensor in read_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_wrong_export_is_never_reported_as_done(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer swaps two matrices; the proof must notice and nothing may appear."""
    right = layout.huggingface_tensors

    def wrong(model: Transformer) -> dict[str, torch.Tensor]:
        found = right(model)
        a, b = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
        return found | {a: found[b], b: found[a]}

    monkeypatch.setattr(export, "huggingface_tensors", wrong)
    with pytest.raises(SotaError, match="differs from the model") as caught:
        run_export(Export(run=run, out=tmp_path / "out"))
    assert caught.value.code == 70
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(SotaError, match="already exists"):
        run_export(Export(run=run, out=tmp_path / "out"))
    with pytest.raises(SotaError, match="--out must name"):
        run_export(Export(run=run))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SotaError, match="already exists"):
        run_export(Export(run=run, out=tmp_path / "link"))


EXPORT = (
    "import sys; from pathlib import Path; from sota_transformer.options import Export; "
    "from sota_transformer.commands.transfer import run_export; "
    "run_export(Export(run=Path(sys.argv[1]), out=Path(sys.argv[2])))"
)


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_leaves_nothing_or_all(tmp_path: Path, kills: int) -> None:
    """The first kill comes as soon as anything is written, the others until all is."""
    run = write_run(tmp_path / "run" / "mine", small_model(WIDE))
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", EXPORT, str(run), str(tmp_path / "out")], check=True)
    whole = time.monotonic() - began  # by this machine, with what else it does
    complete = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    delays, seen, out = random.Random(5), set(), tmp_path / "again"
    for number in range(kills):
        before = set(tmp_path.iterdir())
        process = subprocess.Popen(
            [sys.executable, "-c", EXPORT, str(run), str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and set(tmp_path.iterdir()) <= before:
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delays.uniform(0, 1.5 * whole) if number else 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.add(out.exists())
        if out.exists():
            assert {p.name: p.read_bytes() for p in out.iterdir()} == complete
            shutil.rmtree(out)
    run_export(Export(run=run, out=out))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # swept by the next export
    assert kills < 50 or seen == {True, False}


def test_an_export_leaves_those_beside_it_alone(run: Path, tmp_path: Path) -> None:
    own, others = tmp_path / ".tmp-a-01234567", tmp_path / ".tmp-b-01234567"
    own.mkdir()
    others.mkdir()
    run_export(Export(run=run, out=tmp_path / "a"))
    assert others.is_dir() and not own.exists()
