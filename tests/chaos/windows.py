"""What a run reads and reports, compared with plain numpy and an independent calculation.

Each case is one folder of tokens, either made by `sota prepare` from a random small corpus (tiny
documents, a giant one, several shards, parts, --append) or as another program leaves it.
`cutting.py` reads it and cuts it by docs/format.md. Compared are the loader's batches for 1, 2 and
4 ranks over some epochs, the output of `sota data`, `config` and `plan`, and what `sota train`
really gives its model (`watching.py`), logs and prints, also after resuming, and how many tokens
`sota evaluate` uses.
"""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sota_transformer.data import merge
from sota_transformer.data.loader import BatchLoader
from sota_transformer.data.packing import BestFit, document_ids
from sota_transformer.data.shards import TokenWindows
from sota_transformer.errors import BAD_DATA
from sota_transformer.presets import flag

from .commands import Finished, Zygote
from .corpora import SPLITS, Maker
from .cutting import PAD, Cut, best_fit, pieces, read, stream, write_foreign
from .reckoning import Reckoned, Seen, fits, metrics, recipe_of, schedule
from .showing import shown

SMALL = 3000  # bytes of a unit of work, as in small.py


@dataclass
class Result:
    """Counts, and a description of everything that went wrong."""

    cases: int = 0
    windows: int = 0
    rows: int = 0
    commands: int = 0
    refused: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.kinds.most_common())
        return (
            f"{self.cases:,} folders ({kinds}), {self.windows:,} windows, {self.commands:,} "
            f"commands ({self.refused:,} refused, as they should be), {self.rows:,} rows that a "
            "model was given"
        )


def corpus(folder: Path, source: random.Random, mark: str) -> list[str]:
    """Some JSON lines files; returns the arguments that name them."""
    folder.mkdir()
    maker = Maker(source, 0.8, "text")
    for number in range(source.randint(1, 3)):
        kind = source.choice(["tiny", "giant", "mixed", "mixed"])
        sizes = {"tiny": [(1, 2)], "giant": [(700, 3000)]}.get(kind, [(1, 9), (5, 90), (90, 400)])
        count = {"tiny": 500, "giant": source.randint(1, 4)}.get(kind, source.randint(20, 60))
        texts = [maker.words(source.randint(*source.choice(sizes))) for _ in range(count)]
        lines = (json.dumps({"text": f"{text} {mark}{i}"}) for i, text in enumerate(texts))
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return [str(folder)]


