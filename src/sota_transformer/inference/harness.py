"""EleutherAI's lm-eval on our models, for `sota evaluate --tasks`; needs the extra [lm-eval]."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from sota_transformer.data.progress import Meter
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.inference.batch import Job, run_jobs
from sota_transformer.inference.benchmarks import encode_pair, score
from sota_transformer.inference.generate import make_sampler
from sota_transformer.inference.perplexity import rolling_sums
from sota_transformer.model.transformer import Transformer

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Harness(LM):
    """lm-eval's interface to a model; every request carries its text in `args`."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._model, self._tokenizer = model, tokenizer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of each (context, continuation)."""
        pairs = [encode_pair(self._tokenizer, *request.args) for request in requests]
        return [(-scored.nats, scored.greedy) for scored in score(self._model, pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each whole text after an end-of-text, in lm-eval's windows."""
        context, size = self._model.config.seq_len, self._tokenizer.token_bytes
        texts = [np.array([EOT, *self._tokenizer.encode(r.args[0])], np.uint16) for r in requests]
        with Meter("evaluate", sum(len(tokens) - 1 for tokens in texts)) as meter:
            sums = [rolling_sums(self._model, tokens, size, context, meter) for tokens in texts]
        return [-float(each[:, 0].sum()) for each in sums]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy text for each request, up to its stop strings; sampling is not supported."""
        jobs = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample", options.get("temperature")):  # without sampling no effect
                raise ValueError("lm-eval tasks that sample are not supported; use greedy ones")
            stops = options.get("until") or []
            lengths = (options[name] for name in _LENGTHS if options.get(name) is not None)
            longest = int(next(lengths, 256))
            room = self._model.config.seq_len - longest  # for the prompt, as in lm-eval's HFLM
            if room < 1:
                text = f"{longest} tokens to generate leave no room for a prompt"
                raise ValueError(f"{text} in a context of {self._model.config.seq_len}")
            jobs.append(
                Job(
                    tokens=(self._tokenizer.encode(context) or [EOT])[-room:],
                    sampler=make_sampler(0.0),
                    max_tokens=longest,
                    stops=[stops] if isinstance(stops, str) else list(stops),
                )
            )
        texts = [""] * len(jobs)
        with Meter("evaluate", None) as meter:  # most texts end before their length
            for number, drawn in run_jobs(self._model, self._tokenizer, jobs):
                texts[number] += drawn.text
                meter.add(1)
        return texts


def evaluate(
    model: Transformer, tokenizer: Tokenizer, tasks: Sequence[Any], limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Results by task, under lm-eval's names; `tasks` are task names or configurations."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    found = simple_evaluate(
        model=Harness(model, tokenizer), tasks=list(tasks), limit=limit, bootstrap_iters=0
    )
    return found["results"] if found else {}
