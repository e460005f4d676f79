"""Runs with random options against their twins (`twin.py`): a difference is a bug, or a document's.

Each case is a run of the real command. Some resume from a checkpoint in the middle, with or without
changes, start from another run's weights, or use two ranks. Compared are all logged figures,
validations, the best step, the final weights, and `sota evaluate` and greedy `sota generate` on the
last checkpoint.
"""

import json
import math
import random
import shutil
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.presets import flag

from .commands import Finished, Zygote, sota
from .twin import Twin, judged, logits, stream

# The program computes in float32, with 7.2 digits: a loss near 11 nats is accurate to about 1e-6,
# and sums over 50,258 words and several steps cost another digit.
LOSS, NORM = 1e-4, 2e-3
# Both optimizers scale a gradient that is pure rounding up to the size of a real one, NorMuon for
# whole rows: a float32 twin was 7% off in how far a matrix moved. Allowed share of that distance:
WEIGHTS, MUON = 0.01, 0.1
Options = dict[str, Any]


@dataclass
class Result:
    """What was compared, the largest differences, and what is wrong."""

    runs: int = 0
    compared: int = 0
    left: int = 0  # runs that skipped a step, which a twin never does
    largest: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        far = ", ".join(f"{name} {value:.1e}" for name, value in sorted(self.largest.items()))
        told = f"{self.runs:,} runs, {self.left:,} of them not compared, {self.compared:,} figures"
        return f"{told}; largest differences: {far}"

    def same(self, case: str, name: str, value: Any, twin: Any, allowed: float) -> None:
        """Compare one figure with the twin's, relative to a magnitude of at least 1."""
        self.compared += 1
        if value is None or twin is None:
            far = 0.0 if value is twin else math.inf
        else:
            far = abs(value - twin) / max(1e-3 if name == "lr" else 1.0, abs(twin))
        self.largest[name] = max(self.largest.get(name, 0.0), far)
        if not far <= allowed:
            self.wrong.append(f"{case}: {name} is {value}, the twin's {twin}")


def texts(folder: Path) -> list[Path]:
    """Python sources cut into documents of many lengths: three JSON lines files."""
    source = random.Random(11)
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    folder.mkdir(parents=True)
    for number, pieces in enumerate((40, 30, 16)):
        lines = []
        for path in source.sample(library, pieces):
            text = path.read_text(errors="replace")
            length = source.choice([9, 60, 300, 900] if number < 2 else [200, 400])
            at = source.randrange(max(1, len(text) - length))
            lines.append(json.dumps({"text": text[at : at + length].strip() or path.name}))
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return sorted(folder.iterdir())


def prepared(root: Path, zygote: Zygote) -> list[Path]:
    """Data with one shard per split, with two, and so little that a run reads it many times."""
    files, folders = texts(root / "texts"), [root / f"data-{name}" for name in "abc"]
    for names, out in ((files[:1], 0), (files[:1], 1), (files[1:2], 1), (files[2:], 2)):
        more = ["--append"] if out == 1 and (folders[1] / "manifest.json").exists() else []
        share = "0.5" if out == 2 else "0.2"
        words = ["prepare", *map(str, names), "--out", str(folders[out]), "--val-fraction", share]
        done = zygote.run([*words, "--workers", "1", *more])
        assert done.code == 0, done.output
    return folders


