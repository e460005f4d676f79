"""Tokens per second of generation and of scoring, by preset and batch size, on random weights.

    python benchmarks/generation.py [PRESET ...]

Each figure is the median of three, of an untrained model, whose flat distribution makes top-p as
slow as it gets. `per_cpu_second` counts processor time, so that it says something on a machine that
others use too; on an idle one the two are alike with one thread. One JSON object a line.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from sota_transformer.config import Run
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.batch import Job, run_jobs
from sota_transformer.inference.benchmarks import Choice, hellaswag
from sota_transformer.inference.generate import make_sampler
from sota_transformer.inference.perplexity import perplexity
from sota_transformer.model.transformer import Transformer
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime

PROMPT, ADDED, WINDOWS, QUESTIONS = 64, 64, 8, 16


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time."""
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
    model.to(runtime.device).eval()

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
    took = seconds(lambda: perplexity(model, windows, tokenizer.token_bytes))
    show(name, runtime, f"tokens judged, windows of {config.seq_len}", windows[:, 1:].size, took)
    question = Choice("A person " * 20, ["walks to the door and opens it slowly"] * 4, 0)
    took = seconds(lambda: hellaswag(model, tokenizer, [question] * QUESTIONS))
    show(name, runtime, "HellaSwag questions", QUESTIONS, took)


def show(name: str, runtime: Runtime, what: str, count: int, took: tuple[float, float]) -> None:
    line = {"preset": name, "device": str(runtime.device), "threads": runtime.threads, "what": what}
    rates = {"per_second": count / took[0], "per_cpu_second": count / took[1]}
    print(json.dumps(line | {k: round(v, 1) for k, v in rates.items()}), flush=True)


if __name__ == "__main__":
    for preset in sys.argv[1:] or ["16m", "125m"]:
        measure(preset)
