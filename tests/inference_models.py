"""Small models for inference tests, and the same weights as `transformers` models."""

import dataclasses
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sota_transformer.config import VOCAB, Data, Model
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.training import checkpoint

TINY = Model(layers=2, d_model=32, heads=4, kv_heads=2, d_ff=48, seq_len=32, vocab_size=700)
FULL = dataclasses.replace(TINY, vocab_size=VOCAB)  # every token of the tokenizer
WIDE = dataclasses.replace(FULL, d_model=64, d_ff=96, seq_len=64)  # rows fit Q8_0's blocks
KINDS = {"llama": WIDE, "qwen3": dataclasses.replace(WIDE, qk_norm=True)}


def small_model(config: Model = TINY, seed: int = 0, spread: float = 8.0) -> Transformer:
    """Random weights, larger than at the start of training so that predictions are not uniform."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            elif "embedding" not in name:
                parameter.mul_(spread)
        model.embedding.weight.mul_(spread)
    return model.eval()


def as_transformers(model: Transformer) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """The same function in `transformers`, with weights copied by hand, not by our export."""
    c = model.config
    kind, make = (Qwen3Config, Qwen3ForCausalLM) if c.qk_norm else (LlamaConfig, LlamaForCausalLM)
    config = kind(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.seq_len,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    other = make(config).eval()
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(model.embedding.weight)
        other.model.norm.weight.copy_(model.norm.weight)
        for ours, theirs in zip(model.blocks, other.model.layers, strict=True):
            queries = c.heads * c.head_dim
            keys = queries + c.kv_heads * c.head_dim
            qkv = ours.attention.qkv.weight
            theirs.self_attn.q_proj.weight.copy_(qkv[:queries])
            theirs.self_attn.k_proj.weight.copy_(qkv[queries:keys])
            theirs.self_attn.v_proj.weight.copy_(qkv[keys:])
            theirs.self_attn.o_proj.weight.copy_(ours.attention.out.weight)
            theirs.mlp.gate_proj.weight.copy_(ours.mlp.gate_up.weight[: c.d_ff])
            theirs.mlp.up_proj.weight.copy_(ours.mlp.gate_up.weight[c.d_ff :])
            theirs.mlp.down_proj.weight.copy_(ours.mlp.down.weight)
            theirs.input_layernorm.weight.copy_(ours.attention_norm.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.mlp_norm.weight)
            if c.qk_norm:
                theirs.self_attn.q_norm.weight.copy_(ours.attention.q_norm.weight)
                theirs.self_attn.k_norm.weight.copy_(ours.attention.k_norm.weight)
    return other


def write_run(folder: Path, model: Transformer, data: Path | None = None, step: int = 3) -> Path:
    """A run folder as training leaves it, with these weights at `step`."""
    config = PRESETS["tiny"]()
    config = dataclasses.replace(
        config,
        model=model.config,
        data=Data(path=data or Path()),
        train=dataclasses.replace(config.train, steps=step),
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    trainer = {"updates": step, "bad_steps": 0, "skipped": 0}
    state = checkpoint.State(step=step, model=model.state_dict(), optim={}, trainer=trainer)
    checkpoint.save(folder, state)
    return folder
