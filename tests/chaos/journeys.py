"""Random journeys through all commands in one workspace, including senseless ones; see journey.py.

A journey makes texts, data, runs and exports, moves, copies, links, damages and freezes them, gives
10 to 25 commands on whatever is there, and interrupts some.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sota_transformer.presets import flag

from .commands import Zygote
from .journey import (
    DONE,
    EITHER,
    EVENTS,
    LOSS,
    REFUSED,
    ROUNDED,
    Result,
    Workspace,
    made,
    write_texts,
)  # fmt: skip

BASE: dict[str, Any] = {
    "model.layers": 1, "model.heads": 1, "model.kv_heads": 1, "model.d_model": 8, "model.d_ff": 8,
    "model.seq_len": 16, "train.batch_rows": 4, "train.eval_tokens": 64, "train.eval_every": 4,
    "train.log_every": 1, "train.sample_every": 0, "train.save_every_steps": 3, "train.steps": 6,
    "run.seed": 1, "run.dtype": "float32", "run.compile": "off", "run.threads": 1,
    "run.device": "cpu", "optim.learning_rate": 0.01,
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {"train.steps": 8}, {"train.steps": 3}, {"run.seed": 2}, {"optim.learning_rate": 0.02},
    {"train.batch_rows": 3}, {"model.seq_len": 12}, {"data.windows": "best-fit"},
    {"data.document_mask": True}, {"model.d_ff": 12}, {"model.layers": 2}, {"train.log_every": 2},
    {"model.qk_norm": True},
]  # fmt: skip
USABLE = ("run", "hf")
FILES = ["README.md", "manifest.json", "Modelfile"]  # of an export, naming its origin
CPU = ["--device", "cpu"]


def some(w: Workspace, *kinds: str, astray: float = 0.15) -> Path:
    """Something of these kinds, direct or through a link; sometimes of another kind, or nothing."""
    chosen = w.these(*kinds)
    if not chosen or w.source.random() < astray:
        chosen = [*w.these("texts", "data", "run", "hf", "gguf", "other"), made(w), w.place]
        chosen += [w.place / "nowhere" / "at all", Path("/proc/nothing")]
    path = w.source.choice(chosen)
    links = [each for each in w.place.iterdir() if each.is_symlink() and each.resolve() == path]
    return w.source.choice(links) if links and w.source.random() < 0.5 else path


def target(w: Workspace) -> Path:
    """Where a command is to write: mostly a new place."""
    return made(w) if w.source.random() < 0.75 else some(w, "empty", astray=1.0)


def free(w: Workspace, out: Path) -> bool:
    """Whether a folder can be made there."""
    return w.kind(out) == "free" and "/proc" not in str(out) and not out.is_symlink()


def refused(w: Workspace, *paths: Path) -> frozenset[int]:
    """Refused, or either if the damage may go unnoticed."""
    return EITHER if any(w.kind(path) == "broken" for path in paths) else REFUSED


def _prepared(w: Workspace, texts: Path, out: Path, share: str, before: str = "") -> None:
    """Data was made: the same text gives the same data each time, however it was made."""
    w.kinds[out.resolve()] = "data"
    text = sorted(path.read_bytes() for path in texts.glob("*.jsonl"))
    w.same("fingerprint", (before, str(text), share), w.fingerprint(out))


def prepare(w: Workspace) -> None:
    texts, out, append = some(w, "texts"), target(w), w.source.random() < 0.3
    share = w.source.choice(["0.2", "0.3"])
    if append or w.source.random() < 0.2:
        out = some(w, "data")
    words = ["prepare", w.word(texts), f"--out={w.word(out)}", "--val-fraction", share]
    words += ["--workers", w.source.choice("12")] + ["--append"] * append
    good, there = w.kind(texts) == "texts", w.kind(out)
    if append and w.is_frozen(out):
        return  # the work is kept for another attempt
    expected = DONE if good and free(w, out) and not append else refused(w, texts, out)
    if there == "data" or texts == w.place or w.is_frozen(texts) or texts == out:
        expected = EITHER
    if good and there == "data" and append and out.resolve() != w.where.resolve():
        expected = DONE
    before = w.fingerprint(out) if there == "data" else ""
    done = w.give(words, expected, [out], expected == DONE and w.source.random() < 0.3)
    if done.code == 0 and (append or not before):
        _prepared(w, texts, out, share * (not before), before)


def parts(w: Workspace) -> None:
    texts, out = some(w, "texts", astray=0), target(w)
    if free(w, out):
        w.kinds[real := out.resolve()] = "parts"
        hidden = out.parent / f".{out.name}.preparing"
        given = ["prepare", w.word(texts), f"--out={w.word(out)}", "--val-fraction", "0.2"]
        for part in w.source.sample(["1/2", "2/2"], 2):
            w.give([*given, "--part", part], DONE, [hidden], w.source.random() < 0.2)
        w.kinds.pop(real)
        words = ["merge", w.word(out)]
        if w.give(words, DONE, [out, hidden], w.source.random() < 0.3).code == 0:
            _prepared(w, texts, out, "0.2")


def look(w: Workspace) -> None:
    data, out = some(w, "data", astray=0.3), target(w)
    good, word = w.kind(data) == "data", w.word(data)
    if w.source.random() < 0.3:
        words = ["data", word, f"{w.source.choice(['--html', '--export-bin'])}={w.word(out)}"]
        good &= free(w, out) and not out.is_dir()
        if w.give(words, DONE if good else EITHER, [out]).code == 0 and good:
            w.kinds[out.resolve()] = "other"
        return
    ways = [["--leakage"], ["--list-split", "val"], ["--window", "train:0"], []]
    words = w.source.choice([["merge", word], *(["data", word, *way] for way in ways)])
    w.give(words, DONE if good else refused(w, data))


def _fields(run: Path) -> dict[str, Any]:
    told = json.loads((run / "config.json").read_text())
    return {f"{section}.{name}": v for section, of in told.items() for name, v in of.items()}


def _fits(w: Workspace, out: Path, data: Path, options: dict[str, Any], how: dict[str, str],
          override: list[str]) -> frozenset[int]:  # fmt: skip
    """What `sota train` has to say about a run that already exists."""
    steps, resume = w.steps(out), how.get("--resume", "auto")
    if w.is_frozen(out):
        return EITHER
    if resume == "never":
        return frozenset({2, 65})
    if resume.startswith("step:") and int(resume[5:]) not in steps:
        return frozenset({2, 65, 66})
    before = {"data.windows": "stream", "data.document_mask": False, "model.qk_norm": False}
    now = BASE | before | options
    differ = [name for name, value in _fields(out).items() if now.get(name, value) != value]
    differ = [name for name in differ if name.split(".")[1] not in ("log_every",)]
    imported = steps == [0]
    if any(name[:6] == "model." and name != "model.seq_len" for name in differ):
        return frozenset({65})
    if set(differ) - set(override) and not imported:
        return frozenset({2})
    manifest = json.loads((out / f"checkpoints/step-{steps[-1]:08d}/manifest.json").read_text())
    other = manifest.get("data") not in (None, w.fingerprint(data))
    if resume.startswith("step:"):
        return EITHER if other else DONE
    return frozenset({65}) if other and "--data-change" not in how else DONE


def train(w: Workspace) -> None:
    data, out = some(w, "data", astray=0.1), target(w)
    options, how, override = dict[str, Any](), dict[str, str](), list[str]()
    again = w.these("run") and w.source.random() < 0.6
    if again:
        out = some(w, "run", astray=0.1)
    if w.source.random() < (0.6 if again else 0.4):
        options = w.source.choice(CHANGES)
    if again and w.source.random() < 0.6:
        override = list(options)
    if w.source.random() < (0.4 if again else 0.1):
        how["--resume"] = w.source.choice(["never", "latest", "step:3", "step:6", "auto"])
    if w.source.random() < 0.2:
        how["--data-change"] = w.source.choice(["continue", "restart-epoch"])
    words = ["train", "tiny", f"--data={w.word(data)}", f"--out={w.word(out)}"]
    words += [flag(name, v) for name, v in (BASE | options).items() if name not in override]
    words += [word for name in override for word in ("--override", f"{name}={options[name]}")]
    words += [f"{name}={value}" for name, value in how.items()]
    kind, resume = w.kind(out), how.get("--resume", "auto")
    if "broken" in (kind, w.kind(data)):
        expected = EITHER
    elif w.kind(data) != "data":
        expected = REFUSED
    elif kind == "run":
        expected = _fits(w, out, data, options, how, override)
    elif free(w, out):
        expected = REFUSED if resume not in ("auto", "never") else DONE
    else:
        expected = REFUSED if kind in ("data", "hf", "gguf") else EITHER
        if kind == "texts" or out == w.place:
            return
    start = None
    if expected == DONE:
        there = w.steps(out)
        at = int(resume[5:]) if resume[:5] == "step:" else max(there, default=0)
        start = w.trainer(out, at) if there else {"step": 0, "tokens": 0, "rows": 0}
    done = w.give(words, expected, [out], expected == DONE and w.source.random() < 0.3)
    if done.code == 0 and kind != "broken":
        w.kinds[out.resolve()] = "run"
        if start is not None:
            _counted(w, out, start, options, how)


def _counted(w: Workspace, out: Path, start: dict[str, Any], options: dict[str, Any],
             how: dict[str, str]) -> None:  # fmt: skip
    """Steps, rows and tokens after a training that was not refused."""
    now, end = BASE | options, w.steps(out)[-1]
    if end != max(now["train.steps"], start["step"]) and how.get("--resume", "")[:5] != "step:":
        w.say(f"{out.name} ends at step {end}, not {now['train.steps']}")
    if end <= start["step"]:
        return
    told, steps, rows = w.trainer(out, end), end - start["step"], now["train.batch_rows"]
    wanted = start.get("tokens", 0) + steps * rows * now["model.seq_len"]
    if "tokens" in start and "data.windows" not in options and told["tokens"] != wanted:
        w.say(f"{out.name}: {told['tokens']} tokens, not {wanted}")
    if start["step"] == 0 and told["rows"] != steps * rows:
        w.say(f"{out.name}: {told['rows']} rows, not {steps * rows}")


def evaluate(w: Workspace) -> None:
    model, texts = some(w, *USABLE), some(w, "texts", astray=0.1)
    words = ["evaluate", w.word(model), "--json", *CPU]
    good = w.kind(model) in USABLE
    expected = DONE if good and w.kind(texts) == "texts" else refused(w, model, texts)
    validate, name = w.source.random() < 0.25, str(texts)
    if validate:
        expected = EITHER if good else refused(w, model)
        if w.kind(model) == "run":
            stored = w.where / _fields(model)["data.path"]
            if stored != w.where and w.kind(stored) == "data":
                expected, name = DONE, w.fingerprint(stored)
    else:
        words += ["--text", w.word(texts)]
    if texts == w.place:
        expected = EITHER
    if w.source.random() < 0.2:
        other = some(w, *USABLE)
        words += ["--against", w.word(other)]
        if w.kind(other) not in USABLE:
            expected = refused(w, model, texts, other)
        elif expected == DONE:
            expected, name = DONE, ""  # the shorter of the two contexts
    done = w.give(words, expected)
    if done.code == 0 and good and name:
        w.judged(model, name, done.output)


def judge(w: Workspace, model: Path, expected: frozenset[int], texts: Path) -> None:
    """Evaluate a model on a text."""
    done = w.give(["evaluate", w.word(model), "--json", *CPU, "--text", w.word(texts)], expected)
    if done.code == 0:
        w.judged(model, str(texts), done.output)


def generate(w: Workspace) -> None:
    model = some(w, *USABLE)
    words = ["generate", w.word(model), "--max-tokens", "4", "--prompt", "kara misil", *CPU]
    good = w.kind(model) in USABLE
    done = w.give([*words, "--json"], DONE if good else refused(w, model))
    if done.code == 0 and good:
        told = json.loads(done.output[done.output.index("{") :])
        w.same("generate", ("generate", w.weights(model)), told["tokens"])


def export(w: Workspace) -> None:
    model, out = some(w, *USABLE), target(w)
    form = w.source.choice(["hf", "hf", "mlx", "gguf"])
    dtype = w.source.choice(["float32", "float32", "float16", "bfloat16", "q8_0"])
    words = ["export", w.word(model), f"--out={w.word(out)}", "--format", form, "--dtype", dtype]
    good = w.kind(model) in USABLE and free(w, out)
    expected = DONE if good else refused(w, model, out)
    if dtype == "q8_0":
        expected = EITHER if form == "gguf" else REFUSED
    interrupt = expected == DONE and w.source.random() < 0.15
    if w.give(words, expected, [out], interrupt).code != 0 or not good:
        return
    w.kinds[out.resolve()] = "gguf" if form == "gguf" else "hf"
    origin = w.weights(model)
    if form != "gguf":
        copy = w.weights(out)
        if copy not in w.origins and copy != origin:
            w.origins[copy] = (origin, LOSS if dtype == "float32" else ROUNDED)
    first = origin
    while first in w.origins and w.origins[first][1] == LOSS:
        first = w.origins[first][0]
    name = model.resolve().name if form == "gguf" else ""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in FILES}
    digest = str(sorted((name, hash(data)) for name, data in files.items()))
    seq = _fields(model)["model.seq_len"] if w.kind(model) == "run" else 0
    if w.kind(model) == "hf":
        seq = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    w.same("export", ("export", first, form, dtype, name, seq), digest)


def bring(w: Workspace) -> None:
    model, out = some(w, *USABLE), target(w)
    words = ["import", w.word(model), f"--out={w.word(out)}", "--steps=4"]
    good = w.kind(model) in USABLE and free(w, out)
    expected = DONE if good else refused(w, model, out)
    if w.source.random() < 0.4:
        data = some(w, "data", astray=0.2)
        words += [f"--data={w.word(data)}"]
        if w.kind(data) != "data":
            expected = refused(w, model, out, data)
    if (
        w.give(words, expected, [out], expected == DONE and w.source.random() < 0.2).code == 0
        and good
    ):
        w.kinds[out.resolve()] = "run"
        origin, copy = w.weights(model), w.weights(out)
        if copy != origin and w.origins.get(origin, ("", 0.0))[0] != copy:
            w.origins.setdefault(copy, (origin, LOSS))


def report(w: Workspace) -> None:
    runs = [some(w, "run") for _ in range(w.source.choice([1, 1, 2, 2, 3]))]
    runs = list(dict.fromkeys(runs)) if w.source.random() < 0.8 else runs
    good, outs = all(w.kind(run) == "run" for run in runs), list[Path]()
    words = ["report", *map(w.word, runs)]
    if w.source.random() < 0.4:
        outs = [target(w)]
        words += [f"--out={w.word(outs[0])}"]
    else:
        outs = [runs[0] / "report.html"] if len(runs) == 1 else [w.where / "comparison.html"]
    done = w.give(words, EITHER if good else refused(w, *runs), outs)
    if done.code == 0:
        real = outs[0].resolve()
        if real.parent == w.place:
            w.kinds[real] = "other"


def others(w: Workspace) -> None:
    path = some(w, "run", "data", "hf", astray=0.5)
    word, kind = w.word(path), w.kind(path)
    which = w.source.choice(["serve", "config", "plan", "train_sota.py", "nonsense"])
    if which == "serve" and kind not in (*USABLE, "broken"):
        w.give(["serve", word, "--port", "0"], REFUSED)
    elif which == "config":
        w.give(["config", "tiny", f"--data={word}"], DONE)
    elif which == "plan":
        words = ["plan", "tiny", f"--data={word}", *(flag(*each) for each in BASE.items())]
        w.give(words, DONE if kind == "data" else EITHER)
    elif which == "train_sota.py":
        expected = EITHER if kind == "run" else refused(w, path)
        w.give(["train_sota.py", f"--resume={word}"], expected, [path])
    else:
        verb = w.source.choice(["prepare", "merge", "train", "evaluate", "import", "data"])
        wrong = w.source.choice(["--wrong", "-x", "--out", "--step=", ""])
        w.give([verb, word, wrong], EITHER)


COMMANDS: list[tuple[Callable[[Workspace], None], int]] = [
    (prepare, 4), (parts, 1), (look, 4), (train, 8), (evaluate, 5), (generate, 2), (export, 4),
    (bring, 4), (report, 2), (others, 3),
]  # fmt: skip


def journey(w: Workspace) -> None:
    """10 to 25 commands, the first two of them sensible."""
    write_texts(w)
    data, run = made(w), made(w).with_name("first run")
    texts, share = w.these("texts")[0], "--val-fraction=0.2"
    w.give(["prepare", w.word(texts), f"--out={w.word(data)}", share], DONE, [data])
    w.kinds[data] = "data"
    words = ["train", "tiny", f"--data={w.word(data)}", f"--out={w.word(run)}"]
    w.give(words + [flag(*each) for each in BASE.items()], DONE, [run])
    w.kinds[run] = "run"
    commands, weights = zip(*COMMANDS, strict=True)
    last = w.source.randint(10, 25)
    before = w.result.commands
    while w.result.commands - before < last - 2 and not w.wrong():
        if w.source.random() < 0.3:
            w.source.choice(EVENTS)(w)
        w.source.choices(commands, weights)[0](w)
    models = [path for path in w.these(*USABLE) if path not in w.broken]
    for model in w.source.sample(models, min(4, len(models))):
        judge(w, model, DONE, w.these("texts")[0])


def journeys(root: Path, count: int, seed: int = 0) -> Result:
    """`count` journeys; the workspaces of failed ones are kept beside `root`."""
    result, temporary = Result(), root / "tmp"
    temporary.mkdir()
    preload = "transformers.models.llama.modeling_llama"
    places = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(root / "compiled")}
    with Zygote(root, preload, **places) as zygote:
        for number in range(count):
            place = root / "work"
            place.mkdir()
            w = Workspace(root, zygote, random.Random(f"{seed} {number} journey"), result)
            journey(w)
            result.journeys += 1
            if w.wrong():
                print(f"WRONG: seed {seed} journey {number}: {w.wrong()[0]}", flush=True)
                kept = Path(tempfile.mkdtemp(prefix=f"journey-{seed}-{number}-", dir=root.parent))
                shutil.copytree(place, kept, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(place)
    return result
