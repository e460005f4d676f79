"""The options of every verb except `train`, one frozen dataclass each; standard library only.

A field's docstring is its help on the command line.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sota_transformer.config import Device, at_least


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn text into token shards."""

    inputs: tuple[str, ...]
    """Files, folders, globs, - (standard input) or python: (the Python source on this machine)."""
    out: Path = Path()
    """Folder to write to; must be given."""
    val_fraction: float = 0.05
    """Fraction of documents held out for validation, chosen by their content."""
    workers: int = 0
    """Worker processes; 0 uses every core. The result does not depend on it."""
    text_field: str = "text"
    """Field or column that holds a document's text."""
    memory_mb: int = 0
    """Memory limit in MB for all processes together, met with fewer workers; 0 sets no limit."""
    near_dedup: float = 0.0
    """Drop documents this similar to an earlier one (Jaccard index of 5-grams; try 0.8); 0: off."""
    exclude: tuple[str, ...] = ()
    """Files whose text must not be trained on; drops documents sharing 13 tokens in a row."""
    append: bool = False
    """Add the inputs to the prepared data in --out; existing data stays in place."""
    part: str = ""
    """i/N processes every N-th unit of work and stops. `sota merge` combines the parts;
    so does the same command without --part, which also processes missing ones."""
    bad_text: Literal["drop", "replace"] = "drop"
    """Invalid Unicode: drop the document, or replace the bad part with U+FFFD. Both are counted."""

    def problems(self) -> list[str]:
        """Everything wrong with these options."""
        found = at_least(self, 0, "workers", "memory_mb")
        if not self.inputs:
            found.append("prepare needs at least one INPUT: a file, a folder, a glob, python: or -")
        if self.near_dedup and not 0.5 <= self.near_dedup <= 1:
            found.append(f"prepare.near_dedup {self.near_dedup} must be 0 or in [0.5, 1]")
        index, _, count = self.part.partition("/")
        numbers = all(re.fullmatch("[0-9]{1,9}", number) for number in (index, count))
        if self.part and not (numbers and 1 <= int(index) <= int(count)):
            found.append(f"prepare.part {self.part!r} must be i/N with i from 1 to N")
        if self.part and "-" in self.inputs:
            found.append("--part needs files: each part would have to reread standard input")
        if self.out == Path():
            found.append("prepare needs --out FOLDER, other than the current folder")
        if not 0 <= self.val_fraction < 1:
            found.append(f"prepare.val_fraction {self.val_fraction} must be in [0, 1)")
        return found


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Combine the parts written by `sota prepare --part`."""

    out: Path
    """The parts' --out folder; the prepared data is written there."""
    workers: int = 0
    """Worker processes; 0 uses every core. The result does not depend on it."""
    memory_mb: int = 0
    """Memory limit in MB for all processes together, met with fewer workers; 0 sets no limit."""


