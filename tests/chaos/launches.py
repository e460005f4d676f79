"""Random sequences of the launcher `train_sota.py` in one folder, with small presets.

Its menu gets choices, wrong ones, end of file and Ctrl-C at a terminal. Its data and run folders
are half made, damaged, another user's or read-only. A killed command is given again.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .commands import Finished, Zygote, corpus, leftovers
from .journey import DONE, ENDS, REFUSED, changed, lasting, tree

WIDTHS = {"16m": 8, "125m": 16, "250m": 24}  # as in `little.py`
SIZES = {"--quick": ("16m", "quick"), "--full": ("125m", "125m"), "--large": ("250m", "250m")}
CHOICES = {"1": "--quick", "2": "--full", "3": "--large"}
INTERRUPTED = frozenset({130})


@dataclass
class Result:
    """Counts, and in words whatever was wrong."""

    scenes: int = 0
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        each = ", ".join(f"{number:,} {what}" for what, number in sorted(self.done.items()))
        return f"{self.scenes:,} folders: {each}"


class Folder:
    """Where the launcher is started, and what has to be there."""

    def __init__(self, root: Path, zygote: Zygote, source: random.Random, result: Result) -> None:
        self.place, self.temporary = root / "work", root / "tmp"
        self.zygote, self.source, self.result = zygote, source, result
        self.told = list[str]()
        self.harmed = False
        self._wrong = len(result.wrong)

    def wrong(self) -> list[str]:
        """What was wrong here."""
        return self.result.wrong[self._wrong :]

    def say(self, what: str) -> None:
        """Record a broken promise and what led to it."""
        self.result.wrong.append(f"{what}\n    after: " + "\n    ".join(self.told))

    def launch(
        self, words: list[str], expected: frozenset[int], keys: list[str] | None = None,
        sign: signal.Signals | None = None,
    ) -> Finished:  # fmt: skip
        """Start it, at a terminal if there are `keys`; `sign` is sent at a random moment."""
        self.told.append(f"{words} {keys} {sign}   # {sorted(expected)}")
        self.result.done["menu" if keys is not None else " ".join(words[:1])] += 1
        ours, theirs = os.openpty()
        given = {} if keys is None else {"given": os.ttyname(theirs)}
        pid = self.zygote.start(["train_sota.py", *words], where=self.place, **given)
        output, done = self.zygote.output, None
        for number, key in enumerate(keys or []):
            while done is None and _said(output).count(": ") <= number:  # it has asked
                done = self.zygote.wait(pid, 0.01)
            os.write(ours, key.encode())
        if sign is not None:
            done = self.zygote.wait(pid, self.source.uniform(0.1, 4))
            if done is None:
                with suppress(ProcessLookupError):
                    (os.killpg if sign == signal.SIGKILL else os.kill)(pid, sign)
                expected |= {ENDS[sign]}
        done = done or self.zygote.end(pid)
        os.close(theirs)
        os.close(ours)
        self._holds(pid, done, expected)
        return done

    def _holds(self, pid: int, done: Finished, expected: frozenset[int]) -> None:
        """Check the exit code, that a failure prints one line, and that nothing is left."""
        self.told.append(f"  {done.code}: {done.output[-200:].strip()}")
        last = done.output[done.output.rfind("sota: ") :]
        if done.crashed or done.code not in expected:
            self.say(f"exit {done.code}, not {sorted(expected)}: {done.output[-1500:]}")
        elif done.code in REFUSED and (done.output.count("sota: ") != 1 or last.count("\n") > 1):
            self.say(f"prints too much or too little: {done.output[-900:]}")
        deadline = time.monotonic() + 5
        while alive(pid) and time.monotonic() < deadline:  # helpers exit once they notice
            time.sleep(0.02)
        if alive(pid):
            self.say(f"exit {done.code} and left a process")
        if done.code != 137 and (left := [*self.temporary.rglob("*")]):
            self.say(f"exit {done.code} and left {left[:5]}")
        for path in self.temporary.iterdir():
            remove(path)
        if done.code == 0 and (left := leftovers(self.place)):
            self.say(f"left {left[:5]}")


def remove(path: Path) -> None:
    """Delete whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def alive(group: int) -> bool:
    """Whether a process of this group exists."""
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def _said(path: Path) -> str:
    """What it has printed after the menu."""
    said = path.read_text(errors="replace") if path.exists() else ""
    return said.rpartition("resume a run\n")[2] if "resume a run\n" in said else ""


def _trained(f: Folder, run: Path, size: str) -> None:
    """The requested run is complete."""
    told = json.loads((run / "config.json").read_text())
    steps = sorted(int(p.name[5:]) for p in run.glob("checkpoints/step-????????"))
    if told["model"]["d_model"] != WIDTHS[size] or steps[-1:] != [told["train"]["steps"]]:
        f.say(f"{run}: width {told['model']['d_model']}, steps {steps}, not a complete {size}")
    if not Path(f.place, told["data"]["path"], "manifest.json").is_file():
        f.say(f"{run} was trained on {told['data']['path']}, which is no data")


