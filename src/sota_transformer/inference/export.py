"""Exports a model as a Hugging Face folder, which MLX also opens as is.

The bytes depend only on the weights and the model card, so the same run exports to the same hashes.
Before an export counts as done it is read back from disk and its logits are compared, by this
package's own reader and, where it is installed, by `transformers`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sota_transformer.data.tokenizer import EOT
from sota_transformer.durable import FolderWriter, canonical_json
from sota_transformer.errors import DIVERGED, SotaError
from sota_transformer.inference.folder import WEIGHTS, read_model
from sota_transformer.inference.layout import huggingface_config, huggingface_tensors
from sota_transformer.inference.tokenizer_files import huggingface_files
from sota_transformer.model.loss import PAD
from sota_transformer.model.transformer import Transformer

# Allowed root mean square difference as a fraction of the logits' standard deviation: rounding to
# 24, 11 and 8 bits, and to 8 bits with a shared scale, with room for its accumulation over layers.
# Logits of a different model differ by about 1.4.
_ALLOWED = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.05, "q8_0": 0.25}
_PROBE_TOKENS = 64


def write_huggingface(writer: FolderWriter, model: Transformer, dtype: str, card: str) -> None:
    """Write config.json, weights, tokenizer and the model card; `card` is README.md's text."""
    config = model.config
    writer.write("config.json", canonical_json(huggingface_config(config, dtype)))
    generation: dict[str, Any] = {"bos_token_id": EOT, "eos_token_id": EOT, "do_sample": True}
    generation |= {"temperature": 0.8, "top_p": 0.95}
    if config.vocab_size > PAD:  # padding is never text
        generation |= {"pad_token_id": PAD, "suppress_tokens": list(range(PAD, config.vocab_size))}
    writer.write("generation_config.json", canonical_json(generation))
    kind = getattr(torch, dtype)
    tensors = {n: t.to(kind).contiguous() for n, t in huggingface_tensors(model).items()}
    writer.write(WEIGHTS, save(tensors, metadata={"format": "pt"}))
    for name, data in huggingface_files(config.seq_len).items():
        writer.write(name, data)
    writer.write("README.md", card.encode())


def prove_huggingface(folder: Path, model: Transformer, dtype: str) -> list[str]:
    """Read a written folder back; one line per reader. SotaError 70 if the model differs."""
    ours = probe_logits(model)
    proofs = [proof("this package", ours, probe_logits(read_model(folder)), dtype)]
    try:
        # Qwen3 is there from 4.51 on; older ones count as not installed.
        from transformers import AutoModelForCausalLM, Qwen3Config  # noqa: F401
        from transformers.utils import logging
    except ImportError:
        return proofs
    logging.disable_progress_bar()
    other = AutoModelForCausalLM.from_pretrained(  # transformers 4 knows no `dtype`
        folder, local_files_only=True, use_safetensors=True
    )
    other = other.float().eval()
    with torch.no_grad():
        theirs = other(probe(model)).logits[0]
    return [*proofs, proof("transformers", ours, theirs, dtype)]


def probe(model: Transformer) -> Tensor:
    """(1, T) ids spread over the whole vocabulary."""
    size = min(_PROBE_TOKENS, model.config.seq_len)
    return (torch.arange(size) * 7919 % model.config.vocab_size)[None]


@torch.no_grad()
def probe_logits(model: Transformer) -> Tensor:
    """(T, V) logits of `probe`, float32; the model is on the CPU."""
    return model.logits(model(probe(model)))[0]


def proof(reader: str, ours: Tensor, theirs: Tensor, dtype: str) -> str:
    """One line comparing logits (T, V), with their standard deviation for scale.

    SotaError 70 if they differ by more than the dtype explains.
    """
    difference, spread = float((ours - theirs).abs().max()), float(ours.std())
    typical = float((ours - theirs).square().mean().sqrt())
    found = f"logits differ by at most {difference:.3g} (their spread is {spread:.3g})"
    if not typical <= _ALLOWED[dtype] * max(spread, 1e-3):
        text = f"the export differs from the model: read by {reader}, {found}; nothing was written"
        raise SotaError(text, DIVERGED)
    return f"read back by {reader}: {found}"
