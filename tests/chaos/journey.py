"""A model of one workspace: what the commands of a journey have to keep, and what differs from it.

The model knows for every path what it is and whether it was damaged, reads the plain facts of a run
from its folder, and predicts for each command whether it succeeds, fails (and with which codes) or
may do either.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .commands import Finished, Zygote, leftovers, sha256

DONE, REFUSED = frozenset({0}), frozenset({2, 65, 66, 73, 74})
EITHER = DONE | REFUSED
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: 137}
_UNSEEN = {".lock", ".verified.json", "doctor.json"}  # caches and locks
_TIMED = {"run.json", "metrics.jsonl", "samples.txt", "report.html", "comparison.html"}
LOSS, ROUNDED = 1e-5, 0.02  # nats between copies in float32, and in 16 bits
MOST_LINES, MOST_LETTERS = 2, 1200  # of an error message; names here are long

NAMES = ["a b", "neu\nzeile", "über-ß", "-dash", "x'y\"z", "[b]ra[ck]et", "100%", "$HOME", "e",
         "#no", "tab\there", "日本", "\u202egnp", "a,b", "a=b", "~", "{c}", "--steps"]  # fmt: skip

Tree = dict[str, tuple[int, str]]


def tree(place: Path) -> Tree:
    """Relative path -> mode and content of everything below, without following links."""
    found = Tree()
    for folder, folders, files in os.walk(place):
        for name in {*folders, *files} - _UNSEEN:
            path = Path(folder, name)
            what = str(path.readlink()) if path.is_symlink() else "/" if path.is_dir() else ""
            found[os.path.relpath(path, place)] = path.lstat().st_mode, what or sha256(path)
    return found


def lasting(found: Tree) -> Tree:
    """What has to be byte-identical after an interruption: no times, only the newest checkpoint."""
    newest = dict[str, str]()
    for name in found:
        if at := re.match(r"(.*checkpoints)/(step-\d{8})", name, re.DOTALL):
            newest[at[1]] = max(newest.get(at[1], ""), at[2])
    kept = Tree()
    for name, what in found.items():
        at = re.match(r"(.*checkpoints)/(step-\d{8})", name, re.DOTALL)
        if Path(name).name not in _TIMED and (at is None or newest[at[1]] == at[2]):
            kept[name] = what
    return kept


def changed(before: Tree, after: Tree) -> list[str]:
    """Paths that were added, removed or changed."""
    return sorted(name for name, _ in before.items() ^ after.items())


@dataclass
class Result:
    """Counts, and a description of everything that went wrong."""

    journeys: int = 0
    commands: int = 0
    refused: int = 0
    interrupted: int = 0
    losses: int = 0
    verbs: dict[str, list[int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = f"{self.journeys:,} journeys of {self.commands:,} commands, {self.refused:,} "
        told += f"refused, {self.interrupted:,} interruptions, {self.losses:,} losses compared "
        told += "with a copy's; done and refused by verb:"
        each = (f"\n{a:>7,} {b:>7,}  {verb}" for verb, (a, b) in sorted(self.verbs.items()))
        return told + "".join(each)


class Workspace:
    """One folder, its contents, and the commands given there."""

    def __init__(self, root: Path, zygote: Zygote, source: random.Random, result: Result) -> None:
        self.place, self.aside, self.temporary = root / "work", root / "aside", root / "tmp"
        self.zygote, self.source, self.result = zygote, source, result
        self.kinds = dict[Path, str]()  # real path -> texts, data, run, hf, gguf, parts, other
        self.broken, self.frozen = set[Path](), set[Path]()
        self.origins = dict[str, tuple[str, float]]()  # weights -> original, largest difference
        self.losses = dict[tuple[str, str], tuple[float, float]]()  # loss, largest difference
        self.known = dict[tuple[Any, ...], Any]()  # what has to be the same each time
        self.told = list[str]()
        self.where = self.place
        self._wrong = len(result.wrong)

    def wrong(self) -> list[str]:
        """What was wrong here."""
        return self.result.wrong[self._wrong :]

    # ---- what is there

    def kind(self, path: Path) -> str:
        """What is at a path: one of the kinds, `broken`, `free` or `other`."""
        real = Path(os.path.realpath(path))
        if any(real == each or each in real.parents for each in self.broken):
            return "broken"
        if real in self.kinds:
            return self.kinds[real]
        if real != path and not real.exists():
            return "dangling"
        return "other" if real.exists() and (real.is_file() or any(real.iterdir())) else "free"

    def is_frozen(self, path: Path) -> bool:
        """Whether nothing may be written there."""
        real = Path(os.path.realpath(path))
        return any(real == each or each in real.parents for each in self.frozen)

    def these(self, *kinds: str) -> list[Path]:
        """Everything of these kinds."""
        return sorted(path for path, kind in self.kinds.items() if kind in kinds)

    def steps(self, run: Path) -> list[int]:
        """Steps of a run's checkpoints."""
        return sorted(int(path.name[5:]) for path in run.glob("checkpoints/step-????????"))

    def trainer(self, run: Path, step: int) -> dict[str, Any]:
        """The counters of a checkpoint."""
        return json.loads((run / f"checkpoints/step-{step:08d}/trainer.json").read_text())

    def weights(self, path: Path) -> str:
        """SHA-256 of a run's newest weights or an export's, or of their original."""
        steps = self.steps(path)
        folder = path / f"checkpoints/step-{steps[-1]:08d}" if steps else path
        return sha256(folder / "model.safetensors")

    def fingerprint(self, data: Path) -> str:
        """Fingerprint of prepared data."""
        return json.loads((data / "manifest.json").read_text())["fingerprint"]

    # ---- what was wrong

    def say(self, what: str) -> None:
        """Record a broken promise and the commands that led to it."""
        self.result.wrong.append(f"{what}\n    after: " + "\n    ".join(self.told))

    def same(self, what: str, key: tuple[Any, ...], value: Any) -> None:
        """What was found once for a key has to be found each time."""
        if (first := self.known.setdefault(key, value)) != value:
            self.say(f"{what}: {value}, before {first}")

    def judged(self, model: Path, text: str, output: str) -> None:
        """A loss has to equal that of the original of these weights."""
        told = json.loads(output[output.index("{") :])
        config = json.loads((model / "config.json").read_text())
        if config.get("data", {}).get("document_mask"):
            return  # an export does not know it
        weights, nats, allowed = self.weights(model), told["nats"], LOSS
        text = f"{text} {told['context']}"
        while weights in self.origins:
            weights, more = self.origins[weights]
            allowed += more
        self.result.losses += (weights, text) in self.losses
        first, more = self.losses.setdefault((weights, text), (nats, allowed))
        if not abs(first - nats) <= allowed + more:
            self.say(f"loss {nats}, of a copy {first}")

    # ---- commands

    def word(self, path: Path) -> str:
        """A path as a user may write it, from the current folder."""
        way = self.source.random()
        relative = os.path.relpath(path, self.where)
        word = str(path) if way < 0.3 else relative
        return f"./{word}" if word.startswith("-") else word

    def give(
        self, words: list[str], expected: frozenset[int], outs: Sequence[Path] = (),
        interrupt: bool = False,
    ) -> Finished:  # fmt: skip
        """Give a command and check all that holds for every one; only `outs` may change."""
        shown = f"cd {shlex.quote(str(self.where))}; {shlex.join(words)}"
        self.told.append(f"{shown}   # {'interrupted' if interrupt else sorted(expected)}")
        if interrupt:
            shutil.rmtree(self.aside, ignore_errors=True)
            shutil.copytree(self.place, self.aside, symlinks=True)
        before, began, reals = tree(self.place), time.monotonic(), list[str]()
        for out in (*outs, *(Path(os.path.realpath(out)) for out in outs)):
            above = [out, *(each for each in out.parents if self.place in each.parents)]
            fresh = [each for each in above[1:] if not os.path.lexists(each)]
            reals.append(os.path.relpath((fresh or above)[-1 if fresh else 0], self.place))
        done = self.zygote.end(self.zygote.start(words, where=self.where))
        seconds, after = time.monotonic() - began, tree(self.place)
        self._holds(done, expected, words)
        touched = changed(before, after)
        if done.code == 0:
            touched = [t for t in touched if not any(f"{t}/".startswith(f"{r}/") for r in reals)]
        if touched:
            self.say(f"exit {done.code} and changed {touched[:5]}: {done.output[-300:]}")
        self._clean(done)
        if interrupt and done.code == 0:
            self._again(words, seconds, after)
        return done

    def _holds(self, done: Finished, expected: frozenset[int], words: list[str]) -> None:
        """Check the exit code and the output."""
        result = self.result
        result.commands += 1
        result.refused += done.code != 0
        counts = result.verbs.setdefault(words[0], [0, 0])
        counts[done.code != 0] += 1
        if done.crashed:
            self.say(f"a traceback: {done.output[-1500:]}")
        elif done.code not in expected:
            self.say(f"exit {done.code}, not {sorted(expected)}: {done.output[-700:]}")
        if not done.code or done.crashed:
            return
        self.told.append(f"  {done.code}: {done.output[-150:].strip()}")
        last = done.output[done.output.rfind("\nsota: ") + 1 :]
        lines = done.output.splitlines()
        many = len(lines) > MOST_LINES and words[0] not in ("train", "train_sota.py")
        if not last.startswith("sota: ") or many or len(last) > MOST_LETTERS:
            self.say(f"prints too much or too little: {done.output[-900:]}")
        paths = [word.partition("=")[2] or word for word in words[1:]]
        names = {" ".join((Path(word).name or word).split()) for word in paths}
        names |= {repr(word)[1:-1] for word in paths} | {Path(word).name for word in paths}
        told = any(name in last for name in names if name) or "--" in last
        if not told and "MB free" not in last:  # which names the existing part of its path
            self.say(f"names no path and no option: {last}")

    def _clean(self, done: Finished) -> None:
        """Nothing may be left beside."""
        left = [str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*")]
        parts = {f".{path.name}.preparing" for path in self.these("parts")}
        left += [name for name in leftovers(self.place) if not name.startswith("..")]
        left += [p.name for p in self.place.glob(".*.preparing") if p.name not in parts]
        if left:
            self.say(f"exit {done.code} and left {left[:5]}")
        self.sweep()

    def sweep(self) -> None:
        """Empty the folder for temporary files."""
        for path in self.temporary.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _again(self, words: list[str], seconds: float, wanted: Tree) -> None:
        """From the state before, interrupt a few times, then finish: the same has to result."""
        shutil.rmtree(self.place)
        shutil.copytree(self.aside, self.place, symlinks=True)
        for _ in range(self.source.randint(1, 3)):
            sign = self.source.choice(list(ENDS))
            pid = self.zygote.start(words, where=self.where)
            done = self.zygote.wait(pid, self.source.uniform(0.05, 1.0) * seconds + 0.1)
            if done is None:
                self.result.interrupted += 1
                everybody = sign == signal.SIGKILL or self.source.random() < 0.5
                with suppress(ProcessLookupError):
                    (os.killpg if everybody else os.kill)(pid, sign)
                done = self.zygote.end(pid)
                self.told.append(f"  {sign.name}{' to all' if everybody else ''}: {done.code}")
                if done.crashed or done.code not in (0, ENDS[sign]):
                    self.say(f"{sign.name}: exit {done.code} {done.output[-1500:]}")
                if sign == signal.SIGKILL:
                    time.sleep(0.3)  # workers exit once they notice
                elif left := [path.name for path in self.temporary.iterdir()]:
                    self.say(f"{sign.name} left {left[:5]} in TMPDIR")
                self.sweep()
        last = self.zygote.end(self.zygote.start(words, where=self.where))
        found = tree(self.place)
        differ = changed(lasting(wanted), lasting(found))
        done = last.code == 0 or (last.code == 2 and words[0] in ("import", "export"))  # complete
        if not done or differ:
            self.say(f"interrupted: exit {last.code}, differ {differ[:5]}: {last.output[-500:]}")
        self._clean(last)


# ---- what happens to things between commands


def _whole(w: Workspace, *kinds: str) -> list[Path]:
    return [path for path in w.these(*kinds) if path not in w.frozen | w.broken]


def move(w: Workspace) -> None:
    path, new = w.source.choice(_whole(w, "texts", "data", "run", "hf")), made(w)
    w.told.append(f"mv {path} {new}")
    w.where = w.place
    w.kinds[path.rename(new)] = w.kinds.pop(path)


def copy(w: Workspace) -> None:
    path, new = w.source.choice(_whole(w, "texts", "data", "run", "hf")), made(w)
    w.told.append(f"cp -a {path} {new}")
    shutil.copytree(path, new, symlinks=True)
    w.kinds[new] = w.kinds[path]


def link(w: Workspace) -> None:
    path, new = w.source.choice(w.these("texts", "data", "run", "hf")), made(w)
    w.told.append(f"ln -s {path} {new}")
    new.symlink_to(path if w.source.random() < 0.5 else path.name)


def spoil(w: Workspace) -> None:
    paths = [p for p in w.these("data", "run", "hf", "gguf") if p not in w.frozen]
    files = [f for path in paths for f in path.rglob("*") if f.is_file()]
    if not files or len(paths) < 3:
        return
    path = w.source.choice(files)
    what = w.source.choice(["delete", "cut", "flip", "empty"])
    w.told.append(f"{what} {path}")
    data = bytearray(path.read_bytes())
    if what == "delete" or not data:
        path.unlink()
    elif what == "flip":
        data[w.source.randrange(len(data))] ^= 1 << w.source.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2 if what == "cut" else 0])
    w.broken |= {each for each in paths if each in path.parents}


