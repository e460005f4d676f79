"""Compiled blocks on a CPU equal uncompiled ones. Slow: each case compiles again."""

import dataclasses

import pytest
import torch

from sota_transformer.config import Model, Run
from sota_transformer.model.loss import token_loss
from sota_transformer.model.transformer import Dropout, Transformer, same_document
from sota_transformer.runtime import Runtime

PLAIN = Model(layers=2, d_model=64, heads=4, kv_heads=4, d_ff=176, seq_len=128, vocab_size=50_258)
CASES = {
    "plain": (PLAIN, False, False),
    "masked": (PLAIN, True, False),
    "checkpointing": (PLAIN, False, True),
    "masked, checkpointing": (PLAIN, True, True),
    "grouped queries": (dataclasses.replace(PLAIN, kv_heads=2), True, False),
    "normalised": (dataclasses.replace(PLAIN, qk_norm=True), False, False),
    "odd length": (dataclasses.replace(PLAIN, seq_len=100), False, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_give_the_same_gradients(case: str, dtype: torch.dtype) -> None:
    config, masked, checkpointing = CASES[case]
    runtime = Runtime.detect(Run(device="cpu", compile="on"), 10**9)
    assert runtime.compile
    tokens = torch.randint(50_257, (2, config.seq_len), generator=torch.Generator().manual_seed(1))
    documents = torch.arange(config.seq_len).expand(2, -1) // 37
    dropout = Dropout(torch.tensor(0.1), torch.tensor([3, 4], dtype=torch.int32))
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = Transformer(config, dtype)
        model.init_weights(torch.Generator().manual_seed(0))
        model.gradient_checkpointing = checkpointing
        if compiled:
            runtime.optimize(model)
        hidden = model(tokens, dropout, mask=same_document(documents) if masked else None)
        loss = token_loss(hidden, model.embedding.weight, tokens.roll(-1), 0.1)
        (loss.smoothed / loss.count).backward()
        found.append((float(loss.nll), [p.grad for p in model.parameters()]))
    exact = dtype == torch.float32
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5 if exact else 1e-3)
    for eager, other in zip(found[0][1], found[1][1], strict=True):
        error = (other - eager).norm() / eager.norm()
        assert float(error) < (1e-4 if exact else 0.03)
