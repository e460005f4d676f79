"""A second trainer, written from the documents alone, to check every figure of the first.

`Twin` reads the shards with numpy and computes in eager float64 what `docs/` and the papers say:
the model (Llama; Qwen3 with QK-norm) with explicit attention, the smoothed loss, clipping, AdamW
(Loshchilov and Hutter 2019), NorMuon (Li et al. 2025), schedules, validation. From the program it
takes only what no document specifies, and checks its properties: initial weights, the seeded order
of windows, the best-fit windows and the hash behind dropout. `twins.py` makes runs and compares.
"""

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sota_transformer.config import Model
from sota_transformer.data.loader import BatchLoader
from sota_transformer.data.packing import BestFit
from sota_transformer.model.transformer import Dropout, Transformer, drop

EOT, PAD = 50_256, 50_257
Array = np.ndarray[Any, Any]
Weights = dict[str, Tensor]
Fields = dict[str, dict[str, Any]]
# Quintics of the Polar Express (Amsel et al. 2025) for singular values from 1/1000 on, and
# NorMuon's constants, as in modded-nanogpt.
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def stream(folder: Path, split: str) -> Array:
    """All tokens of a split: its shards concatenated in name order."""
    names = sorted(p for p in folder.glob(f"{split}-*.npy") if p.name.count(".") == 1)
    tokens = np.concatenate([np.load(path) for path in names]).astype(np.int64)
    told = json.loads((folder / "manifest.json").read_text())["splits"][split]
    assert len(tokens) == told["tokens"] and (tokens == EOT).sum() == told["documents"]
    return tokens