class Case:
    """Random data and options in their own folder."""

    def __init__(self, root: Path, number: int, seed: int, zygote: Zygote, result: Result) -> None:
        self.source, self.root = random.Random(f"{seed} {number}"), root / f"c{number:05d}"
        self.root.mkdir()
        self.name, self.zygote, self.result = f"seed {seed} case {number}", zygote, result
        self.folder, self.wrong = self.root / "data", list[str]()
        self.watched = zygote.folder / "watched"
        self.length = self.source.choice([8, 9, 16, 31, 33, 64, 100])
        self.seed = self.source.choice([0, 1, 1337, 2**31, 2**62, self.source.randrange(10**6)])

    def here(self, *words: str) -> Finished:
        """Run the command in this process."""
        from . import small  # imported late: it makes all units of work small

        self.result.commands += 1
        return small.here([*words], SMALL)

    def judge(self) -> list[str]:
        """Make the data; return everything that is wrong with what is reported about it."""
        if not self.make():
            return self.wrong
        self.sides = read(self.folder)
        self.wrong += shown(self.folder, self.sides, self.here, self.source)
        if len(self.sides["train"].tokens) > self.length:
            cuts = {kind: self.cut(kind) for kind in ("stream", "best-fit")}
            for kind, cut in cuts.items():
                self.wrong += [f"{kind}: {each}" for each in self.order(kind, len(cut.windows))]
        else:
            cuts = {"stream": stream(self.sides["train"], self.length)}
        self.run(cuts)
        return self.wrong

    def make(self) -> bool:
        """Make the folder; False if the texts do not fill both splits, which was reported."""
        source = self.source
        if source.random() < 0.4:
            self.result.kinds[write_foreign(self.folder, source)] += 1
            return True
        share, whole = str(source.choice([0, 0.05, 0.2, 0.2, 0.5])), merge.SHARD_TOKENS
        merge.SHARD_TOKENS = source.choice([40, 400, 3000, whole])
        try:
            for number in range(source.choice([1, 1, 2, 3])):
                words = ["prepare", *corpus(self.root / f"in{number}", source, "abc"[number])]
                words += ["--out", str(self.folder), "--val-fraction", share, "--workers", "1"]
                words += ["--append"] * bool(number)
                if source.random() < 0.3:
                    for part in ("2/2", "1/2"):
                        self.here(*words, "--part", part)
                    words = ["merge", str(self.folder), "--workers", "1"]
                done = self.here(*words)
                if done.code == BAD_DATA and not number:
                    self.result.refused += 1
                    return False
                if done.code:
                    self.wrong.append(f"{' '.join(words)}: {done.code}: {done.output[-400:]}")
                    return False
        finally:
            merge.SHARD_TOKENS = whole
        self.result.kinds["prepared"] += 1
        return True

    def cut(self, kind: str) -> Cut:
        """The windows, compared with the program's."""
        of = BestFit if kind == "best-fit" else TokenWindows
        program = of(self.folder, "train", self.length)
        windows = np.stack([program[i] for i in range(len(program))]).astype(np.int64)
        self.result.windows += len(windows)
        if kind == "stream":
            cut = stream(self.sides["train"], self.length)
            if cut.windows.shape != windows.shape or (cut.windows != windows).any():
                self.wrong.append(f"stream: other windows, {windows.shape}")
                return cut
        else:
            if (self.sides["train"].tokens == PAD).any():
                cut = Cut(windows, document_ids(windows[:, :-1]))  # its padding looks like ours
                each = pieces(self.sides["train"], self.length)
                cut.own = sum(stop - at for at, stop in each) - len(windows) - cut.targets
                return cut
            cut, wrong = best_fit(self.sides["train"], self.length, windows)
            self.wrong += wrong
            share = 1 - cut.targets / cut.windows[:, 1:].size
            if abs(program.padding - share) > 1e-12:
                self.wrong.append(f"padding {program.padding}, {share} it is")
        theirs, counted = document_ids(windows[:, :-1]), windows[:, 1:] != PAD
        same = np.diff(theirs) == 0, np.diff(cut.numbers) == 0
        if ((same[0] != same[1]) & counted[:, 1:]).any():
            self.wrong.append(f"{kind}: document numbers are not those of the documents")
        return cut

    def order(self, kind: str, count: int) -> Iterator[str]:
        """Faults in the order of the windows, by rank, batch and epoch."""
        source = self.source
        of = BestFit if kind == "best-fit" else TokenWindows
        program = of(self.folder, "train", self.length)
        orders, most = [], 4 * (count // 100)  # larger batches where there are many windows
        sizes = [(1, 4 * source.randint(1, 8) + most), (2, 8 + most), (4, 12 + most), (1, 1)]
        for ranks, rows in sizes[: 3 + (count < 99)]:
            steps = -(-3 * count // rows)
            loaders = [
                BatchLoader(program, self.seed, lambda n, b=rows: range(n * b, n * b + b), r, ranks)
                for r in range(ranks)
            ]
            asked = [[each.window_ids(n) for each in loaders] for n in range(steps)]
            orders.append(np.concatenate([ids for step in asked for ids in step])[: 3 * count])
            at = source.randrange(steps)  # as after a resume, then the prefetched one
            for n in (at, at + 1, source.randrange(steps)):
                for each in loaders:
                    wanted = [program[i] for i in each.window_ids(n).tolist()]
                    if (each.batch(n) != np.stack(wanted)).any():
                        yield f"batch {n} of {ranks} ranks holds different windows"
            for each in loaders:
                each.close()
        for other in orders[1:]:
            if (other != orders[0]).any():
                yield "the order depends on ranks or batch size"
        epochs = [*orders[0].reshape(3, count)]
        for number, epoch in enumerate(epochs):
            if sorted(epoch.tolist()) != list(range(count)):
                yield f"epoch {number} does not have each of {count} windows once"
        if count >= 30:
            again = BatchLoader(program, self.seed + 1, lambda n: range(count))
            epochs.append(again.window_ids(0))
            again.close()
            for a, one in enumerate(epochs):
                for other in [np.arange(count), *epochs[:a]]:
                    if abs(np.corrcoef(one, other)[0, 1]) > 5 / count**0.5:
                        yield f"order {a} equals another, or is not shuffled"

    def options(self, kinds: list[str]) -> dict[str, Any]:
        """Fields of a run that takes about a second."""
        source = self.source
        rows = source.randint(1, max(1, min(8, 200 // self.length)))
        steps = source.choice([1, 2, 12, 20, 41, 41])
        micro = [n for n in range(1, rows + 1) if rows % n == 0]
        return {
            "model.layers": 1, "model.d_model": 8, "model.heads": source.choice([1, 2]),
            "model.kv_heads": 1, "model.d_ff": 8, "model.seq_len": self.length,
            "data.path": str(self.folder), "data.windows": source.choice(kinds),
            "data.document_mask": source.random() < 0.5,
            "optim.warmup_steps": source.choice([0, 1, 4000, 4000]),
            "optim.dropout_start": source.choice([0.0, 0.1, 0.3]), "train.steps": steps,
            "optim.final_fraction": source.choice([0.0, 0.1]),
            "optim.cooldown": source.choice([0.0, 0.0, 0.0, 0.3, 0.65, 1.0]),
            "train.batch_rows": rows, "train.micro_rows": source.choice([0, *micro]),
            "train.log_every": source.choice([1, 1, 3]), "train.sample_every": 0,
            "train.eval_every": source.choice([0, 1, 4]),
            "train.eval_tokens": source.choice([1, 50, 150, 600, 5000]),
            "train.save_every_steps": max(1, steps // 3), "train.keep_checkpoints": 9,
            "run.seed": self.seed, "run.device": "cpu", "run.threads": 1, "run.compile": "off",
            "run.dtype": "float32",
        }  # fmt: skip

    def run(self, cuts: dict[str, Cut]) -> None:
        """`sota config`, `plan` and `train`, and `train` resumed from a checkpoint."""
        options, out = self.options([*cuts]), self.root / "run"
        recipe = ["--recipe", "fast"] * (self.source.random() < 0.4)
        if recipe:
            for name in ("warmup_steps", "cooldown", "final_fraction", "dropout_start"):
                options.pop(f"optim.{name}")
        words = ["tiny", *recipe, *(flag(*each) for each in options.items())]
        done = self.here("config", *words)
        found = re.search(r"^\{.*^\}", done.output, re.DOTALL | re.MULTILINE)
        if done.code or not found:
            self.wrong.append(f"config: {done.code}: {done.output[-300:]}")
            return
        config = json.loads(found[0])
        for path, value in options.items():
            section, name = path.split(".")
            if config[section][name] != value:
                self.wrong.append(f"config: {path} is {config[section][name]}, not {value}")
        made = Reckoned(config, self.sides, cuts[options["data.windows"]], self.folder)
        told = [line.removeprefix("# ") for line in done.output[found.end() + 1 :].splitlines()]
        self.wrong += recipe_of(config, options, bool(recipe))
        if told != [*made.described(), made.memory()]:
            self.wrong.append(f"config says {told} for {[*made.described(), made.memory()]}")
        few = [split for split in SPLITS if len(self.sides[split].tokens) <= self.length]
        if self.source.random() < 0.25 and not few:
            self._says("plan", self.command("plan", *words), made.planned())
        words += ["--out", str(out)]
        done = self.command("train", *words)
        if few:
            self.result.refused += 1
            text = f"the {few[0]} split has {len(self.sides[few[0]].tokens):,} token"
            if done.code != BAD_DATA or text not in done.output or done.crashed:
                self.wrong.append(f"train of too little: {done.code}: {done.output[-400:]}")
            return
        whole = self._trained(made, out, done, 0, 0)
        saved = [int(path.name[5:]) for path in sorted((out / "checkpoints").iterdir())]
        begin = self.source.choice(saved)
        if self.wrong or begin == options["train.steps"]:
            return
        learned = self._learned(whole, begin * made.rows)
        done = self.command("train", *words, "--resume", f"step:{begin}")
        again = self._trained(made, out, done, begin, learned)
        if again != whole[begin * made.rows :]:
            self.wrong.append(f"resumed from step {begin} it reads different windows")
        done = self.command("evaluate", str(out), "--json", "--device", "cpu")
        told = re.search(r'"tokens": (\d+)', done.output)
        judged = int((self.sides["val"].tokens[1:] != PAD).sum())
        if done.code or not told or int(told[1]) != judged:
            self.wrong.append(f"evaluate: {done.code}, not {judged} tokens: {done.output[-600:]}")

    def command(self, *words: str) -> Finished:
        """Run the command through the zygote."""
        self.result.commands += 1
        self.watched.unlink(missing_ok=True)
        verdict, out = self.zygote.folder / "doctor.json", self.root / "run"
        if words[0] == "train" and verdict.exists():
            out.mkdir(exist_ok=True)
            shutil.copy(verdict, out)
        done = self.zygote.run([*words])
        if words[0] == "train" and not verdict.exists() and (out / "doctor.json").exists():
            shutil.copy(out / "doctor.json", verdict)
        return done

    def _says(self, what: str, done: Finished, lines: list[str]) -> None:
        """Each of these lines has to be in the command's output."""
        if done.code:
            self.wrong.append(f"{what}: {done.code}: {done.output[-900:]}")
        missing = [line for line in lines if line not in done.output]
        if missing and not done.code:
            self.wrong.append(f"{what} does not say {missing}, but {done.output[:1500]}")

    def _learned(self, rows: list[bytes], count: int) -> int:
        """Targets in the first rows of training."""
        return sum(int((np.frombuffer(row, np.int64)[1:] != PAD).sum()) for row in rows[:count])

    def _trained(
        self, made: Reckoned, out: Path, done: Finished, begin: int, learned: int
    ) -> list[bytes]:
        """Check a run from step `begin` on; return the windows that it read."""
        if done.code or not self.watched.exists():
            self.wrong.append(f"train: {done.code}: {done.output[-900:]}")
            return []
        seen, config = Seen(self.watched), made.config
        self.result.rows += len(seen.training) + len(seen.judged)
        micro = config["train"]["micro_rows"] or made.rows  # a model this small takes them at once
        if seen.sizes != {micro}:
            self.wrong.append(f"micro-batches of {seen.sizes}, not {micro}")
        self._says("train", done, made.announced(micro, 1, begin, learned))
        share = json.loads((out / "run.json").read_text())["padding"]
        if abs(share - made.padding) > 1e-12:
            self.wrong.append(f"run.json has a padding of {share}, not {made.padding}")
        rows, masked = self._rows(made, seen, begin), config["data"]["document_mask"]
        self._judged(made, seen, out, done, begin, masked)
        lines, every = metrics(out, "loss"), config["train"]["log_every"]
        steps = config["train"]["steps"]
        for step in range(begin + 1, steps + 1):
            if (step in lines) != (step % every == 0 or step == steps):
                self.wrong.append(f"step {step} is logged and should not be, or the reverse")
            elif step in lines:
                rate, dropout = schedule(config, step)
                tokens = learned + self._learned(rows, (step - begin) * made.rows)
                line = lines[step]
                if abs(line["lr"] - rate) > 1e-9 * rate + 1e-15:
                    self.wrong.append(f"step {step}: rate {line['lr']}, not {rate}")
                if abs(line["dropout"] - dropout) > 1e-9:
                    self.wrong.append(f"step {step}: dropout {line['dropout']}, not {dropout}")
                if line["tokens"] != tokens:
                    self.wrong.append(f"step {step}: {line['tokens']} tokens, not {tokens}")
        return rows

    def _rows(self, made: Reckoned, seen: Seen, begin: int) -> list[bytes]:
        """The windows that a run was given, each compared with the loader's order and the text."""
        config, cut = made.config, made.cut
        count, masked = len(cut.windows), config["data"]["document_mask"]
        wanted = (config["train"]["steps"] - begin) * made.rows
        if len(seen.training) != wanted:
            self.wrong.append(f"{len(seen.training)} rows of training, not {wanted}")
            return []
        first = begin * made.rows
        of = BestFit if made.packed else TokenWindows
        program = of(self.folder, "train", self.length)
        loader = BatchLoader(program, self.seed, lambda _: range(first, first + wanted))
        order = loader.window_ids(0).tolist()
        loader.close()
        for place, (at, row) in enumerate(zip(order, seen.training, strict=True)):
            if odd := fits(row, cut, at, masked):
                self.wrong.append(f"row {first + place}, window {at} of {count}: {odd}")
                break
        return [cut.windows[at].tobytes() for at in order]

    def _judged(
        self, made: Reckoned, seen: Seen, out: Path, done: Finished, begin: int, masked: bool
    ) -> None:
        """Check the validations of a run."""
        train, (cut, places) = made.config["train"], made.validation()
        every, steps, lines = train["eval_every"], train["steps"], metrics(out, "val_loss")
        due = [n for n in range(begin + 1, steps) if every and n % every == 0] + [steps]
        if len(seen.judged) != len(due) * len(places):
            self.wrong.append(f"{len(seen.judged)} windows judged, {len(due)} x {len(places)}")
            return
        tokens = 0
        for number, row in enumerate(seen.judged):
            may = places[number % len(places)]
            odd = [fits(row, cut, at, masked) for at in may]
            if all(odd):
                self.wrong.append(f"validation, window {number} of {may}: {odd}")
                return
            tokens += int((row[1] >= 0).sum())
        for step in due:
            if step not in lines or lines[step]["val_tokens"] * len(due) != tokens:
                self.wrong.append(f"validation of step {step}: {lines.get(step)}")
        if f"over {tokens // len(due):,} tokens" not in done.output:
            self.wrong.append("the number of validation tokens is not printed")


def windows(root: Path, count: int, seed: int = 0) -> Result:
    """`count` folders; problems are named by their case."""
    result = Result()
    root.mkdir(exist_ok=True)
    with Zygote(root, "tests.chaos.watching") as zygote:
        for number in range(count):
            case = Case(root, number, seed, zygote, result)
            if wrong := case.judge():
                result.wrong += [f"{case.name}: {each}" for each in wrong]
                kept = root.parent / f"wrong-{seed}-{number}"
                shutil.copytree(case.root, kept, dirs_exist_ok=True)
            shutil.rmtree(case.root)
            result.cases += 1
    return result
