"""What `sota doctor` computes on a device, and what it should have been.

One probe for each silent fault that a backend has shipped, held against the CPU's arithmetic in
float64 or float32; and one training step of a small model, for the doctor to compare. A probe
takes the device and its precision, and returns an error as a share of what is right.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sota_transformer.config import Model
from sota_transformer.inference.generate import Rows
from sota_transformer.model.loss import token_loss
from sota_transformer.model.optim import optimizers, update
from sota_transformer.model.transformer import Dropout, Transformer, attend
from sota_transformer.presets import PRESETS, Recipe
from sota_transformer.runtime import Runtime

_SCALE = 1024.0  # of the loss, as training scales it: float16 would lose small gradients


def _error(result: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the expected values' largest."""
    difference = (result.detach().cpu().double() - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp(min=1e-30))


def farthest(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest distance of two tensors as a share of the expected one's norm; NaN if any is."""
    pairs = zip(results, expected, strict=True)
    return float(torch.stack([(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]).max())


def _probe_head(device: torch.device, dtype: torch.dtype) -> float:
    x, weight = torch.randn(24, 64, dtype=torch.float64), torch.randn(50_258, 64).double()
    result = F.linear(x.to(device, dtype), weight.to(device, dtype))
    return _error(result, x.to(dtype).double() @ weight.to(dtype).double().t())


def _probe_head_gradient(device: torch.device, dtype: torch.dtype) -> float:
    """Of the hidden states: a sum over the vocabulary, which must end where the head does.

    Behind it lie large numbers, in memory that has just been freed.
    """
    hidden, head = torch.randn(32, 64).to(dtype), torch.randn(50_258, 64).div(8).to(dtype)
    targets = torch.arange(32)
    logits = (hidden.double() @ head.double().t()).requires_grad_()
    F.cross_entropy(logits, targets, reduction="sum").backward()
    assert logits.grad is not None
    float(torch.full((50_400, 64), 1e4, dtype=dtype, device=device).sum())
    there = hidden.to(device).requires_grad_()
    token_loss(there, head.to(device), targets.to(device), 0.0).smoothed.backward()
    assert there.grad is not None
    return _error(there.grad, logits.grad @ head.double())


def _probe_strided_linear(device: torch.device, dtype: torch.dtype) -> float:
    x = torch.randn(3, 64, 40).to(dtype)
    weight = torch.randn(96, 64).to(dtype)
    strided = x.to(device).transpose(1, 2)
    result = F.linear(strided[:, ::2], weight.to(device))
    return _error(result, x.double().transpose(1, 2)[:, ::2] @ weight.double().t())


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by its formula, in float64."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def _probe_attention(device: torch.device, dtype: torch.dtype) -> float:
    q, k, v = (torch.randn(2, 4, 130, 64).to(device, dtype) for _ in range(3))
    return _error(attend(q, k, v), _attention(q, k, v))


def _probe_permuted_attention(device: torch.device, dtype: torch.dtype) -> float:
    q, k, v = (torch.randn(2, 130, 4, 64).to(device, dtype).transpose(1, 2) for _ in range(3))
    # As our model does it: made contiguous first, which is the known way around the fault.
    contiguous = q.contiguous(), k.contiguous(), v.contiguous()
    return _error(attend(*contiguous), _attention(q, k, v))


def _probe_batched(device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.randn(96, 65, 130).to(dtype), torch.randn(96, 130, 66).to(dtype)
    there, doubles = a.to(device), a.double()
    plain = _error(torch.bmm(there, b.to(device)), torch.bmm(doubles, b.double()))
    square = _error(there @ there.mT, doubles @ doubles.mT)  # as in NorMuon
    return float(torch.tensor([plain, square]).max())  # NaN if one is


def _probe_softmax(device: torch.device, dtype: torch.dtype) -> float:
    logits = torch.randn(16, 50_258) * 40
    result = logits.to(device).log_softmax(-1).exp()
    return _error(result, logits.double().softmax(-1))


def _probe_generation(device: torch.device, dtype: torch.dtype) -> float:
    """With cached keys and values, against one pass without on the CPU."""
    shape = Model(
        layers=1, d_model=128, heads=2, kv_heads=2, d_ff=64, seq_len=32, vocab_size=512
    )  # heads of 64: Metal has a kernel for these
    model = Transformer(shape)
    model.init_weights(torch.Generator().manual_seed(1), muon=True)
    for weight, _ in model.matrices():  # so that attention weighs
        weight.data.normal_(0.0, 0.1)
    long, short = torch.randint(512, (2, 20)).tolist()
    short = short[:4]
    with torch.no_grad():
        expected = torch.stack(
            [model.logits(model(torch.tensor([x])))[0, -1] for x in (long, short)]
        )
        model.dtype = dtype
        rows = Rows(model.to(device), 2)
        rows.start(0, long[:-2])
        rows.start(1, short[:-1])
        rows.step([0], long[-2:-1])
        found = rows.step([0, 1], [long[-1], short[-1]])
    return _error(found, expected)


def _probe_update(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> float:
    """What two updates change in every weight, against the CPU with products in float32."""
    expected = _updated(recipe, torch.device("cpu"), torch.float32)
    # NorMuon's five iterations add roundings up.
    return farthest(_updated(recipe, device, dtype), expected) / 4


def _updated(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The changes of each parameter, from gradients that are the same everywhere."""
    shape = Model(layers=1, d_model=64, heads=2, kv_heads=2, d_ff=96, seq_len=8, vocab_size=128)
    model, source = Transformer(shape, dtype), torch.Generator().manual_seed(1)
    model.init_weights(source)
    before = [p.detach().double() for p in model.parameters()]
    both = optimizers(model.to(device), PRESETS["tiny"](recipe).optim)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=source).to(device)
        update(both, 0.1)  # far above what rounding changes
    after = [p.detach().cpu().double() for p in model.parameters()]
    return [a - b for a, b in zip(after, before, strict=True)]


def one_step(runtime: Runtime, kind: str) -> tuple[float, list[Tensor]]:
    """Loss in nats, and the gradients, on the CPU; of more tokens than a chunk of the head.

    The model is the one that the doctor asks a device of this `kind`. For CUDA it has the 5 * 2**20
    elements from which on inductor sums rows and columns in one kernel.
    """
    layers, width, vocabulary = (1, 512, 1024) if kind == "cuda" else (2, 128, 4096)
    rows = {"cpu": 5, "mps": 20, "cuda": 84}[kind]
    sizes = {"layers": layers, "d_model": width, "heads": width // 64, "kv_heads": width // 64}
    shape = Model(seq_len=128, vocab_size=vocabulary, d_ff=344, qk_norm=True, **sizes)
    device = runtime.device
    model = Transformer(shape, runtime.dtype)
    model.init_weights(torch.Generator().manual_seed(1))
    model.to(device)
    runtime.optimize(model)
    source = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocabulary, (rows, 129), generator=source).to(device)
    keys = torch.arange(rows, dtype=torch.int32, device=device)
    hidden = model(tokens[:, :-1], Dropout(torch.tensor(0.1, device=device), keys))
    sums = token_loss(hidden, model.embedding.weight, tokens[:, 1:], 0.1, runtime.compile)
    loss = sums.smoothed / sums.count
    (loss * _SCALE).backward()
    gradients = [p.grad.float().cpu() / _SCALE for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), gradients


PROBES: dict[str, Callable[[torch.device, torch.dtype], float]] = {
    "vocabulary head, batch over 8 (pytorch#109457)": _probe_head,
    "gradient through the vocabulary (pytorch#195163)": _probe_head_gradient,
    "linear of a strided input (pytorch#161640)": _probe_strided_linear,
    "attention (pytorch#163597, #195910)": _probe_attention,
    "attention of permuted q, k, v (pytorch#181133)": _probe_permuted_attention,
    "batched products (pytorch#197636)": _probe_batched,
    "softmax of large logits (pytorch#107294)": _probe_softmax,
    "generation of uneven rows (pytorch#182285)": _probe_generation,
    "updates of AdamW": partial(_probe_update, "seed"),
    "updates of NorMuon and AdamW": partial(_probe_update, "fast"),
}