def delete(w: Workspace) -> None:
    paths = [path for path in w.these("data", "run", "hf", "gguf", "other") if path not in w.frozen]
    if len(paths) > 3:
        path, w.where = w.source.choice(paths), w.place
        w.told.append(f"rm -r {path}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        w.kinds.pop(path)
        w.broken.discard(path)


def freeze(w: Workspace) -> None:
    thaw = bool(w.frozen) and w.source.random() < 0.6
    paths = sorted(w.frozen) if thaw else _whole(w, "data", "run", "hf")
    if paths:
        path = w.source.choice(paths)
        w.frozen ^= {path}
        w.told.append(f"chmod -R {'u+w' if thaw else 'a-w'} {path}")
        for each in (path, *path.rglob("*")):
            each.chmod(each.stat().st_mode & 0o555 | (0o200 if thaw else 0))


def walk(w: Workspace) -> None:
    inside = [p for p in w.these("run", "data", "hf") if p not in w.frozen]
    w.where = w.source.choice([w.place, w.place, *inside])


def made(w: Workspace) -> Path:
    """A free path, rarely one that cannot be created."""
    names = [name for name in NAMES if not os.path.lexists(w.place / name)]
    name = w.source.choice(names) if names else f"n{w.source.randrange(10**6)}"
    return w.place / name


def write_texts(w: Workspace) -> None:
    """Three folders of text, some of it in two of them."""
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ter", "un") for b in ("ra", "sil", "do", "e")]
    lines = [" ".join(w.source.choices(words, k=w.source.randint(20, 90))) for _ in range(90)]
    for start in (0, 20, 50):
        folder = made(w)
        folder.mkdir()
        for number in range(2):
            chosen = lines[start + 20 * number : start + 20 * number + 20]
            text = "".join(json.dumps({"text": each}) + "\n" for each in chosen)
            (folder / f"{number}.jsonl").write_text(text)
        w.kinds[folder] = "texts"


EVENTS = [move, move, copy, link, spoil, delete, freeze, walk, walk]
