"""Generation and scoring speed by preset and batch size, on random weights.

    python benchmarks/generation.py [PRESET ...]
    python benchmarks/generation.py --against-transformers [--threads=N] [PRESET ...]

The first prints one JSON object per line: medians of three, for an untrained model, whose flat
distribution is the worst case for top-p. `per_cpu_second` is based on CPU time, which stays
meaningful on a shared machine; with one thread on an idle machine it equals `per_second`.

The second continues one prompt greedily, here and with `transformers` on the exported model, in
turn, in float32 and bfloat16, and prints a table: tokens per second (median, best), the fraction
of memory bandwidth that this uses (each token reads every weight once; the bandwidth is the best
rate of a dot product over 512 MB with the same threads), and the speedup over `transformers` in
each dtype.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sota_transformer import durable
from sota_transformer.commands.common import open_to_generate
from sota_transformer.config import Run
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.batch import Job, run_jobs
from sota_transformer.inference.benchmarks import Choice, hellaswag
from sota_transformer.inference.export import write_huggingface
from sota_transformer.inference.generate import generate, make_sampler
from sota_transformer.inference.perplexity import sequence_sums
from sota_transformer.model.decode import lay_for_rows
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime

PROMPT, ADDED, WINDOWS, QUESTIONS, ROUNDS = 64, 64, 8, 16, 3


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Median wall time and CPU time of three calls, after a warm-up."""
    work()
    times = []
    for _ in range(3):
        began, used = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - began, time.process_time() - used))
    return statistics.median(wall for wall, _ in times), statistics.median(cpu for _, cpu in times)


def measure(name: str) -> None:
    tokenizer, config = Tokenizer(), PRESETS[name]().model
    runtime = Runtime.detect(Run(), config.parameter_count)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    lay_for_rows(model.to(runtime.device).eval())

    def continued(rows: int) -> list[object]:
        jobs = [
            Job(
                tokens=list(range(row, row + PROMPT)),
                sampler=make_sampler(0.8, top_p=0.95, seed=row),
                max_tokens=ADDED,
                stop_ids=(),
            )
            for row in range(rows)
        ]
        return list(run_jobs(model, tokenizer, jobs, rows))

    for rows in (1, 4, 16):
        took = seconds(partial(continued, rows))
        show(name, runtime, f"tokens generated, {rows} rows", rows * ADDED, took)
    windows = np.random.default_rng(0).integers(0, 50_000, (WINDOWS, config.seq_len + 1))
    took = seconds(lambda: sequence_sums(model, windows, tokenizer.token_bytes))
    show(name, runtime, f"tokens scored, windows of {config.seq_len}", windows[:, 1:].size, took)
    question = Choice("A person " * 20, ["walks to the door and opens it slowly"] * 4, 0)
    took = seconds(lambda: hellaswag(model, tokenizer, [question] * QUESTIONS))
    show(name, runtime, "HellaSwag questions", QUESTIONS, took)


def against_transformers(name: str) -> None:
    """Each program and dtype in turn; CPU seconds with one thread, wall seconds with more."""
    config = PRESETS[name]().model
    works = programs(name)
    times: dict[str, list[float]] = {what: [] for what in works}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    rates, data = [], torch.ones(1 << 27)
    for _ in range(1 + ROUNDS):  # the first round is a warm-up
        for what, work in works.items():
            began = clock()
            work()
            times[what].append(clock() - began)
            began = clock()
            data.dot(data)  # 512 MB read once
            rates.append(4 * data.numel() / (clock() - began))
    took = {what: statistics.median(every[1:]) for what, every in times.items()}
    same = works["sota float32"]() == works["transformers float32"]()
    print(
        f"{name}, {torch.get_num_threads()} threads, {PROMPT} + {ADDED} tokens, memory "
        f"{max(rates) / 1e9:.1f} GB/s, float32 text {'the same' if same else 'DIFFERENT'}"
    )
    print(f"{'':22}{'tokens/s':>9}{'best':>8}{'memory':>8}{'x float32':>11}{'x bfloat16':>11}")
    for what in works:
        read = config.parameter_count * (2 if "bfloat16" in what else 4) * ADDED / took[what]
        times_others = [took[f"transformers {t}"] / took[what] for t in ("float32", "bfloat16")]
        print(
            f"{what:22}{ADDED / took[what]:9.1f}{ADDED / min(times[what]):8.1f}"
            f"{read / max(rates):8.2f}{times_others[0]:11.2f}{times_others[1]:11.2f}",
            flush=True,
        )


def programs(name: str) -> dict[str, Callable[[], list[int]]]:
    """Functions that continue the prompt, by program and dtype, on the same random weights."""
    from transformers import AutoModelForCausalLM

    model = Transformer(PRESETS[name]().model)
    model.init_weights(torch.Generator().manual_seed(0))
    prompt = list(range(1000, 1000 + PROMPT))
    works: dict[str, Callable[[], list[int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        with durable.commit_folder(folder, {}) as writer:
            write_huggingface(writer, model.eval(), "float32", "")
        for dtype in ("float32", "bfloat16"):
            mine = open_to_generate(folder, "cpu", None, dtype).model
            other = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            works[f"sota {dtype}"] = lambda m=mine: list(
                generate(m, prompt, make_sampler(0.0), ADDED, stop_ids=())
            )
            works[f"transformers {dtype}"] = lambda o=other: o.generate(
                torch.tensor([prompt]),
                max_new_tokens=ADDED,
                min_new_tokens=ADDED,
                do_sample=False,
                suppress_tokens=None,
            )[0, PROMPT:].tolist()
    return works


def show(name: str, runtime: Runtime, what: str, count: int, took: tuple[float, float]) -> None:
    line = {"preset": name, "device": str(runtime.device), "threads": runtime.threads, "what": what}
    rates = {"per_second": count / took[0], "per_cpu_second": count / took[1]}
    print(json.dumps(line | {k: round(v, 1) for k, v in rates.items()}), flush=True)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        if word.startswith("--threads="):
            torch.set_num_threads(int(word.removeprefix("--threads=")))
    against = "--against-transformers" in sys.argv
    for preset in [word for word in sys.argv[1:] if word[0] != "-"] or ["16m", "125m"]:
        (against_transformers if against else measure)(preset)
