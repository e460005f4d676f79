"""What `sota config`, `plan` and `train` report about a run, derived from its options and text.

`Reckoned` is one run as given by its options and the text; lines and figures follow the guide.
`windows.py` asks the program and compares.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from .cutting import Cut, Side, evenly, mask, stream

Array = np.ndarray[Any, Any]
Fields = dict[str, dict[str, Any]]
IGNORED = -1  # the target value that the loss ignores


# The recipes' settings in the guide and docs/decisions.md.
RECIPES: dict[bool, dict[str, Any]] = {
    False: {
        "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.01,
        "warmup_steps": 4000, "final_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.1,
        "dropout_start": 0.1, "dropout_end": 0.0, "matrix_rate": 0.0, "cooldown": 0.0,
    },
    True: {
        "cooldown": 0.65, "final_fraction": 0.0, "label_smoothing": 0.0, "dropout_start": 0.0,
        "dropout_end": 0.0,
    },
}  # fmt: skip


def recipe_of(config: Fields, options: dict[str, Any], fast: bool) -> list[str]:
    """Where the config differs from the guide's recipe, other than by options."""
    own = {f"optim.{name}": value for name, value in RECIPES[fast].items()} | options
    found = {f"optim.{name}": value for name, value in config["optim"].items()}
    wrong = [
        f"{name} is {found[name]}" for name in found if found[name] != own.get(name, found[name])
    ]
    if fast != (config["optim"]["matrix_rate"] > 0) or fast != config["model"]["qk_norm"]:
        wrong.append("NorMuon and normalised queries do not go with the recipe")
    return [f"recipe: {each}" for each in wrong]


def parameters(m: dict[str, Any]) -> int:
    """Llama's, or Qwen3's with query and key norms; the tied embedding counts once."""
    width = m["d_model"] // m["heads"]
    matrices = [
        (m["heads"] * width, m["d_model"]), (m["kv_heads"] * width, m["d_model"]),
        (m["kv_heads"] * width, m["d_model"]), (m["d_model"], m["heads"] * width),
        *[(m["d_ff"], m["d_model"])] * 3,
    ]  # fmt: skip
    block = sum(a * b for a, b in matrices) + 2 * m["d_model"] + 2 * width * m["qk_norm"]
    return m["vocab_size"] * m["d_model"] + m["layers"] * block + m["d_model"]


def gigabytes(config: Fields) -> float:
    """Size of a checkpoint: weights and two moments; NorMuon keeps one for the blocks' matrices."""
    m, count = config["model"], parameters(config["model"])
    blocks = count - m["vocab_size"] * m["d_model"]
    return (12 * count - 4 * blocks * bool(config["optim"]["matrix_rate"])) / 1e9


def share(ratio: float) -> str:
    return format(ratio, ".2g" if ratio < 1 else ".1f")