def begin(f: Folder) -> None:
    """By flag or by menu: to the end, or interrupted somewhere and given again."""
    choice = f.source.choice("1123")
    way, name = CHOICES[choice], f.source.choice(["a b", "ü"])
    size, kind = SIZES[way]
    words, keys = [way, "--data", name], None
    if f.source.random() < 0.4:
        words, keys = [], [f"{choice}\n", f.source.choice([f"{name}\n", f"'{name}'\n"])]
    if way == "--quick":
        words += ["--minutes", f.source.choice(["0.01", "0.02"])]
    run = f.place / "runs" / f"{kind}-{name}"
    expected = DONE | REFUSED if f.harmed else DONE
    for _ in range(f.source.choice([0, 0, 1, 2])):
        f.launch(words, expected, keys, f.source.choice(list(ENDS)))
    before = tree(run) if (run / "config.json").exists() else None
    over = before and (run / "checkpoints/step-00000006").exists()
    done = f.launch(words, expected, keys)
    if done.code == 0 and not f.harmed:
        _trained(f, run, size)
        if over and (differ := changed(lasting(before or {}), lasting(tree(run)))):
            f.say(f"repeated, it changed {differ[:5]}")


def wrongly(f: Folder) -> None:
    """Choices the menu rejects and options that exclude each other: nothing changes."""
    before = tree(f.place)
    two, runs = frozenset({2}), sorted(f.place.glob("runs/*/config.json"))
    cases: list[tuple[list[str], frozenset[int], list[str] | None]] = [
        ([], INTERRUPTED, ["\x04"]), ([], INTERRUPTED, ["1\n", "\x04"]),
        ([], INTERRUPTED, ["\x03"]), ([], INTERRUPTED, ["4\n", "\x03"]),
        ([], two, ["5\n"]), ([], two, ["\n"]), ([], two, ["quick\n"]), ([], two, ["1 2\n"]),
        ([], frozenset({66}), ["4\n", "nowhere\n"]), ([], REFUSED, ["4\n", "\n"]),
        ([], REFUSED, ["1\n", "nowhere\n"]), ([], REFUSED, ["2\n", "no 'where\n"]), ([], two, None),
        (["--quick", "--full"], two, None), (["--quick", "--minutes=-1"], two, None),
        (["--resume", "a b"], REFUSED, None),
        (["--quick", "--data", "nowhere/*.txt"], REFUSED, None),
        (["--full", "--minutes=1"], two, None), (["--quick", "--data", ""], REFUSED, None),
    ]  # fmt: skip
    cases += [(["--resume", str(run.parent), "--out=x"], two, None) for run in runs]
    words, expected, keys = f.source.choice(cases)
    f.launch(words, expected, keys)
    if differ := changed(before, tree(f.place)):
        f.say(f"refused, and changed {differ[:5]}")


def harm(f: Folder) -> None:
    """Something that was made is half there, damaged, not ours or in the way."""
    made = [*f.place.glob("data/*"), *f.place.glob("runs/*"), f.place / "data", f.place / "runs"]
    path = f.source.choice(made)
    way = f.source.choice(["rm", "empty", "file", "cut", "frozen", "others", "manifest"])
    f.told.append(f"{way} {path}")
    files = sorted(each for each in path.rglob("*") if each.is_file())
    if way in ("rm", "empty", "file"):
        if path.parent.is_file():
            path.parent.unlink()
        remove(path)
        path.parent.mkdir(exist_ok=True)
        if way != "rm":
            path.mkdir() if way == "empty" else path.write_text("")
    elif way == "cut" and files:
        chosen = f.source.choice(files)
        chosen.write_bytes(chosen.read_bytes()[: chosen.stat().st_size // 2])
    elif way == "manifest":
        for each in path.rglob("manifest.json"):
            each.unlink()
    elif way in ("frozen", "others") and path.exists():
        for each in (path, *path.rglob("*")):
            if way == "frozen":
                each.chmod(each.stat().st_mode & 0o555)
            else:
                each.chmod(0o700 if each.is_dir() else 0o600)
                os.chown(each, 12345, 12345)
    f.harmed = True


def mend(f: Folder) -> None:
    """Begin anew."""
    for name in ("data", "runs"):
        remove(f.place / name)
    for path in f.place.glob(".*.preparing"):
        shutil.rmtree(path)
    f.harmed = False


def launches(root: Path, count: int, seed: int = 0) -> Result:
    """`count` folders with a few launches each."""
    result, temporary = Result(), root / "tmp"
    temporary.mkdir()
    places = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(root / "compiled")}
    with Zygote(root, "tests.chaos.little", "sota_transformer.plan", **places) as zygote:
        for number in range(count):
            f = Folder(root, zygote, random.Random(f"{seed} {number} launch"), result)
            for name in ("a b", "ü"):
                corpus(f.place / name, 2, 60)
            for _ in range(f.source.randint(6, 12)):
                f.source.choices([begin, wrongly, harm, mend], [5, 5, 2, 1])[0](f)
                if f.wrong():
                    print(f"WRONG: seed {seed} folder {number}: {f.wrong()[0]}", flush=True)
                    break
            result.scenes += 1
            shutil.rmtree(f.place)
    return result
