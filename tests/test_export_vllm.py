"""vLLM's own registry and configuration reader take an export as one of their own models.

vLLM is far too large for the development set-up, and on a CPU nothing of it computes: this is the
check of names and configuration that decides whether it would load the folder without custom code.
An unpacked wheel on PYTHONPATH is enough:  pip download --no-deps vllm.
"""

import ast
import dataclasses
import importlib.util
from pathlib import Path

import pytest

from sota_transformer.commands.transfer import run_export
from sota_transformer.options import Export
from tests.inference_models import FULL, small_model, write_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_vllm_takes_an_export_for_its_own(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("vllm", reason="NOT CHECKED: vLLM is not here (see this file's docstring)")
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import get_config

    model = small_model(dataclasses.replace(FULL, qk_norm=kind == "Qwen3"))
    run_export(Export(run=write_run(tmp_path / "run", model), out=tmp_path / "hf"))
    config = get_config(str(tmp_path / "hf"), trust_remote_code=False)
    assert type(config).__name__ == f"{kind}Config"
    assert (config.hidden_size, config.vocab_size) == (model.config.d_model, 50_258)
    assert config.tie_word_embeddings and config.head_dim == model.config.head_dim

    (name,) = config.architectures
    assert name in ModelRegistry.get_supported_archs()
    entry = ModelRegistry.models[name]
    assert (entry.module_name, entry.class_name) == (
        f"vllm.model_executor.models.{kind.lower()}",
        f"{kind}ForCausalLM",
    )
    # The class that will run is written for exactly this configuration, read without importing it.
    source = Path(str(importlib.util.find_spec(entry.module_name).origin)).read_text()  # type: ignore[union-attr]
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert entry.class_name in [node.name for node in classes]
    annotated = {
        ast.unparse(argument.annotation)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        for argument in node.args.args
        if argument.arg == "config" and argument.annotation is not None
    }
    assert any(type(config).__name__ in annotation for annotation in annotated), annotated
