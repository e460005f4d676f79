"""The network against transformers' Llama and Qwen3, and against plain formulas."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from sota_transformer.config import Model
from sota_transformer.model import cpu
from sota_transformer.model.cpu import attend_in_blocks
from sota_transformer.model.loss import token_loss
from sota_transformer.model.transformer import (
    Cache,
    Dropout,
    Transformer,
    attend,
    drop,
    same_document,
)
from sota_transformer.presets import PRESETS
from tests.inference_models import as_transformers

SMALL = Model(layers=3, d_model=64, heads=4, kv_heads=2, d_ff=96, seq_len=48, vocab_size=211)


def build(config: Model, seed: int = 0) -> Transformer:
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # gains other than one, so that a forgotten one shows
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator()))
    return model


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_logits_and_gradients_equal_transformers(qk_norm: bool, kv_heads: int) -> None:
    config = dataclasses.replace(SMALL, qk_norm=qk_norm, kv_heads=kv_heads)
    model = build(config)
    theirs = as_transformers(model)
    tokens = torch.randint(
        0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1)
    )
    ours, expected = model.logits(model(tokens)), theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    target = tokens.roll(-1, 1).reshape(-1)
    F.cross_entropy(ours.flatten(0, 1), target).backward()
    F.cross_entropy(expected.flatten(0, 1), target).backward()
    gradient = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(model.embedding.weight.grad, gradient, rtol=1e-4, atol=1e-6)
    for ours_block, block in zip(model.blocks, theirs.model.layers, strict=True):
        attention, mlp = block.self_attn, block.mlp
        qkv = torch.cat([getattr(attention, f"{c}_proj").weight.grad for c in "qkv"])
        torch.testing.assert_close(ours_block.attention.qkv.weight.grad, qkv, rtol=1e-4, atol=1e-6)
        down = mlp.down_proj.weight.grad
        torch.testing.assert_close(ours_block.mlp.down.weight.grad, down, rtol=1e-4, atol=1e-6)
        gain = block.input_layernorm.weight.grad
        torch.testing.assert_close(
            ours_block.attention_norm.weight.grad, gain, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_counts_the_parameters(name: str) -> None:
    config = PRESETS[name]().model
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count
    qk = dataclasses.replace(config, qk_norm=True)
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(qk).parameters()) == qk.parameter_count


def test_a_token_sees_no_later_token() -> None:
    model = build(SMALL).eval()
    tokens = torch.randint(0, 211, (1, 24))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 211
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [10, 1, 1, 12], [5, 7, 12]])
def test_the_cache_gives_the_same_hidden_states(pieces: list[int]) -> None:
    model = build(SMALL).eval()
    tokens = torch.randint(0, 211, (2, 24))
    cache = Cache(model, 2, 24)
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-5, atol=1e-5)


DOCUMENTS = torch.tensor([[0] * 9 + [1] * 30 + [2], [0] * 20 + [1] * 20])


@pytest.mark.parametrize("in_blocks", [False, True])
def test_with_a_mask_each_document_is_as_if_alone(in_blocks: bool) -> None:
    model = build(SMALL)
    for block in model.blocks:
        block.attention.compiled_on_cpu = in_blocks
    tokens = torch.randint(0, 211, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))
    together = model(tokens, mask=same_document(DOCUMENTS))
    for row, numbers in enumerate(DOCUMENTS):
        for number in numbers.unique():
            chosen = numbers == number
            alone = model(tokens[row][chosen][None])
            torch.testing.assert_close(together[row][chosen][None], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, model(tokens), atol=1e-3)


@pytest.mark.parametrize("mask", [None, same_document(DOCUMENTS[:, :16])])
def test_gradient_checkpointing_changes_nothing(mask: torch.Tensor | None) -> None:
    tokens = torch.randint(0, 211, (2, 16))
    dropout = Dropout(torch.tensor(0.2), torch.tensor([5, 6], dtype=torch.int32))
    gradients = []
    for checkpointing in (False, True):
        model = build(SMALL)
        model.gradient_checkpointing = checkpointing
        hidden = model(tokens, dropout, mask=mask)
        token_loss(hidden, model.embedding.weight, tokens, 0.1).smoothed.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_tied_gradient_accumulates_in_the_heads_buffer(monkeypatch) -> None:
    """Without a copy, which is 154 MB at 125M; a second micro-batch is added as a whole."""
    model, tokens = build(SMALL), torch.randint(0, 211, (2, 17))
    weight = model.embedding.weight
    logits = F.linear(model.eval()(tokens[:, :-1]), weight)  # dense, entirely by autograd
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    expected, weight.grad = weight.grad, None
    made, head_loss = [], cpu.head_loss

    def noted(*arguments):
        found = head_loss(*arguments)
        made.append(found[2].data_ptr())
        return found

    monkeypatch.setattr(cpu, "head_loss", noted)
    model.train()
    alone = []
    for row in tokens:
        token_loss(model(row[None, :-1]), weight, row[1:], 0.0).smoothed.backward()
        assert weight.grad.data_ptr() == made[-1]
        alone.append(weight.grad)
        weight.grad = None
    for row in tokens:
        token_loss(model(row[None, :-1]), weight, row[1:], 0.0).smoothed.backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(weight.grad, alone[0] + alone[1])


def test_initialisation_is_scaled_and_seeded() -> None:
    config = PRESETS["16m"]().model
    first, second = Transformer(config), Transformer(config)
    for model in (first, second):
        model.init_weights(torch.Generator().manual_seed(3))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    block = first.blocks[0]
    assert float(block.attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(block.mlp.down.weight.detach().std()) == pytest.approx(0.02 / 8**0.5, rel=0.02)
    tokens = torch.randint(0, 50_257, (1, 64), generator=torch.Generator().manual_seed(3))
    loss = F.cross_entropy(first.logits(first(tokens))[0], tokens[0].roll(-1))
    assert float(loss.detach()) == pytest.approx(10.825, abs=0.15)  # ln 50,258


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_dropout_has_its_rate_and_keeps_the_mean(rate: float) -> None:
    keys = torch.tensor([11, 12], dtype=torch.int32)
    dropped = drop(torch.ones(2, 500, 256), Dropout(torch.tensor(rate), keys), 1)
    assert float((dropped == 0).float().mean()) == pytest.approx(rate, abs=0.005)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)


def test_dropout_masks_are_independent() -> None:
    """Neighboring keys, sites, rows and columns agree as often as independent coins would."""
    half = torch.tensor(0.5)
    keys = torch.arange(8, dtype=torch.int32)
    ones = torch.ones(8, 64, 256)
    masks = [
        drop(ones, Dropout(half, keys + shift), site) > 0 for shift in (0, 8) for site in (0, 1)
    ]
    pairs = [(masks[i], masks[j]) for i in range(4) for j in range(i)]
    pairs += [(m[:-1], m[1:]) for m in masks]
    pairs += [(m[:, :-1], m[:, 1:]) for m in masks] + [(m[:, :, :-1], m[:, :, 1:]) for m in masks]
    for a, b in pairs:
        assert float((a == b).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_dropout_is_a_function_of_the_row_alone() -> None:
    x, keys = torch.randn(4, 8, 32), torch.tensor([3, 1, 4, 15], dtype=torch.int32)
    rate = torch.tensor(0.3)
    whole = drop(x, Dropout(rate, keys), 2)
    parts = [drop(x[i : i + 2], Dropout(rate, keys[i : i + 2]), 2) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))


def test_bfloat16_is_close_to_float32() -> None:
    model = build(SMALL)
    half = Transformer(SMALL, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 211, (2, 16))
    torch.testing.assert_close(half(tokens).float(), model(tokens), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tokens", [1, 63, 64, 256, 300, 512])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_equals_sdpa(tokens: int, kv_heads: int, masked: bool) -> None:
    """Values and gradients in float64, also with a shorter last block."""
    source = torch.Generator().manual_seed(tokens)
    shapes = [(2, 4, tokens, 16), (2, kv_heads, tokens, 16), (2, kv_heads, tokens, 16)]
    leaves = [torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]
    seed = torch.randn(2, 4, tokens, 16, generator=source, dtype=torch.float64)
    results = []
    documents = torch.arange(tokens).div(torch.tensor([[37], [90]]), rounding_mode="floor")
    mask = same_document(documents) if masked else None
    for attention in (attend, attend_in_blocks):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        y = attention(*inputs, mask)
        y.backward(seed)
        results.append([y, *(x.grad for x in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