def draw(source: random.Random, folders: list[Path]) -> Options:
    """Fields of a run that takes about a second."""
    pick, heads = source.choice, source.choice([1, 2, 4])
    muon, tokens = source.random() < 0.4, source.choice([8, 9, 16, 33, 48])
    rows = source.randint(1, max(1, min(8, 96 // tokens)))
    steps = pick([1, 3, 5, 8, 13, 21, 30]) if tokens > 16 else pick([2, 7, 21, 40, 60])
    return {
        "model.layers": source.randint(1, 3), "model.heads": heads,
        "model.kv_heads": pick([n for n in (1, 2, 4) if n <= heads]),
        "model.d_model": heads * pick([4, 6, 8]), "model.d_ff": pick([5, 16, 24]),
        "model.seq_len": tokens, "model.vocab_size": pick([50_258, 50_304]),
        "model.rope_base": pick([10_000.0, 300.0]), "model.norm_eps": pick([1e-5, 1e-6, 0.1]),
        "model.qk_norm": pick([True, False]), "data.path": str(pick(folders)),
        "data.windows": pick(["stream", "best-fit"]), "data.document_mask": pick([True, False]),
        "optim.learning_rate": pick([0.01, 0.05]) if muon else pick([3e-4, 1e-3, 3e-3]),
        "optim.matrix_rate": pick([0.005, 0.03]) if muon else 0.0,
        "optim.cooldown": pick([0.0, 0.4, 0.65, 1.0]),
        "optim.final_fraction": pick([0.0, 0.1, 1.0]),
        "optim.warmup_steps": pick([0, 1, 3, 4000]), "optim.beta1": pick([0.5, 0.8, 0.9]),
        "optim.beta2": pick([0.9, 0.98, 0.998]), "optim.eps": pick([1e-8, 1e-6]),
        "optim.weight_decay": pick([0.0, 0.01, 0.5]), "optim.clip_norm": pick([0.0, 0.1, 1.0]),
        "optim.label_smoothing": pick([0.0, 0.1, 0.3]), "optim.dropout_end": pick([0.0, 0.2]),
        "optim.dropout_start": pick([0.0, 0.1, 0.4]), "train.steps": steps,
        "train.batch_rows": rows, "train.keep_checkpoints": 99,
        "train.micro_rows": pick([0, *(n for n in range(1, rows + 1) if rows % n == 0)]),
        "train.gradient_checkpointing": source.random() < 0.2, "train.log_every": pick([1, 1, 3]),
        "train.eval_every": pick([0, 4, 7]), "train.eval_tokens": pick([1, 50, 150, 600]),
        "train.sample_every": 0, "train.save_every_steps": max(1, steps // 2),
        "run.seed": source.randrange(10**6), "run.device": "cpu", "run.threads": 1,
        "run.dtype": "float32", "run.compile": "off",
    }  # fmt: skip


def command(options: Options, out: Path, *more: str) -> list[str]:
    """`sota train` with these fields."""
    flags = (flag(*field) for field in options.items())
    return ["train", "tiny", "--run.out", str(out), *flags, *more]


def changes(source: random.Random, options: Options, folders: list[Path]) -> tuple[Options, str]:
    """Fields that change at a checkpoint in the middle, and the value of --data-change."""
    steps, tokens = options["train.steps"], options["model.seq_len"]
    new = source.choice([
        {}, {"train.steps": steps + 4},
        {"train.batch_rows": options["train.batch_rows"] + 1, "train.micro_rows": 0},
        {"optim.learning_rate": 0.005, "optim.weight_decay": 0.1}, {"model.seq_len": tokens + 8},
        {"optim.label_smoothing": 0.2, "optim.clip_norm": 0.5}, {"data.document_mask": True},
        {"data.windows": "best-fit"}, {"run.seed": 5}, {"optim.beta1": 0.5, "optim.beta2": 0.9},
        {"optim.dropout_start": 0.5, "optim.cooldown": 0.5}, {"train.eval_tokens": 50},
        {"train.micro_rows": 1}, {"data.path": str(source.choice(folders))},
        {"data.path": str(source.choice(folders))},
    ])  # fmt: skip
    return options | new, source.choice(["continue", "restart-epoch"])


def fields_of(out: Path) -> dict[str, dict[str, Any]]:
    """config.json."""
    return json.loads((out / "config.json").read_text())


class Pairs:
    """Runs and compares, case by case."""

    def __init__(self, root: Path, zygote: Zygote, really: float = 0.1) -> None:
        """`really`: the share of commands started as a user does."""
        self.root, self.zygote, self.really, self.result = root, zygote, really, Result()
        self.folders, self.tokenizer = prepared(root, zygote), Tokenizer()
        self.bytes = self.tokenizer.token_bytes
        for folder in self.folders:  # token sizes are those of their source text
            told = json.loads((folder / "manifest.json").read_text())["splits"]
            for split, values in told.items():
                assert self.bytes[stream(folder, split)].sum() == values["text_bytes"]

    def case(self, number: int, source: random.Random) -> None:
        """One run and its twin, and perhaps a second run that continues from it."""
        name, out = f"case {number}", self.root / f"run-{number}"
        options, before = draw(source, self.folders), len(self.result.wrong)
        twin = self._begin(name, options, out, source)
        if twin is None:
            return
        half, steps = options["train.save_every_steps"], options["train.steps"]
        twin.run(half, self.bytes)
        middle = twin.copy()
        twin.run(steps, self.bytes)
        self._compare(name, out, twin)
        if source.random() < 0.5 and half < steps:
            self._go_on(f"{name} from step {half}", options, out, middle, source)
        if source.random() < 0.4:
            self._used(name, out, twin if twin.config == fields_of(out) else middle)
        if len(self.result.wrong) == before:
            shutil.rmtree(out)

    def _start(self, name: str, words: list[str], source: random.Random) -> Finished | None:
        """Run the command, as a user starts it or from the zygote."""
        self.result.runs += 1
        done = sota(words, self.root) if source.random() < self.really else self.zygote.run(words)
        if done.code != 0:
            self.result.wrong.append(
                f"{name}: {' '.join(words)}: {done.code}: {done.output[-900:]}"
            )
            return None
        return done

    def _begin(self, name: str, options: Options, out: Path, source: random.Random) -> Twin | None:
        """The run from its first step or from imported weights, and a twin at the same point."""
        weights = None
        if source.random() < 0.15:
            other = self.root / "other"
            shutil.rmtree(other, ignore_errors=True)
            first = command(options | {"train.steps": 2, "run.seed": 3}, other)
            if self._start(name, first, source) is None:
                return None
            words = ["import", str(other), "--out", str(out), "--data", options["data.path"]]
            if self._start(name, words, source) is None:
                return None
            weights = load_file(other / "checkpoints/step-00000002/model.safetensors")
        if self._start(name, command(options, out), source) is None:
            return None
        told = fields_of(out)
        for path, value in options.items():
            section, field_name = path.split(".")
            if told[section][field_name] != value:
                self.result.wrong.append(f"{name}: {path} is {told[section][field_name]} in config")
        return Twin(told, weights)

    def _go_on(
        self, name: str, options: Options, out: Path, twin: Twin, source: random.Random
    ) -> None:
        """Resume from the checkpoint in the middle, with or without a change."""
        new, how = changes(source, options, self.folders)
        changed = [field for field in new if new[field] != options[field]]
        words = command(new, out, "--resume", f"step:{twin.step}", "--data-change", how)
        for path in set(changed) - {"data.path", "train.micro_rows", "train.eval_tokens"}:
            words += ["--override", f"{path}={new[path]}"]
        name = f"{name} with {', '.join(f'{path}={new[path]}' for path in changed)} {how}"
        if self._start(name, words, source) is None:
            return
        if set(changed) & {"model.seq_len", "data.document_mask", "train.eval_tokens", "data.path"}:
            twin.best = None
        twin.change(fields_of(out), "data.path" in changed and how == "restart-epoch")
        twin.run(new["train.steps"], self.bytes)
        self._compare(name, out, twin)

    def _compare(self, name: str, out: Path, twin: Twin) -> None:
        """Compare everything that the run left with its twin."""
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        starts = [i for i, line in enumerate(lines) if line.get("event") == "start"]
        mine = lines[starts[-1] + 1 :]
        if any(line.get("event") == "skipped" for line in mine):
            self.result.left += 1
            return
        begun, same = lines[starts[-1]]["step"], self.result.same
        every, last = twin.config["train"]["log_every"], twin.step
        logged = {line["step"]: line for line in mine if "loss" in line}
        wanted = {s for s in range(begun + 1, last + 1) if s % every == 0 or s == last}
        if set(logged) != wanted:
            self.result.wrong.append(f"{name}: logged {sorted(logged)}, not {sorted(wanted)}")
        for step in sorted(wanted & set(logged)):
            for key, value in twin.log[step].items():
                allowed = {"gradient_norm": NORM, "tokens": 0.0, "lr": 1e-9, "dropout": 1e-9}
                same(f"{name}, step {step}", key, logged[step][key], value, allowed.get(key, LOSS))
        found = {line["step"]: line for line in mine if "val_loss" in line}
        judgements = {step: v for step, v in twin.validations.items() if step > begun}
        if set(found) != set(judgements):
            self.result.wrong.append(f"{name}: validated {sorted(found)}, not {sorted(judgements)}")
        names = {"val_loss": "nats", "val_error": "error", "val_perplexity": "perplexity",
                 "val_bits_per_byte": "bits_per_byte", "val_tokens": "tokens"}  # fmt: skip
        for step in sorted(set(found) & set(judgements)):
            for key, other in names.items():
                value = judgements[step][other]
                allowed = 0.0 if other == "tokens" else 10 * LOSS if other[0] == "p" else LOSS
                same(f"{name}, step {step}", key, found[step][key], value, allowed)
        folder = out / f"checkpoints/step-{last:08d}"
        self._state(name, folder, twin)

    def _state(self, name: str, folder: Path, twin: Twin) -> None:
        """The last checkpoint: weights, counters and the best step before it."""
        weights = load_file(folder / "model.safetensors")
        assert set(weights) == set(twin.weights)
        for key, value in weights.items():
            way = (twin.weights[key] - twin.first[key]).norm().item()
            far = (value.double() - twin.weights[key]).norm().item()
            rounding = 1e-6 * twin.weights[key].norm().item()
            share = max(0.0, far - rounding) / max(way, 1e-12)
            muon = twin.config["optim"]["matrix_rate"] and value.ndim == 2 and "blocks" in key
            kind = "a NorMuon matrix" if muon else "a matrix" if value.ndim == 2 else "gains"
            self.result.same(name, f"movement of {kind}", share, 0.0, MUON if muon else WEIGHTS)
        told = json.loads((folder / "trainer.json").read_text())
        for key, value in (("tokens", twin.tokens), ("rows", twin.row), ("updates", twin.updates)):
            self.result.same(name, key, told[key], value, 0.0)
        if twin.best_before is not None:
            best = told["best"] or {"nats": None, "step": 0}
            self.result.same(name, "lowest loss", best["nats"], twin.best_before, LOSS)
            kept = (folder.parent / f"step-{best['step']:08d}").is_dir()
            self.result.same(name, "its checkpoint", int(kept), 1, 0.0)

    def _used(self, name: str, out: Path, twin: Twin) -> None:
        """`sota evaluate` and `sota generate` on the last checkpoint."""
        length, text = twin.config["model"]["seq_len"], twin.held_out
        windows = [text[at : at + length + 1] for at in range(0, len(text) - 1, length)]
        wanted = judged(twin.weights, twin.config, windows, self.bytes)
        done = self.zygote.run(["evaluate", str(out), "--json", "--device", "cpu"])
        if done.code != 0:
            self.result.wrong.append(f"{name}: evaluate: {done.output[-900:]}")
            return
        told = json.loads(done.output[done.output.index("{") :])
        for key, value in wanted.items():
            allowed = 10 * LOSS if key == "perplexity" else LOSS
            self.result.same(name, f"evaluate {key}", told[key], value, allowed)
        words = ["--prompt", "def f(", "--temperature", "0", "--json", "--device", "cpu"]
        ids = self.tokenizer.encode("def f(")
        more = length - len(ids)
        done = self.zygote.run(["generate", str(out), "--max-tokens", str(more), *words])
        greedy, close = list(ids), False
        for _ in range(more):
            with torch.no_grad():
                at = logits(twin.weights, twin.config["model"], torch.tensor([greedy]))[0, -1]
            first, second = at[:50_257].topk(2).values.tolist()
            close |= first - second < 1e-4
            greedy.append(int(at[:50_257].argmax()))
            if greedy[-1] == 50_256:
                greedy.pop()
                break
        told = json.loads(done.output[done.output.index("{") :])
        if not close and told["tokens"] != greedy[len(ids) :]:
            self.result.wrong.append(f"{name}: generate {told}, the twin {greedy}")


def pairs(root: Path, zygote: Zygote, count: int, seed: int) -> Result:
    """`count` runs with random options and their twins."""
    torch.set_num_threads(1)
    both = Pairs(root, zygote)
    for number in range(count):
        both.case(number, random.Random(seed * 100_003 + number))
    return both.result
