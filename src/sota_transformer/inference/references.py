"""Published figures for comparison, each by the protocol it was measured with.

Sources: the GPT-2 paper; lm-eval issues #2159 and #356; EleutherAI's Pythia evaluation files; the
OPT and GPT-Neo rows of lm-eval's tables; llm.c for HellaSwag. "from memory" marks values
recalled from a published table without checking it again.
"""

from typing import NamedTuple


class Reference(NamedTuple):
    """One published figure; `name` is that of a `Benchmark`."""

    model: str
    name: str
    value: float
    note: str = ""


REFERENCES = (
    Reference("GPT-2 124M", "lambada_paper accuracy", 0.4599),
    Reference("GPT-2 124M", "lambada_paper perplexity", 35.13),
    Reference("GPT-2 124M", "lambada_openai accuracy", 0.3256),
    Reference("GPT-2 124M", "lambada_openai perplexity", 40.06),
    Reference("OPT-125M", "lambada_openai accuracy", 0.379, "180 B tokens"),
    Reference("OPT-125M", "lambada_openai perplexity", 26.0),
    Reference("GPT-Neo-125M", "lambada_openai accuracy", 0.374, "300 B tokens"),
    Reference("Pythia-160M", "lambada_openai accuracy", 0.328, "300 B tokens; 0.399 at 132 B"),
    Reference("Pythia-70M", "lambada_openai accuracy", 0.184),
    Reference("Cerebras-GPT-111M", "lambada_openai accuracy", 0.194, "2.2 B tokens; from memory"),
    Reference("GPT-2 124M", "lambada_standard accuracy", 0.26, "about"),
    Reference("GPT-2 124M", "hellaswag acc_norm", 0.294, "llm.c"),
    Reference("OPT-125M", "hellaswag acc_norm", 0.311),
    Reference("Pythia-160M", "hellaswag acc_norm", 0.302, "300 B tokens; from memory"),
    Reference("SmolLM-135M", "hellaswag acc_norm", 0.423, "600 B tokens"),
    Reference("chance", "hellaswag acc_norm", 0.25),
)
