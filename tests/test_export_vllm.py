"""vLLM accepts an export as one of its own models: its configuration, its registry, its class.

vLLM is far too large for the development setup, and its wheel computes nothing on a CPU. This test
covers what decides whether it loads the folder without custom code. It needs vLLM's unpacked wheel
and the dependencies that it imports on PYTHONPATH (`pip download --no-deps vllm`).
"""

import dataclasses
from pathlib import Path

import pytest

from sota_transformer.commands.transfer import run_export
from sota_transformer.options import Export
from tests.inference_models import FULL, small_model, write_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_vllm_takes_an_export_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pytest.importorskip("vllm", reason="NOT CHECKED: vLLM is not here (see this file's docstring)")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    from vllm.config import ModelConfig
    from vllm.model_executor.models.registry import ModelRegistry

    model = small_model(dataclasses.replace(FULL, qk_norm=kind == "Qwen3"))
    run_export(Export(run=write_run(tmp_path / "run", model), out=tmp_path / "hf"))
    folder = str(tmp_path / "hf")
    config = ModelConfig(model=folder, tokenizer=folder, trust_remote_code=False, dtype="float32")
    read, ours = config.hf_config, model.config
    assert type(read).__name__ == f"{kind}Config"
    assert (config.max_model_len, config.get_vocab_size()) == (ours.seq_len, ours.vocab_size)
    assert (config.get_hidden_size(), config.get_head_size()) == (ours.d_model, ours.head_dim)
    assert (read.num_hidden_layers, read.num_key_value_heads) == (ours.layers, ours.kv_heads)
    assert read.tie_word_embeddings and read.rope_parameters["rope_theta"] == ours.rope_base
    found, name = ModelRegistry.resolve_model_cls(config.architectures, config)
    assert name == found.__name__ == f"{kind}ForCausalLM"
    assert found.__module__ == f"vllm.model_executor.models.{kind.lower()}"  # not a fallback