@dataclass(frozen=True, kw_only=True)
class DataView:
    """Inspect prepared data."""

    folder: Path
    """Folder made by `sota prepare`, or one with nanoGPT, Megatron or datatrove token files."""
    show: int = 2
    """Documents to show from each split."""
    list_split: str = ""
    """train or val: list its documents as JSON lines instead; tokens exclude the end-of-text."""
    window: str = ""
    """train:INDEX or val:INDEX:SEQ_LEN: show that training window as text instead."""
    leakage: bool = False
    """Also measure how much validation text occurs in the training split; reads all data."""
    html: Path | None = None
    """Write an HTML page to this file instead."""
    export_bin: Path | None = None
    """Write nanoGPT's train.bin and val.bin into this folder instead."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write an HTML report on one run, or a comparison of several."""

    runs: tuple[Path, ...]
    """Run folders."""
    out: Path | None = None
    """File to write; by default report.html in the run's folder, or comparison.html here."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate text from prompts."""

    run: Path
    """Run folder, or Hugging Face folder of a Llama or Qwen3 model with the GPT-2 tokenizer."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; with none, the model starts a new document."""
    file: Path | None = None
    """One prompt per line, or .jsonl with a field `prompt`; - reads one prompt from stdin."""
    max_tokens: int = 200
    """Maximum number of tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 samples from all."""
    top_p: float = 0.95
    """Sample from the most likely tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Sample only tokens with at least this fraction of the most likely one's probability."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens that already occurred less likely."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    seed: int = 0
    """The same seed gives the same text; with several prompts, prompt i uses seed + i."""
    json: bool = False
    """Print one JSON object per prompt."""
    logprobs: int = -1
    """With --json: log-probabilities of each token and of this many alternatives; -1 for none."""
    step: int | None = None
    """Checkpoint to use; by default the newest valid one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 generates what an export of the run does; bfloat16 is faster, slightly different."""
    device: Device = "auto"
    """Device to run on."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure perplexity and bits per byte with error bars, LAMBADA and HellaSwag."""

    run: Path
    """Run folder, or Hugging Face folder of a Llama or Qwen3 model with the GPT-2 tokenizer."""
    text: tuple[Path, ...] = ()
    """Files or folders to evaluate on, - is stdin; by default the validation split.
    A text file is one text; JSON lines and tables are read as in `sota prepare`."""
    against: Path | None = None
    """A second run or model to compare on the same text: the difference and its paired error."""
    step: int | None = None
    """Checkpoint to evaluate; by default the newest valid one."""
    tokens: int = 0
    """Maximum number of tokens to evaluate; 0 takes all."""
    context: int = 0
    """Tokens per window; 0 uses the model's context."""
    stride: int = 0
    """Tokens between the starts of two windows; 0 uses `context`, so they do not overlap."""
    lambada: Path | None = None
    """JSON lines with `text`, or `standard` for the original spelling; `hub` downloads both."""
    hellaswag: Path | None = None
    """JSON lines with ctx, endings and label (or the hub's fields); `hub` downloads them."""
    tasks: str = ""
    """Comma-separated tasks for EleutherAI's lm-eval; needs the extra [lm-eval]."""
    limit: int = 0
    """Maximum number of examples per benchmark; 0 takes all."""
    json: bool = False
    """Print one JSON object and nothing else."""
    device: Device = "auto"
    """Device to run on."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model in a format that other programs load."""

    run: Path
    """Run folder, or Hugging Face folder of a Llama or Qwen3 model with the GPT-2 tokenizer."""
    out: Path = Path()
    """Folder to write; must be given, and new or empty."""
    format: Literal["hf", "gguf", "mlx"] = "hf"
    """hf and mlx: safetensors for transformers, vLLM, mlx-lm; gguf: llama.cpp and Ollama."""
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"
    """dtype of the matrices; q8_0 for gguf only."""
    step: int | None = None
    """Checkpoint to export; by default the newest valid one."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Start a run at step 0 from a Hugging Face Llama or Qwen3 model, or from another run."""

    model: Path
    """Folder with config.json and safetensors, or a run folder: its newest checkpoint."""
    out: Path = Path()
    """Folder of the new run; must be given, and new or empty."""
    data: Path | None = None
    """Folder made by `sota prepare`, to train on."""
    steps: int = 1000
    """Number of steps to train for."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Run an OpenAI-compatible server with a web page to try the model."""

    run: Path
    """Run folder, or Hugging Face folder of a Llama or Qwen3 model with the GPT-2 tokenizer."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs --api-key."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    api_key: str = ""
    """Key that requests must send; also read from SOTA_API_KEY."""
    rows: int = 8
    """Continuations computed together; 16 more can wait, further ones get a 503."""
    step: int | None = None
    """Checkpoint to serve; by default the newest valid one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 generates what an export of the run does; bfloat16 is faster, slightly different."""
    device: Device = "auto"
    """Device to run on."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check that this machine is fit for training."""

    device: Device = "auto"
    """Device to check."""
    folder: Path = Path()
    """Folder where runs would live, by default this one; its disk is checked."""
