"""Random model folders like those in use, compared with `transformers` on the same folder.

A folder that is accepted has to compute what transformers computes, also after import, export and
training. A refusal is one line with one of two exit codes, and leaves nothing behind. A folder that
transformers cannot open may be accepted if the oddity does not change the model.
"""

import io
import json
import random
import shutil
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from sota_transformer import cli
from sota_transformer.commands.common import open_to_generate
from sota_transformer.config import GPT2_VOCAB, VOCAB
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.errors import BAD_DATA, NO_INPUT
from sota_transformer.inference.folder import read_model
from sota_transformer.inference.generate import generate, make_sampler
from sota_transformer.training.start import train

from .commands import Finished, corpus, prepare_arguments, sha256, sota
from .folder_making import Fate, Made, make

ALLOWED = 1e-4  # difference of logits, as a share of their standard deviation; of losses
EXPORT_EVERY, TRAIN_EVERY, REAL_EVERY = 3, 6, 60  # of accepted folders; of all
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. Nobody looked up."
TRAINING = "--train.sample-every 0 --train.eval-tokens 64 --optim.dropout-start 0 --threads 1"
TRAINING += " --device cpu --run.dtype float32 --run.compile off --train.steps 1"


@dataclass
class Result:
    """Counts, and a description of everything that went wrong."""

    folders: int = 0
    taken: int = 0
    exported: int = 0
    trained: int = 0
    commands: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    """Largest accepted difference of logits, as a share of their spread."""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.folders:,} folders, {self.taken:,} accepted, of these {self.exported:,} "
        text += f"exported and {self.trained:,} trained; {self.commands:,} commands; logits differ "
        text += f"by up to {self.worst:.1e} of their spread; refused, by oddity:"
        return text + "".join(f"\n{n:>8,}  {why}" for why, n in self.refused.most_common())


def command(*words: object) -> Finished:
    """Run the command in this process; output of both streams."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = cli.main(list(map(str, words)))
    return Finished(code, out.getvalue())


def open_theirs(folder: Path) -> PreTrainedModel | None:
    """The model as read by transformers; None if it fails, or makes up missing tensors."""
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except Exception:  # it documents no list of errors
        return None
    return None if told["missing_keys"] or told["mismatched_keys"] else model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(B, T) -> (B, T, V) float32."""
    return model(ids, use_cache=False).logits.float()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a share of the spread; infinite for other shapes or NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    share = float((ours - theirs).abs().max() / theirs.std().clamp(min=1e-30))
    return share if share == share else float("inf")


