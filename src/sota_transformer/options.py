"""The options of every verb but `train`, one frozen dataclass each; standard library only.

A field's text is its help on the command line.
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
    """Files, folders, globs, - (standard input) and python: (the Python source on this machine)."""
    out: Path = Path()
    """Folder to write."""
    val_fraction: float = 0.05
    """Share of documents, chosen by their content, kept for validation."""
    workers: int = 0
    """Processes; 0 uses every core. Changes nothing in the result."""
    text_field: str = "text"
    """Field or column that holds a document's text."""
    memory_mb: int = 0
    """Megabytes that all processes together may use; fewer workers then. 0 sets no bound."""
    near_dedup: float = 0.0
    """Drop documents whose 5-grams overlap an earlier one's by this share (0.8); 0 keeps them."""
    exclude: tuple[str, ...] = ()
    """Files whose text must not be trained on: documents with 13 tokens in a row of it go."""
    append: bool = False
    """Add the inputs to the prepared data in --out; what is there stays where it is."""
    part: str = ""
    """i/N does every N-th unit of work and stops; `sota merge` puts all parts together, or the same
    command without --part, which also does what is missing."""
    bad_text: Literal["drop", "replace"] = "drop"
    """Text that is not valid Unicode: leave the document out, or take it with U+FFFD for what is
    broken. Counted either way."""

    def problems(self) -> list[str]:
        """All that is wrong with these options."""
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
            found.append("--part needs files: standard input cannot be read again by each part")
        if self.out == Path():
            found.append("prepare needs --out FOLDER, another than the current one")
        if not 0 <= self.val_fraction < 1:
            found.append(f"prepare.val_fraction {self.val_fraction} must be in [0, 1)")
        return found


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Put the parts of a preparation together."""

    out: Path
    """The --out of the parts: prepared data appears there."""
    workers: int = 0
    """Processes; 0 uses every core. Changes nothing in the result."""
    memory_mb: int = 0
    """Megabytes that all processes together may use; fewer workers then. 0 sets no bound."""


@dataclass(frozen=True, kw_only=True)
class DataView:
    """Look at prepared data."""

    folder: Path
    """Folder made by `sota prepare`, or one with nanoGPT, Megatron or datatrove token files."""
    show: int = 2
    """Documents of each side to show."""
    list_split: str = ""
    """train or val: list its documents instead, one line of JSON each; tokens are without the
    end-of-text."""
    window: str = ""
    """train:INDEX or val:INDEX:SEQ_LEN: show that training window as text instead."""
    leakage: bool = False
    """Also count how much of validation's text stands in training; reads everything."""
    html: Path | None = None
    """Write a page to look at instead."""
    export_bin: Path | None = None
    """Write nanoGPT's train.bin and val.bin into this folder instead."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about a run, or one that compares several."""

    runs: tuple[Path, ...]
    """Folders of runs."""
    out: Path | None = None
    """File to write; without it report.html in the run's folder, or comparison.html here."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts."""

    run: Path
    """Folder of a run or of a Hugging Face model of this family."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; without any, the model begins a document."""
    file: Path | None = None
    """One prompt a line, or .jsonl with a field `prompt`; - is one prompt, standard input."""
    max_tokens: int = 200
    """Most tokens to add."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 draws from all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw only tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred already less likely."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    seed: int = 0
    """The same seed gives the same text; prompt i of several draws from seed + i."""
    json: bool = False
    """One JSON object for each prompt."""
    logprobs: int = -1
    """With --json: log-probabilities of each token and of this many alternatives; -1 for none."""
    step: int | None = None
    """Checkpoint to use; without it, the newest that verifies."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 writes what an export of the run writes; bfloat16 is faster, and differs a little."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """How good is it: perplexity and bits per byte with an error bar, LAMBADA, HellaSwag."""

    run: Path
    """Folder of a run or of a Hugging Face model of this family."""
    text: tuple[Path, ...] = ()
    """Files or folders to judge on, - is standard input; a text file is one text, JSON lines and
    tables are read as `sota prepare` reads them. Without any, the validation split."""
    against: Path | None = None
    """Another run or model, judged on the same text: the difference, with a paired error."""
    step: int | None = None
    """Checkpoint to judge; without it, the newest that verifies."""
    tokens: int = 0
    """Most tokens to read; 0 reads all."""
    context: int = 0
    """Tokens in a window over a text; 0 is the model's context."""
    stride: int = 0
    """Tokens between two windows over a text; 0 is `context`, so that they do not overlap."""
    lambada: Path | None = None
    """JSON lines with `text`, or `standard` for the original spelling; `hub` fetches both."""
    hellaswag: Path | None = None
    """JSON lines with ctx, endings and label (or the hub's fields); `hub` fetches them."""
    tasks: str = ""
    """Tasks for EleutherAI's lm-eval, with commas; needs the extra [lm-eval]."""
    limit: int = 0
    """Most examples of each benchmark; 0 takes all."""
    json: bool = False
    """Print one JSON object and nothing else."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model in a format that other programs load."""

    run: Path
    """Folder of a run or of a Hugging Face model of this family."""
    out: Path = Path()
    """Folder to write; what is there already must be an empty folder."""
    format: Literal["hf", "gguf", "mlx"] = "hf"
    """hf and mlx: safetensors for transformers, vLLM, mlx-lm; gguf: llama.cpp and Ollama."""
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"
    """Type of the matrices; q8_0 for gguf only."""
    step: int | None = None
    """Checkpoint to export; without it, the newest that verifies."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run, at step 0, of a Hugging Face Llama or Qwen3 folder of this family."""

    model: Path
    """Folder with config.json and safetensors, or of another run: its newest checkpoint."""
    out: Path = Path()
    """Folder of the new run; what is there already must be an empty folder."""
    data: Path | None = None
    """Folder made by `sota prepare`, to train on."""
    steps: int = 1000
    """Steps of that training."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """An OpenAI-compatible server with a page to try the model."""

    run: Path
    """Folder of a run or of a Hugging Face model of this family."""
    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs --api-key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str = ""
    """Key that requests must carry; also read from SOTA_API_KEY."""
    rows: int = 8
    """Continuations computed together; 16 more wait, others are told to come back."""
    step: int | None = None
    """Checkpoint to serve; without it, the newest that verifies."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 writes what an export of the run writes; bfloat16 is faster, and differs a little."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine before it is trusted."""

    device: Device = "auto"
    """Device to check."""
    folder: Path = Path()
    """Where runs would live; its disk is checked."""
