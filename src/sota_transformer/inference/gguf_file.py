"""Writes a GGUF file for llama.cpp and Ollama, including the tokenizer, and reads it back.

Needs the package `gguf` (extra [gguf]). Names are llama.cpp's. Its `llama` applies RoPE to adjacent
pairs where ours uses halves, so rows of q and k are interleaved; its `qwen3` uses halves.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from sota_transformer.config import Model
from sota_transformer.data.tokenizer import EOT
from sota_transformer.inference.layout import expected_shapes, huggingface_tensors, own_model
from sota_transformer.inference.tokenizer_files import merges, vocabulary
from sota_transformer.model.loss import PAD
from sota_transformer.model.transformer import Transformer

Array = np.ndarray[Any, Any]
NAME = "model.gguf"
_KINDS = gguf.GGMLQuantizationType
_FILES = gguf.LlamaFileType
_TYPES = {
    "float32": (_KINDS.F32, _FILES.ALL_F32),
    "float16": (_KINDS.F16, _FILES.MOSTLY_F16),
    "bfloat16": (_KINDS.BF16, _FILES.MOSTLY_BF16),
    "q8_0": (_KINDS.Q8_0, _FILES.MOSTLY_Q8_0),
}
_BLOCK = 32  # elements that share a scale in Q8_0


def _names(config: Model, theirs: Iterable[str]) -> dict[str, str]:
    """llama.cpp's name of each tensor by Hugging Face's."""
    known = gguf.get_tensor_name_map(_architecture(config), config.layers)
    return {name: f"{known[name.removesuffix('.weight')]}.weight" for name in theirs}


def _architecture(config: Model) -> gguf.MODEL_ARCH:
    return gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA


def _interleaved(config: Model, name: str, array: Array, back: bool = False) -> Array:
    """Reorder rows of q and k to llama.cpp's order, or back to ours."""
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads is None or config.qk_norm:
        return array
    half = config.head_dim // 2
    inner = (half, 2) if back else (2, half)
    return array.reshape(heads, *inner, -1).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path: Path, model: Transformer, dtype: str, name: str) -> None:
    """Write the whole file; matrices in `dtype`, norms in float32."""
    config = model.config
    kind, file_type = _TYPES[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_architecture(config)])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)  # required beside quantized tensors
    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    tensors = huggingface_tensors(model)
    names = _names(config, tensors)
    for theirs, tensor in tensors.items():
        array = _interleaved(config, theirs, tensor.numpy())
        used = kind if array.ndim == 2 else _KINDS.F32
        if used == _KINDS.Q8_0 and array.shape[-1] % _BLOCK:
            used = _KINDS.F16  # rows do not divide into blocks
        data = gguf.quants.quantize(np.ascontiguousarray(array), used)
        writer.add_tensor(names[theirs], data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """GPT-2's vocabulary, with rows beyond it marked as unused."""
    known = vocabulary()
    texts = [*known, *(f"<|unused_{i}|>" for i in range(len(known), size))][:size]
    types = [gguf.TokenType.NORMAL] * EOT + [gguf.TokenType.CONTROL] * (size - EOT)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([f"{a} {b}" for a, b in merges()])
    writer.add_bos_token_id(EOT)
    writer.add_eos_token_id(EOT)
    writer.add_pad_token_id(PAD if size > PAD else EOT)
    writer.add_add_bos_token(False)


def read_gguf(path: Path, config: Model) -> Transformer:
    """The model of a file that `write_gguf` wrote for `config`, float32 on the CPU."""
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path, "c").tensors  # copy-on-write map: FUSE has it too
    }
    shapes = expected_shapes(config)
    names, tensors = _names(config, shapes), {}
    for theirs, shape in shapes.items():
        array = _interleaved(config, theirs, stored[names[theirs]].reshape(shape), back=True)
        tensors[theirs] = torch.from_numpy(np.array(array, np.float32))
    return own_model(config, tensors)


def modelfile(config: Model) -> str:
    """Ollama's Modelfile for the GGUF file beside it: plain continuation, no chat.

    Ollama 0.12 to 0.29 tokenizes every `qwen3` with Qwen's tokenizer, whatever the file says.
    Versions before 0.14 reject the REQUIRES line, later ones show it.
    """
    needs = "REQUIRES 0.30.0\n" if config.qk_norm else ""
    return (
        f"FROM ./{NAME}\n{needs}"
        'TEMPLATE """{{ .Prompt }}"""\n'
        f"PARAMETER num_ctx {config.seq_len}\n"
        "PARAMETER temperature 0.8\n"
        "PARAMETER top_p 0.95\n"
        'PARAMETER stop "<|endoftext|>"\n'
    )
