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
from sota_transformer.model.loss import IGNORED, PAD, targets_of, token_loss
from sota_transformer.model.optim import clip, gradient_norm, optimizers, update
from sota_transformer.model.transformer import (
    Dropout,
    Transformer,
    attend,
    project,
    same_document,
)
from sota_transformer.presets import PRESETS, Recipe
from sota_transformer.runtime import Runtime

_SCALE = 1024.0  # of the loss, as training scales it: float16 would lose small gradients


def _error(result: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the expected values' largest."""
    difference = (result.detach().cpu().double() - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp(min=1e-30))


def _worst(errors: list[float]) -> float:
    """The largest; NaN if one is."""
    return float(torch.tensor(errors).max())


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def farthest(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest distance of two tensors as a share of the expected one's norm; NaN if any is."""
    pairs = zip(results, expected, strict=True)
    return float(torch.stack([(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]).max())


def _probe_head(device: torch.device, dtype: torch.dtype) -> float:
    x, weight = torch.randn(24, 64, dtype=torch.float64), torch.randn(50_258, 64).double()
    result = F.linear(x.to(device, dtype), weight.to(device, dtype))
    return _error(result, x.to(dtype).double() @ weight.to(dtype).double().t())


def _probe_vocabulary(device: torch.device, dtype: torch.dtype) -> float:
    """And the loss, of a tied head: a sum over the vocabulary, which must end where the head does,
    and rows that are looked up and added to all over it. Most targets repeat their token, so that
    their logits are large.

    Behind it lie large numbers, in memory that has just been freed.
    """
    head = torch.randn(50_258, 64).mul(0.3).to(dtype).float()
    windows = torch.arange(18).mul(2956).repeat_interleave(4).view(2, 36)
    windows[0, -4:] = windows[1, -9:] = PAD
    expected = head.double().requires_grad_()
    hidden = F.embedding(windows[:, :-1], expected)
    logits, targets = hidden @ expected.t(), targets_of(windows)
    hidden.retain_grad()
    given = {"label_smoothing": 0.1, "reduction": "sum", "ignore_index": IGNORED}
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **given)
    loss.backward()
    float(torch.full((50_400, 64), 1e4, dtype=dtype, device=device).sum())
    there, windows = head.to(device).requires_grad_(), windows.to(device)
    ours = F.embedding(windows[:, :-1], there).to(dtype)
    ours.retain_grad()
    found = token_loss(ours, there, targets_of(windows), 0.1).smoothed
    (found * 0.5).backward()
    pairs = (ours, hidden), (there, expected)
    errors = [_error(_gradient(a) * 2, _gradient(b)) for a, b in pairs]
    return _worst([*errors, _error(found, loss.detach())])


def _probe_strided_linear(device: torch.device, dtype: torch.dtype) -> float:
    """As our model does it, whose way on MPS also avoids the fault."""
    x = torch.randn(3, 64, 40).to(dtype)
    weight = torch.randn(96, 64).to(dtype)
    strided = x.to(device).transpose(1, 2)
    result = project(strided[:, ::2], weight.to(device))
    return _error(result, x.double().transpose(1, 2)[:, ::2] @ weight.double().t())


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention by its formula, in float64."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def _probe_attention(device: torch.device, dtype: torch.dtype) -> float:
    q, k, v = (torch.randn(2, 130, 4, 64).to(device, dtype).transpose(1, 2) for _ in range(3))
    # As our model does it: made contiguous first, since permuted ones gave wrong results.
    contiguous = q.contiguous(), k.contiguous(), v.contiguous()
    return _error(attend(*contiguous), _attention(q, k, v))


def _probe_documents(device: torch.device, dtype: torch.dtype) -> float:
    """Attention and its gradients, causal and with a mask of documents; grouped queries."""
    given = [torch.randn(2, heads, 130, 64).to(dtype) for heads in (4, 2, 2)]
    weights = torch.randn(2, 4, 130, 64).to(dtype)
    ids = torch.arange(260).view(2, 130) // 37
    errors = []
    for masked in (False, True):
        doubles = [x.double().requires_grad_() for x in given]
        q, k, v = doubles
        expected = _attention(q, k, v, same_document(ids) if masked else None)
        (expected * weights.double()).sum().backward()
        there = [x.detach().to(device).requires_grad_() for x in given]
        q, k, v = there
        found = attend(q, k, v, same_document(ids.to(device)) if masked else None)
        (found * weights.to(device)).sum().backward()
        errors.append(_error(found, expected.detach()))
        errors += [_error(_gradient(a), _gradient(b)) for a, b in zip(there, doubles, strict=True)]
    return _worst(errors)


def _probe_batched(device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.randn(96, 65, 130).to(dtype), torch.randn(96, 130, 66).to(dtype)
    there, doubles = a.to(device), a.double()
    plain = _error(torch.bmm(there, b.to(device)), torch.bmm(doubles, b.double()))
    square = _error(there @ there.mT, doubles @ doubles.mT)  # as in NorMuon
    return _worst([plain, square])


def _probe_softmax(device: torch.device, dtype: torch.dtype) -> float:
    logits = torch.randn(16, 50_258) * 40
    result = logits.to(device).log_softmax(-1).exp()
    return _error(result, logits.double().softmax(-1))


def _probe_generation(device: torch.device, dtype: torch.dtype) -> float:
    """With cached keys and values, against one pass without on the CPU: rows of different lengths,
    together and alone; the cache of several heads has gaps. From 1,024 keys on Metal has another
    kernel.
    """
    errors = []
    for kv_heads in (1, 2):
        shape = Model(
            layers=1,
            d_model=128,
            heads=2,
            kv_heads=kv_heads,
            d_ff=64,
            seq_len=1030,
            vocab_size=512,
            qk_norm=True,
        )  # heads of 64: Metal has a kernel for these
        model = Transformer(shape)
        model.init_weights(torch.Generator().manual_seed(1), muon=True)
        for weight, _ in model.matrices():  # so that attention weighs
            weight.data.normal_(0.0, 0.1)
        errors.append(_generated(model, device, dtype))
    return _worst(errors)


@torch.no_grad()
def _generated(model: Transformer, device: torch.device, dtype: torch.dtype) -> float:
    texts = [torch.randint(512, (length,)).tolist() for length in (1030, 20, 4)]
    known = [model.logits(model(torch.tensor([text])))[0] for text in texts]
    model.dtype = dtype
    rows, found, expected = Rows(model.to(device), 3), [], []
    for row, text in enumerate(texts):
        rows.start(row, text[:-3])
    for step in ([0, 1, 2], [1, 2], [0], [2]):  # the rows that advance together
        places = [rows.lengths[row] for row in step]
        expected += [known[row][place] for row, place in zip(step, places, strict=True)]
        found.append(rows.step(step, [texts[row][p] for row, p in zip(step, places, strict=True)]))
    return _error(torch.cat(found), torch.stack(expected))


def _probe_update(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> float:
    """What two updates change in every weight, against the CPU with products in float32."""
    expected = _updated(recipe, torch.device("cpu"), torch.float32)
    error = farthest(_updated(recipe, device, dtype), expected)
    if recipe == "fast":
        return error / 4  # NorMuon's five iterations add roundings up
    return error if dtype == torch.float32 else error * 100  # AdamW is in float32 all the same


def _updated(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The changes of each parameter, from gradients that are the same everywhere, and what those
    were clipped to: neither optimizer minds their size.
    """
    shape = Model(layers=1, d_model=64, heads=2, kv_heads=2, d_ff=96, seq_len=8, vocab_size=20_000)
    model, source = Transformer(shape, dtype), torch.Generator().manual_seed(1)
    model.init_weights(source)
    before = [p.detach().double() for p in model.parameters()]
    both = optimizers(model.to(device), PRESETS["tiny"](recipe).optim)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=source).to(device)
        clip(model, float(gradient_norm(model)), 1.0)
        update(both, 0.1)  # far above what rounding changes
    after = [p.detach().cpu().double() for p in model.parameters()]
    clipped = [p.grad.cpu().double() for p in model.parameters() if p.grad is not None]
    return [*clipped, *(a - b for a, b in zip(after, before, strict=True))]


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
    smoothed, _, count = torch.stack([total.detach().float() for total in sums]).tolist()
    return smoothed / count, gradients


PROBES: dict[str, Callable[[torch.device, torch.dtype], float]] = {
    "vocabulary head, batch over 8 (pytorch#109457)": _probe_head,
    "gradient through the vocabulary (pytorch#195163)": _probe_vocabulary,
    "linear of a strided input (pytorch#161640)": _probe_strided_linear,
    "attention (pytorch#163597, #181133, #195910)": _probe_attention,
    "attention within documents (pytorch#196678)": _probe_documents,
    "batched products (pytorch#197636)": _probe_batched,
    "softmax of large logits (pytorch#107294)": _probe_softmax,
    "generation of uneven rows (pytorch#182285)": _probe_generation,
    "updates of AdamW": partial(_probe_update, "seed"),
    "updates of NorMuon and AdamW": partial(_probe_update, "fast"),
}