def things(number: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def schedule(config: Fields, step: int) -> tuple[float, float]:
    """Learning rate and dropout of the update made by step `step`, counted from 1."""
    o, steps, done = config["optim"], config["train"]["steps"], step - 1
    start, end = o["dropout_start"], o["dropout_end"]
    dropout = start + (end - start) * done / (steps - 1) if steps > 1 else start
    warmup, peak, final = (
        min(o["warmup_steps"], steps // 20),
        o["learning_rate"],
        o["final_fraction"],
    )
    if done < warmup:
        return peak * step / warmup, dropout
    if o["cooldown"]:
        height = min(1.0, (steps - done) / (steps * o["cooldown"]))
    else:
        height = (1 + math.cos(math.pi * (done - warmup) / (steps - warmup))) / 2
    return peak * (final + (1 - final) * height), dropout


class Reckoned:
    """One run: its options (config.json), its text, its windows."""

    def __init__(self, config: Fields, sides: dict[str, Side], cut: Cut, path: Path) -> None:
        self.config, self.sides, self.cut, self.path = config, sides, cut, path
        self.count = parameters(config["model"])
        self.length, self.rows = config["model"]["seq_len"], config["train"]["batch_rows"]
        self.packed = config["data"]["windows"] == "best-fit"
        share = (cut.targets + cut.own) / cut.windows[:, 1:].size if self.packed else 1.0
        self.padding = 1 - share
        self.each = round(self.rows * self.length * share)

    def described(self, done: int = 0, learned: int = 0) -> list[str]:
        """The description of the run, with `done` steps and `learned` tokens behind it."""
        o, steps = self.config["optim"], self.config["train"]["steps"]
        total, warmup = learned + (steps - done) * self.each, min(o["warmup_steps"], steps // 20)
        work = f"{things(steps, 'step')} x {self.each:,} tokens ="
        if learned != done * self.each:
            went = f" {done:,} with {learned:,} tokens and {steps - done:,} x {self.each:,} ="
            work = f"{things(steps, 'step')},{went if done < steps else ''}"
        short = f" (capped at 5% of the run; {o['warmup_steps']} configured)"
        fall = (
            f"linear decay over the last {o['cooldown']:.0%}" if o["cooldown"] else "cosine decay"
        )
        muon = f", NorMuon {o['matrix_rate']:g} on the blocks' matrices" * bool(o["matrix_rate"])
        return [
            f"model: {self.count:,} parameters, context {self.length}",
            f"run: {work} {total:,} tokens, {share(total / self.count)} per parameter",
            f"schedule: peak learning rate {o['learning_rate']:g}{muon}, "
            f"{things(warmup, 'warm-up step')}{short * (warmup < o['warmup_steps'])}, {fall} "
            f"to {o['final_fraction']:.0%}; dropout {o['dropout_start']:g} -> "
            f"{o['dropout_end']:g}; label smoothing {o['label_smoothing']:g} (reported losses "
            "exclude it)",
        ]

    def announced(self, micro: int, ranks: int = 1, done: int = 0, learned: int = 0) -> list[str]:
        """What a start prints, except for the machine; `micro` rows at a time."""
        steps, there = self.config["train"]["steps"], len(self.sides["train"].tokens)
        total, data = learned + (steps - done) * self.each, self.config["data"]
        kind = "cut from the token stream"
        if self.packed:
            kind = f"packed by best fit, {self.padding:.1%} padding, which no loss counts; "
            kind += "validation windows are cut from the token stream"
        sees = "; attention crosses documents"
        if data["document_mask"]:
            sees = "; attention stays within a document, in training and validation"
        lines = [
            *self.described(done, learned),
            f"data: {self.path}, {there:,} training tokens, {total / there:.2f} epochs; "
            f"{len(self.sides['val'].tokens):,} validation tokens",
            f"windows: {len(self.cut.windows):,} {kind}{sees}",
            f"micro-batch {micro} x {self.length}, accumulated {self.rows // micro // ranks}x",
        ]
        if more := self.repeated(total, there):
            lines.append(f"note: {total / there:.1f} epochs over the data; {more}")
        return lines

    def repeated(self, total: int, there: int) -> str:
        """What is said of reading the text too often."""
        most = 1 if 60 * there < self.count else 2 if 10 * there < self.count else 4
        most = most if self.config["optim"]["matrix_rate"] else 4
        each = self.rows * self.length
        steps = max(1, most * there // each)
        text = f"beyond 4 epochs the model overfits: add text or use --steps {steps}"
        if most < 4:
            text = f"this recipe soon memorizes so little text: add text, use --steps {steps} "
            text += f"({things(most, 'epoch')}), or keep the best checkpoint by validating in "
            text += f"every epoch (--train.eval-every {max(1, there // each)})"
        return text * (total > most * there)

    def memory(self) -> str:
        """Weights, gradients and moments."""
        state = gigabytes(self.config)
        return (
            f"memory: {state + 4 * self.count / 1e9:.2f} GB for weights, gradients and moments in "
            "float32, plus the activations of a micro-batch; a checkpoint takes "
            f"{state:.2f} GB"
        )

    def planned(self) -> list[str]:
        """The other lines of a plan that do not depend on timing."""
        train, there = self.config["train"], len(self.sides["train"].tokens)
        total, keep = self.each * train["steps"], train["keep_checkpoints"] + 2
        useful, law = min(total, 4 * there), "expected loss: no prediction; the scaling law was not"
        if useful >= self.count:  # Hoffmann et al. 2022, approach 3
            nats = 1.69 + 406.4 / self.count**0.34 + 410.7 / useful**0.28
            law = f"expected loss: {nats:.2f} +- 0.3 nats on web text (Chinchilla's law, annealed, "
            law += f"without label smoothing), perplexity {math.exp(nats):.0f}"
        read = f"data: {there:,} training tokens, read {total / there:.2f} times"
        return [
            *self.described(),
            f"measured here over {self.each:,} tokens;",
            f"for {things(train['steps'], 'step')}, without validation and samples",
            f"{read}; {more}" if (more := self.repeated(total, there)) else read,
            f"disk: {keep * gigabytes(self.config):.2f} GB for {keep} checkpoints",
            f"balance: {share(total / self.count)} tokens per parameter; about 20 is balanced",
            law,
            self.memory(),
        ]

    def validation(self) -> tuple[Cut, list[set[int]]]:
        """All validation windows, and for each one used, which it may be."""
        cut, wanted = stream(self.sides["val"], self.length), self.config["train"]["eval_tokens"]
        count = max(1, min(len(cut.windows), wanted // self.length))
        return cut, evenly(len(cut.windows), count)


class Seen:
    """What the model was given in a run, from `watching.py`: training rows, then validations."""

    def __init__(self, path: Path) -> None:
        found, self.training, self.judged = list[tuple[int, Array, Array]](), [], []
        with path.open("rb") as file:
            while file.tell() < path.stat().st_size:
                kind, ids = int(np.load(file)), np.load(file)
                found.append((kind, ids, np.load(file) if kind < 2 else np.zeros(0)))
        path.unlink()
        rows: list[list[Any]] = []
        targets: list[Array] = []
        self.sizes: set[int] = set()
        for kind, ids, see in found:
            if kind < 2:
                masks = see[:, 0] if see.size else [None] * len(ids)
                rows += [[kind, *row] for row in zip(ids, masks, strict=True)]
                self.sizes |= {len(ids)} if kind == 0 else set()
            else:
                targets += [*np.atleast_2d(ids)]
        for (kind, ids, see), target in zip(rows, targets, strict=True):
            (self.judged if kind else self.training).append((ids, target, see))


def fits(row: tuple[Array, Array, Array | None], cut: Cut, at: int, masked: bool) -> str:
    """Difference between what the model was given and window `at`; "" if none."""
    ids, targets, see = row
    window, pad = cut.windows[at], 50_257
    if (ids != window[:-1]).any():
        return "other inputs"
    if (targets != np.where(window[1:] == pad, IGNORED, window[1:])).any():
        return "other targets"
    if (see is not None) != masked:
        return "a mask, or none"
    if see is not None:
        counted = targets != IGNORED
        if (see[counted] != mask(cut.numbers[at][None])[0][counted]).any():
            return f"wrong mask, with documents {np.diff(np.flatnonzero(see[-1]))[:3]}"
    return ""


def metrics(out: Path, key: str) -> dict[int, dict[str, Any]]:
    """Lines of metrics.jsonl with this key, the last one per step."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if key in line}