def nats(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """(B, T + 1) ids -> (B, T) plain loss of each but the first."""
    logits = logits_of(model, windows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


def _computed(source: random.Random, folder: Path, theirs: PreTrainedModel) -> tuple[float, bool]:
    """How far our logits are from theirs, and whether a greedy continuation is among theirs."""
    ours = read_model(folder)
    context, vocab = ours.config.seq_len, ours.config.vocab_size
    ids = torch.tensor([[source.randrange(vocab) for _ in range(context)] for _ in range(2)])
    with torch.no_grad():
        far = distance(ours.logits(ours(ids)), logits_of(theirs, ids))
    prompt = ids[0, : source.randint(1, context - 1)].tolist()
    room = min(8, context - len(prompt))
    quick = open_to_generate(folder, "cpu", None, "float32").model
    found = list(generate(quick, prompt, make_sampler(0.0), room))
    whole = torch.tensor([prompt + found])
    scores = logits_of(theirs, whole)[0, len(prompt) - 1 :, :GPT2_VOCAB]
    chosen = scores[torch.arange(len(found)), found]
    tie = 2 * ALLOWED * float(scores.std())
    full = len(found) == room or int(scores[len(found)].argmax()) == EOT
    return far, full and bool((chosen >= scores[: len(found)].max(-1).values - tie).all())


@cache
def _ids() -> Tensor:
    return torch.tensor([EOT, *Tokenizer().encode(TEXT)])


def _judged(theirs: PreTrainedModel, context: int) -> float:
    """The loss that `sota evaluate` has to find."""
    ids = _ids()
    parts = [ids[at : at + context + 1] for at in range(0, len(ids) - 1, context)]
    return float(torch.cat([nats(theirs, part[None])[0] for part in parts]).double().mean())


def _trained(place: Path, data: Path, theirs: PreTrainedModel, context: int) -> str:
    """Import, and train one step on all windows; what is wrong."""
    done = command("import", place / "model", "--out", place / "learning", "--data", data)
    if done.code:
        return f"import --data: exit {done.code} {done.output}"
    shards = sorted(data.glob("train-?????.npy"))
    ids = torch.from_numpy(np.concatenate([np.load(path) for path in shards]).astype(np.int64))
    count = (len(ids) - 1) // context
    windows = torch.stack([ids[n * context : n * context + context + 1] for n in range(count)])
    words = done.output.partition("train it further:")[2].split()[2:]
    config = cli.resolve([*words, *TRAINING.split(), f"--train.batch-rows={count}"], "train")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        train(config)
    lines = (place / "learning/metrics.jsonl").read_text().splitlines()
    loss = next(x["loss"] for x in map(json.loads, lines) if "loss" in x)
    expected = float(nats(theirs, windows).double().mean())
    near = loss is not None and abs(loss - expected) <= ALLOWED * expected
    return "" if near else f"trained: a loss of {loss}, not {expected}"


def _exported(source: random.Random, place: Path, theirs: PreTrainedModel) -> str:
    """Export the folder or the run for transformers; what is wrong."""
    origin, out = place / source.choice(["model", "run"]), place / "exported"
    done = command("export", origin, "--out", out, "--format", source.choice(["hf", "mlx"]))
    back = None if done.code else open_theirs(out)
    if back is None:
        return f"export of the {origin.name}: exit {done.code} {done.output}"
    ids = torch.tensor([[source.randrange(GPT2_VOCAB) for _ in range(7)]])
    far = distance(logits_of(back, ids), logits_of(theirs, ids))
    return "" if far <= ALLOWED else f"the exported model differs by {far:.1e}"


def _refusal(done: Finished) -> str:
    """What is wrong with how a command refused a folder."""
    lines = done.output.splitlines()
    good = done.code in (BAD_DATA, NO_INPUT) and len(lines) == 1 and lines[0].startswith("sota: ")
    return "" if good else f"exit {done.code} {done.output[-600:]}"


def _taken(
    source: random.Random, place: Path, made: Made, evaluated: Finished, result: Result, data: Path
) -> list[str]:
    """What is wrong with an accepted folder."""
    result.taken += 1
    theirs = open_theirs(place / "model")
    if theirs is None and made.fate <= Fate.KEEP:
        theirs = open_theirs(place / "plain")
    if made.fate == Fate.NONE or theirs is None:
        return ["accepted, but should be refused"]
    far, greedy = _computed(source, place / "model", theirs)
    result.worst = max(result.worst, far)
    wrong = [f"its logits differ by {far:.1e}"] if not far <= ALLOWED else []
    wrong += [] if greedy else ["its continuation differs"]
    context = theirs.config.max_position_embeddings
    told, loss = json.loads(evaluated.output)["nats"], _judged(theirs, context)
    if not abs(told - loss) <= ALLOWED * loss:
        wrong.append(f"evaluate: {told}, not {loss}")
    if result.taken % EXPORT_EVERY == 0:
        result.exported += 1
        result.commands += 1
        wrong += filter(None, [_exported(source, place, theirs)])
    if result.taken % TRAIN_EVERY == 0 and theirs.config.vocab_size >= VOCAB:
        result.trained += 1
        result.commands += 2
        wrong += filter(None, [_trained(place, data, theirs, context)])
    return wrong


def _all(place: Path) -> dict[Path, str]:
    """Everything below a folder, hidden or not."""
    return {path: sha256(path) if path.is_file() else "" for path in place.rglob("*")}


def judge(place: Path, made: Made, number: int, seed: int, result: Result, data: Path) -> list[str]:
    """What is wrong with how the commands treat a folder."""
    folder, before = place / "model", _all(place)
    evaluated = command("evaluate", folder, "--device", "cpu", "--text", place.parent / "text.txt",
                        "--json")  # fmt: skip
    imported = command("import", folder, "--out", place / "run")
    result.commands += 2
    wrong = list[str]()
    if evaluated.code != imported.code:
        wrong.append(f"evaluate {evaluated}, import {imported}")
    elif imported.code:
        result.refused[", ".join(made.oddities[:1])] += 1
        wrong += filter(None, [_refusal(evaluated), _refusal(imported)])
        if made.fate == Fate.TAKE:
            wrong.append(f"refused: {imported.output}")
        if _all(place) != before:
            wrong.append("something was left behind")
    else:
        source = random.Random(f"{seed} {number} judge")
        wrong += _taken(source, place, made, evaluated, result, data)
    if number % REAL_EVERY == 0:
        shutil.rmtree(place / "run", ignore_errors=True)
        real = sota(["import", str(folder), "--out", str(place / "run")], place)
        result.commands += 1
        if (real.code, real.output) != (imported.code, imported.output):
            wrong.append(f"the real command: {real}, here {imported}")
    return wrong


def folders(root: Path, count: int, seed: int = 0) -> Result:
    """`count` folders; wrong ones are kept beside `root`."""
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    (root / "text.txt").write_text(TEXT)
    data, result = root / "data", Result()
    done = sota(prepare_arguments(corpus(root / "corpus", 1, 8), data, 1), root)
    assert done.code == 0, done.output
    for number in range(count):
        place = root / f"f{number:05d}"
        made = make(number, seed, place)
        result.folders += 1
        try:
            wrong = judge(place, made, number, seed, result, data)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            name = f"seed {seed} folder {number} ({', '.join(made.oddities)})"
            result.wrong += [f"{name}: {each}" for each in wrong]
            kept = root.parent / f"wrong-{seed}-{number}"
            shutil.copytree(place, kept, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(place)
    return result