def cut(tokens: Array, length: int) -> Array:
    """Window i is tokens i x T to i x T + T, inclusive: (windows, T + 1)."""
    starts = np.arange((len(tokens) - 1) // length) * length
    return tokens[starts[:, None] + np.arange(length + 1)]


def best_fit(folder: Path, tokens: Array, length: int) -> Array:
    """The program's best-fit windows, after checking that they hold every prediction within a
    document exactly once, and split no document that fits.
    """
    windows = np.stack(list(BestFit(folder, "train", length))).astype(np.int64)
    wanted: Counter[bytes] = Counter()
    for document in np.split(tokens, np.flatnonzero(tokens == EOT) + 1)[:-1]:
        for at in range(0, max(1, len(document) - 1), length):
            wanted[document[at : at + length + 1].tobytes()] += 1
    found: Counter[bytes] = Counter()
    for window in windows:
        text = window[: len(window) - int((window == PAD).sum())]
        parts = np.split(text, np.flatnonzero(text == EOT) + 1)
        found.update(part.tobytes() for part in parts if len(part))
    assert found == wanted, "best-fit windows do not hold each piece once"
    return windows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich 2019."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """Su et al. 2021 on (B, H, T, h): component i of a head and i + h/2 turn together."""
    half = x.shape[-1] // 2
    turn = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * turn
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attention(w: Weights, name: str, m: dict[str, Any], x: Tensor, see: Tensor) -> Tensor:
    """Softmax attention written out; `see` (B, 1, T, T) tells who may attend to whom."""
    rows, tokens, _ = x.shape
    heads, kv, width = m["heads"], m["kv_heads"], m["d_model"] // m["heads"]
    parts = (x @ w[f"{name}.qkv.weight"].T).split([heads * width, kv * width, kv * width], -1)
    q, k, v = (part.view(rows, tokens, -1, width).transpose(1, 2) for part in parts)
    if m["qk_norm"]:
        q = rms_norm(q, w[f"{name}.q_norm.weight"], m["norm_eps"])
        k = rms_norm(k, w[f"{name}.k_norm.weight"], m["norm_eps"])
    q, k = rotate(q, m["rope_base"]), rotate(k, m["rope_base"])
    k, v = (part.repeat_interleave(heads // kv, 1) for part in (k, v))
    scores = (q @ k.mT / math.sqrt(width)).masked_fill(~see, -math.inf)
    mixed = scores.softmax(-1) @ v
    return mixed.transpose(1, 2).reshape(rows, tokens, -1) @ w[f"{name}.out.weight"].T


def logits(
    w: Weights,
    m: dict[str, Any],
    tokens: Tensor,
    masked: bool = False,
    rate: float = 0.0,
    keys: Tensor | None = None,
) -> Tensor:
    """(B, T) -> (B, T, V). Dropout applies to the embeddings and to each half-block's output."""

    def dropped(x: Tensor, layer: int, site: int) -> Tensor:
        if keys is None:
            return x
        dropout = Dropout(torch.tensor(rate, dtype=torch.float32), keys + layer * 0x51ED27)
        return x * drop(torch.ones_like(x), dropout, site)

    see = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()[None, None]
    if masked:
        document = (tokens == EOT).long().cumsum(1) - (tokens == EOT).long()
        see = see & (document[:, None, :, None] == document[:, None, None, :])
    x = dropped(w["embedding.weight"][tokens], 0, 0)
    for layer in range(m["layers"]):
        name, eps = f"blocks.{layer}", m["norm_eps"]
        y = rms_norm(x, w[f"{name}.attention_norm.weight"], eps)
        x = x + dropped(attention(w, f"{name}.attention", m, y, see), layer + 1, 1)
        y = rms_norm(x, w[f"{name}.mlp_norm.weight"], eps)
        gate, up = (y @ w[f"{name}.mlp.gate_up.weight"].T).chunk(2, -1)
        fed = (gate * gate.sigmoid() * up) @ w[f"{name}.mlp.down.weight"].T
        x = x + dropped(fed, layer + 1, 2)
    return rms_norm(x, w["norm.weight"], m["norm_eps"]) @ w["embedding.weight"].T


def nats(found: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(smoothed, plain) negative log-likelihood of each target, zero at padding: (B, T).

    Szegedy et al. 2016: the target's distribution is mixed with the uniform one.
    """
    total, own = found.logsumexp(-1), found.gather(-1, targets[..., None])[..., 0]
    counted = targets != PAD
    plain = (total - own) * counted
    if not smoothing:
        return plain, plain
    return (total - (1 - smoothing) * own - smoothing * found.mean(-1)) * counted, plain


def judged(w: Weights, config: Fields, windows: list[Array], token_bytes: Array) -> dict[str, Any]:
    """Loss over windows, each predicted in its own context, with a ratio estimator's error."""
    sums = []
    for window in windows:
        ids = torch.from_numpy(window)[None]
        with torch.no_grad():
            found = logits(w, config["model"], ids[:, :-1], config["data"]["document_mask"])
            loss = nats(found, ids[:, 1:])[1].sum().item()
        sums.append((loss, len(window) - 1, token_bytes[window[1:]].sum()))
    total, tokens, size = np.array(sums, float).sum(0)
    mean, n = total / tokens, len(sums)
    spread = sum((loss - mean * count) ** 2 for loss, count, _ in sums)
    error = math.sqrt(n / (n - 1) * spread) / tokens if n > 1 else None
    bits = total / math.log(2) / size
    return {"nats": mean, "error": error, "perplexity": math.exp(mean), "bits_per_byte": bits,
            "tokens": int(tokens)}  # fmt: skip


class Twin:
    """One run in float64, from its first step or from any state."""

    def __init__(self, config: Fields, weights: Weights | None = None) -> None:
        """`config` is config.json; `weights` those of an imported model, else the seed's."""
        self.step = self.updates = self.tokens = self.row = 0
        self.state: dict[str, Weights] = {}
        self.best: float | None = None  # lowest validation loss
        self.best_before: float | None = None  # before the newest, as the last step is saved first
        self.log: dict[int, dict[str, float]] = {}
        self.validations: dict[int, dict[str, Any]] = {}
        if weights is None:
            model = Transformer(Model(**config["model"]))
            generator = torch.Generator().manual_seed(config["run"]["seed"])
            model.init_weights(generator, muon=config["optim"]["matrix_rate"] > 0)
            weights = model.state_dict()
        self.weights = {name: value.double() for name, value in weights.items()}
        self.first = {name: value.clone() for name, value in self.weights.items()}
        self.change(config)

    def change(self, config: Fields, epoch: bool = False) -> None:
        """Continue with another config; `epoch`: from the start of its next epoch."""
        self.config, folder = config, Path(config["data"]["path"])
        length = config["model"]["seq_len"]
        self.windows = cut(train := stream(folder, "train"), length)
        if config["data"]["windows"] == "best-fit":
            self.windows = best_fit(folder, train, length)
        self.held_out = stream(folder, "val")
        if epoch:
            self.row = -(-self.row // len(self.windows)) * len(self.windows)

    def copy(self) -> "Twin":
        """An independent branch."""
        return copy.deepcopy(self)

    def _batch(self) -> tuple[Array, Tensor]:
        """This step's windows (B, T + 1) and their dropout keys; each window once per epoch."""
        size, rows = len(self.windows), self.config["train"]["batch_rows"]
        seed = self.config["run"]["seed"]
        loader = BatchLoader(self.windows, seed, lambda _: range(self.row, self.row + rows))
        for epoch in {self.row // size, (self.row + rows - 1) // size}:
            whole = BatchLoader(self.windows, seed, lambda n: range(n * size, n * size + size))
            assert sorted(whole.window_ids(epoch)) == list(range(size)), "not each window once"
        return self.windows[loader.window_ids(0)], torch.from_numpy(loader.dropout_keys(self.step))

    def rate(self) -> float:
        """AdamW's: linear warm-up (at most 5% of the run), then a cosine or a linear cooldown."""
        o, steps = self.config["optim"], self.config["train"]["steps"]
        warmup, peak, final = (
            min(o["warmup_steps"], steps // 20),
            o["learning_rate"],
            o["final_fraction"],
        )
        if self.step < warmup:
            return peak * (self.step + 1) / warmup
        if o["cooldown"]:
            left = min(1.0, (steps - self.step) / steps / o["cooldown"])
            return peak * (final + (1 - final) * left)
        done = (self.step - warmup) / (steps - warmup)
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)

    def train_step(self) -> None:
        """One update with the mean smoothed loss over all targets that are not padding."""
        o, m, steps = self.config["optim"], self.config["model"], self.config["train"]["steps"]
        windows, keys = self._batch()
        start, end = o["dropout_start"], o["dropout_end"]
        rate = start + (end - start) * (self.step / (steps - 1) if steps > 1 else 0)
        w = {name: value.requires_grad_() for name, value in self.weights.items()}
        ids = torch.from_numpy(windows)
        off = keys if start or end else None
        found = logits(w, m, ids[:, :-1], self.config["data"]["document_mask"], rate, off)
        smoothed, plain = nats(found, ids[:, 1:], o["label_smoothing"])
        count = int((ids[:, 1:] != PAD).sum())
        gradients = torch.autograd.grad(smoothed.sum() / count, list(w.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        scale = min(1.0, o["clip_norm"] / norm) if o["clip_norm"] else 1.0
        lr = self.rate()
        self.weights = {name: value.detach() for name, value in w.items()}
        for name, gradient in zip(w, gradients, strict=True):
            self._update(name, gradient * scale, lr)
        self.step, self.updates = self.step + 1, self.updates + 1
        self.row, self.tokens = self.row + len(windows), self.tokens + count
        self.log[self.step] = {
            "loss": plain.sum().item() / count, "smoothed_loss": smoothed.sum().item() / count,
            "lr": lr, "dropout": rate, "gradient_norm": norm, "tokens": self.tokens,
        }  # fmt: skip

    def _update(self, name: str, gradient: Tensor, lr: float) -> None:
        """AdamW; with a matrix rate, NorMuon for the blocks' matrices, and gains at a tenth."""
        o, weight = self.config["optim"], self.weights[name]
        matrix = weight.ndim == 2
        if o["matrix_rate"] and matrix and name.startswith("blocks"):
            m, muon = self.config["model"], lr * o["matrix_rate"] / o["learning_rate"]
            width = m["d_model"] // m["heads"]
            sizes = [len(weight)]
            if "qkv" in name:
                sizes = [m["heads"] * width, m["kv_heads"] * width, m["kv_heads"] * width]
            elif "gate_up" in name:
                sizes = [m["d_ff"], m["d_ff"]]
            parts = zip(weight.split(sizes), gradient.split(sizes), strict=True)
            for number, (part, slope) in enumerate(parts):
                self._normuon(f"{name}.{number}", part, slope, muon)
            return
        state = self.state.setdefault(name, {"mean": 0 * weight, "square": 0 * weight})
        state["mean"] = o["beta1"] * state["mean"] + (1 - o["beta1"]) * gradient
        state["square"] = o["beta2"] * state["square"] + (1 - o["beta2"]) * gradient**2
        mean = state["mean"] / (1 - o["beta1"] ** (self.updates + 1))
        square = state["square"] / (1 - o["beta2"] ** (self.updates + 1))
        if o["matrix_rate"]:
            lr *= 1.0 if matrix else 0.1
        elif matrix:
            weight *= 1 - lr * o["weight_decay"]
        weight -= lr * mean / (square.sqrt() + o["eps"])

    def _normuon(self, name: str, weight: Tensor, gradient: Tensor, lr: float) -> None:
        """Nesterov momentum, orthogonalized, rows brought to equal norm, then the norm restored.

        The decay is cautious: only where the update shrinks the weight as well (Chen et al. 2025).
        """
        state = self.state.setdefault(name, {"momentum": 0 * weight, "rows": 0 * weight[:, :1]})
        mu = 0.85 + 0.1 * min(1.0, self.updates / 300)
        state["momentum"] = mu * state["momentum"] + (1 - mu) * gradient
        x = mu * state["momentum"] + (1 - mu) * gradient
        x = x / (1.02 * x.norm() + 1e-6)
        for a, b, c in POLAR:
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        state["rows"] = 0.95 * state["rows"] + 0.05 * x.square().mean(1, keepdim=True)
        even = x / (state["rows"].sqrt() + 1e-10)
        even = even * x.norm() / (even.norm() + 1e-10)
        shrinks = weight * (even * weight > 0) * self.config["optim"]["weight_decay"]
        rows, columns = weight.shape
        weight -= lr * math.sqrt(max(1, rows / columns)) * (even + shrinks)

    def validate(self, token_bytes: Array) -> None:
        """Plain loss on windows spread evenly over the validation split, without dropout."""
        length, train = self.config["model"]["seq_len"], self.config["train"]
        windows = cut(self.held_out, length)
        wanted = max(1, min(len(windows), train["eval_tokens"] // length))
        chosen = [(len(windows) - 1) * i // max(1, wanted - 1) for i in range(wanted)]
        result = judged(self.weights, self.config, [windows[i] for i in chosen], token_bytes)
        self.validations[self.step] = result
        self.best_before = self.best
        if self.best is None or result["nats"] < self.best:
            self.best = result["nats"]

    def run(self, steps: int, token_bytes: Array) -> None:
        """Train up to this step, with the validations that are due."""
        every = self.config["train"]["eval_every"]
        while self.step < steps:
            self.train_step()
            if self.step == self.config["train"]["steps"] or (every and not self.step % every):
                self.validate(token_bytes)
