"""Exported models in four other programs: same text, perplexity and benchmark scores.

    python benchmarks/export_proof.py RUN [PROMPTS]

Exports RUN into a temporary folder and reads it with those of transformers, llama.cpp, mlx-lm and
lm-eval that are installed. Prompts and examples in LAMBADA and HellaSwag format are cut from the
run's own validation split, so nothing is downloaded. Prints one JSON object per line.
"""

import importlib.util
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sota_transformer.commands.common import open_to_generate
from sota_transformer.commands.evaluate import run_evaluate
from sota_transformer.commands.transfer import run_export
from sota_transformer.data.shards import TokenWindows
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.batch import Job, run_jobs
from sota_transformer.inference.generate import make_sampler
from sota_transformer.inference.perplexity import sequence_sums, summarise
from sota_transformer.model.transformer import Transformer
from sota_transformer.options import Evaluate, Export

TOKENIZER = Tokenizer()
ADDED = 12
WINDOWS = 16
EXAMPLES = 60


def show(what: str, **values: Any) -> None:
    print(json.dumps({"what": what} | values), flush=True)


def ours(model: Transformer, prompts: list[list[int]]) -> list[list[int]]:
    jobs = [
        Job(tokens=prompt, sampler=make_sampler(0.0), max_tokens=ADDED, stop_ids=())
        for prompt in prompts
    ]
    texts: list[list[int]] = [[] for _ in jobs]
    for number, drawn in run_jobs(model, TOKENIZER, jobs, 16):
        texts[number].append(drawn.token)
    return texts


def with_transformers(
    folder: Path, model: Transformer, prompts: list[list[int]], windows: np.ndarray
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        difference = 0.0
        total = 0.0
        for row in ids:
            logits = other(row[None, :-1]).logits[0]
            mine = model.logits(model(row[None, :-1]))[0]
            difference = max(difference, float((logits - mine).abs().max()))
            loss = torch.nn.functional.cross_entropy(logits.double(), row[1:], reduction="sum")
            total += float(loss)
    theirs = float(np.exp(total / ids[:, 1:].numel()))
    mine_perplexity = summarise(sequence_sums(model, windows, TOKENIZER.token_bytes)).perplexity
    show(
        "perplexity",
        sota=mine_perplexity,
        transformers=theirs,
        relative=abs(theirs / mine_perplexity - 1),
        largest_logit_difference=difference,
    )
    same = 0
    for prompt, text in zip(prompts, ours(model, prompts), strict=True):
        given = tokenizer(TOKENIZER.decode(prompt), return_tensors="pt")
        out = other.generate(**given, max_new_tokens=ADDED, do_sample=False, eos_token_id=None)
        same += out[0, given["input_ids"].shape[1] :].tolist() == text
    show("greedy text", reader="transformers", same=same, prompts=len(prompts))


def with_llama_cpp(folder: Path, model: Transformer, prompts: list[list[int]]) -> None:
    from itertools import islice

    from llama_cpp import Llama

    other = Llama(str(folder / "model.gguf"), n_ctx=512, n_threads=1, verbose=False)
    same = 0
    for prompt, text in zip(prompts, ours(model, prompts), strict=True):
        other.reset()
        drawn = other.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        same += list(islice(drawn, ADDED)) == text
    show("greedy text", reader="llama.cpp", same=same, prompts=len(prompts))


def with_mlx(folder: Path, model: Transformer, prompts: list[list[int]]) -> None:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    other, _ = load(str(folder))
    same = 0
    for prompt, text in zip(prompts, ours(model, prompts), strict=True):
        steps = generate_step(mx.array(prompt), other, max_tokens=ADDED)
        same += [int(token) for token, _ in steps] == text
    show("greedy text", reader="mlx-lm", same=same, prompts=len(prompts))


def examples(windows: TokenWindows, folder: Path) -> tuple[Path, Path]:
    """Write LAMBADA and HellaSwag files from validation text; wrong endings are other passages."""
    source = random.Random(0)
    words = TOKENIZER.decode(windows.read(0, 60_000)).split()
    lambada, hellaswag = folder / "lambada.jsonl", folder / "hellaswag.jsonl"
    starts = [source.randrange(len(words) - 90) for _ in range(4 * EXAMPLES)]
    texts = [" ".join(words[s : s + source.randint(30, 70)]) for s in starts[:EXAMPLES]]
    lambada.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines = []
    for number in range(EXAMPLES):
        four = starts[4 * number : 4 * number + 4]
        label, start = source.randrange(4), four[0]
        endings = [" ".join(words[s + 40 : s + 40 + source.randint(5, 15)]) for s in four[1:]]
        endings.insert(label, " ".join(words[start + 40 : start + 50]))
        lines.append(
            {
                "activity_label": "Reading",
                "ctx_a": " ".join(words[start : start + 30]),
                "ctx_b": " ".join(words[start + 30 : start + 40]),
                "endings": endings,
                "label": str(label),
            }
        )
    hellaswag.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lambada, hellaswag


def with_lm_eval(run: Path, folder: Path, lambada: Path, hellaswag: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from tests.test_inference_evaluate import harness_tasks

    run_evaluate(Evaluate(run=run, lambada=lambada, hellaswag=hellaswag, json=True))
    exported = HFLM(pretrained=str(folder), device="cpu", batch_size=8)
    tasks = harness_tasks(lambada, hellaswag)
    found = simple_evaluate(model=exported, tasks=tasks, bootstrap_iters=0)
    if found:
        results = found["results"]
        for task, values in results.items():
            kept = {key: value for key, value in values.items() if isinstance(value, float)}
            show("lm-eval on the export", task=task, **kept)


def main(run: Path, count: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    opened = open_to_generate(run, "cpu", None, "float32")
    assert opened.config is not None
    windows = TokenWindows(opened.config.data.path, "val", opened.model.config.seq_len)
    show("run", step=opened.step, parameters=opened.model.config.parameter_count)
    starts = np.linspace(0, windows.tokens - 100, count).astype(int)
    prompts = [windows.read(int(s), int(s) + 12).tolist() for s in starts]
    # Keep only prompts as re-encoded from their text, since some programs are given text.
    prompts = [ids for p in prompts if (ids := TOKENIZER.encode(TOKENIZER.decode(p)))]
    rows = np.stack([windows[int(i)] for i in np.linspace(0, len(windows) - 1, WINDOWS)])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_export(Export(run=run, out=folder / "hf"))
        with_transformers(folder / "hf", opened.model, prompts, rows)
        if importlib.util.find_spec("mlx_lm"):
            with_mlx(folder / "hf", opened.model, prompts)
        if importlib.util.find_spec("gguf") and importlib.util.find_spec("llama_cpp"):
            run_export(Export(run=run, out=folder / "gguf", format="gguf"))
            with_llama_cpp(folder / "gguf", opened.model, prompts)
        if importlib.util.find_spec("lm_eval"):
            with_lm_eval(run, folder / "hf", *examples(windows, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
