"""Every option of a training run, as frozen dataclasses; no torch or numpy.

RunConfig has five sections: Model (the network), Data (what it reads), Optim (how it learns), Train
(how long, how often) and Run (where and on what). A field's docstring is its command-line help.
`problems()` lists everything wrong with a section, and RunConfig cannot be constructed while any
section has a problem. The options of the other commands are in `options.py`.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sota_transformer.errors import OptionError
from sota_transformer.shapes import misfit

GPT2_VOCAB = 50_257
VOCAB = GPT2_VOCAB + 1  # with <|pad|>
MOST_VOCAB = 50_304  # padded to a multiple of 64; more rows would have no token and break exports
STEP_DIGITS = 8  # of a checkpoint's name
_MOST_THREADS = 1024  # OpenMP aborts the process if it cannot start this many

Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network: a Llama (a Qwen3 with qk_norm), tied embeddings, no biases."""

    layers: int
    """Transformer blocks, each attention and SwiGLU."""
    d_model: int
    """Width of the residual stream."""
    heads: int
    """Attention heads; d_model / heads is the head dimension."""
    kv_heads: int
    """Key and value heads; fewer than heads means grouped-query attention."""
    d_ff: int
    """Hidden width of the SwiGLU."""
    seq_len: int
    """Tokens per training window, and the model's maximum context."""
    vocab_size: int = VOCAB
    """Rows of the embedding: the GPT-2 vocabulary and a pad token."""
    rope_base: float = 10_000.0
    """Base of the RoPE frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, as in Qwen3."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.heads

    @property
    def parameter_count(self) -> int:
        """Trainable parameters; the tied embedding counts once."""
        attention = self.d_model * self.head_dim * 2 * (self.heads + self.kv_heads)
        norms = (2 * self.layers + 1) * self.d_model
        norms += 2 * self.layers * self.head_dim if self.qk_norm else 0
        blocks = self.layers * (attention + 3 * self.d_model * self.d_ff)
        return self.vocab_size * self.d_model + blocks + norms

    def problems(self) -> list[str]:
        """Everything wrong with this section."""
        sizes = ("layers", "d_model", "heads", "kv_heads", "d_ff", "vocab_size")
        found = at_least(self, 1, *sizes) + at_least(self, 8, "seq_len")
        found += _positive(self, "rope_base", "norm_eps")
        if self.vocab_size > MOST_VOCAB:
            found.append(f"model.vocab_size {self.vocab_size} must be at most {MOST_VOCAB}")
        if not found and self.d_model % (2 * self.heads):
            found.append(f"model.d_model {self.d_model} must be heads x an even head dimension")
        if not found and self.heads % self.kv_heads:
            found.append(f"model.kv_heads {self.kv_heads} must divide model.heads {self.heads}")
        return found


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the run reads."""

    path: Path = Path()
    """Folder made by `sota prepare`."""
    windows: Literal["stream", "best-fit"] = "stream"
    """Windows cut evenly from the token stream, or documents kept whole at the cost of padding."""
    document_mask: bool = False
    """Tokens attend only within their own document, not to earlier ones in the window."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW or NorMuon, the schedule, and regularization."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    matrix_rate: float = 0.0
    """Peak learning rate of NorMuon on the blocks' matrices; 0 leaves them to AdamW."""
    cooldown: float = 0.0
    """Final fraction of the run with linear learning-rate decay; 0 uses a cosine schedule."""
    final_fraction: float = 0.1
    """Final learning rate as a fraction of the peak."""
    warmup_steps: int = 4000
    """Steps of linear warm-up; at most 5% of the run."""
    beta1: float = 0.9
    """AdamW's decay rate for the mean gradient."""
    beta2: float = 0.98
    """AdamW's decay rate for the mean squared gradient."""
    eps: float = 1e-8
    """AdamW's epsilon, which prevents division by zero."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; with NorMuon, of the blocks' matrices only."""
    clip_norm: float = 1.0
    """Maximum gradient norm; 0 turns clipping off."""
    label_smoothing: float = 0.1
    """Share of the target spread over the vocabulary; part of the objective, never reported."""
    dropout_start: float = 0.1
    """Dropout rate at the first step."""
    dropout_end: float = 0.0
    """Dropout rate at the last step; linear in between."""

    @property
    def drops_out(self) -> bool:
        """Whether any step uses dropout."""
        return max(self.dropout_start, self.dropout_end) > 0

    def problems(self) -> list[str]:
        """Everything wrong with this section."""
        shares = ("beta1", "beta2", "label_smoothing", "dropout_start", "dropout_end")
        counts = ("warmup_steps", "weight_decay", "clip_norm", "matrix_rate")
        found = _positive(self, "learning_rate", "eps")
        found += at_least(self, 0, *counts)
        found += _unless(lambda x: 0 <= x < 1, "in [0, 1)", self, *shares)
        whole = ("final_fraction", "cooldown")
        return found + _unless(lambda x: 0 <= x <= 1, "in [0, 1]", self, *whole)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Length, batch size, and how often to log, validate, sample and save."""

    steps: int
    """Total optimizer steps."""
    batch_rows: int
    """Windows per optimizer step, over all ranks and micro-batches."""
    micro_rows: int = 0
    """Windows per forward pass on one device; must divide its rows. 0 picks one by device."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a quarter slower."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 250
    """Steps between validations; 0 validates only at the end."""
    eval_tokens: int = 65_536
    """Validation tokens to read each time; the whole split if it is smaller."""
    sample_every: int = 250
    """Steps between generated samples; 0 samples only at the end."""
    save_every_minutes: float = 5.0
    """Minutes between checkpoints; 0 disables saving by time."""
    save_every_steps: int = 0
    """Steps between checkpoints, in addition to saving by time; 0 disables it."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, besides the one with the lowest validation loss."""

    @property
    def most_checkpoints(self) -> int:
        """The most checkpoints at a time: also the best one, and one being written."""
        return self.keep_checkpoints + 2

    def problems(self) -> list[str]:
        """Everything wrong with this section."""
        counts = ("micro_rows", "eval_every", "sample_every", "save_every_steps")
        found = at_least(self, 1, "steps", "batch_rows", "log_every", "eval_tokens")
        found += at_least(self, 2, "keep_checkpoints")
        if self.steps >= 10**STEP_DIGITS:
            found.append(f"train.steps {self.steps} must be below {10**STEP_DIGITS:,}")
        return found + at_least(self, 0, *counts, "save_every_minutes")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where the run is stored and what it runs on."""

    out: Path = Path()
    """Run folder; by default runs/ and the names of the preset and the data."""
    seed: int = 1337
    """Seed of the initial weights, the data order and dropout."""
    resume: str = "auto"
    """auto (resume if a checkpoint exists), latest (require one), never, or step:N."""
    exact: bool = False
    """Refuse to resume if the result might not be bit-identical to an uninterrupted run."""
    override: str = ""
    """Comma-separated fields that may change on resume; --override FIELD=VALUE also sets one."""
    data_change: Literal["refuse", "continue", "restart-epoch"] = "refuse"
    """If the data changed: refuse, continue at the same position, or start a new epoch."""
    device: Device = "auto"
    """Device to run on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the activations; weights and optimizer state stay float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to use torch.compile."""
    threads: int = 0
    """CPU threads; 0 uses torch's default."""

    def problems(self) -> list[str]:
        """Everything wrong with this section."""
        found = at_least(self, 0, "seed", "threads")
        if self.threads > _MOST_THREADS:
            found.append(f"run.threads {self.threads} must be at most {_MOST_THREADS}")
        word, _, step = self.resume.partition(":")
        number = word == "step" and step.isdecimal() and len(step) <= STEP_DIGITS
        if self.resume not in ("auto", "latest", "never") and not number:
            found.append(f"run.resume {self.resume!r} must be auto, latest, never or step:N")
        return found


# Where a run is stored and how often it logs, evaluates and saves: training is unaffected.
HABITS = {
    "data.path", "run.out", "train.log_every", "train.eval_every", "train.eval_tokens",
    "train.sample_every", "train.save_every_minutes", "train.save_every_steps",
    "train.keep_checkpoints",
}  # fmt: skip
# On what and how a step is computed: the result changes by rounding only.
EXECUTION = {
    "train.micro_rows", "train.gradient_checkpointing", "run.device", "run.dtype", "run.compile",
    "run.threads",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a training run."""

    model: Model
    data: Data
    optim: Optim
    train: Train
    run: Run

    def __post_init__(self) -> None:
        checked = (self.model, self.optim, self.train, self.run)  # Data has nothing to check
        found = [line for section in checked for line in section.problems()]
        found += [
            f"{name} must be below 2**63"
            for name, value in self.fields().items()
            if isinstance(value, int | float) and value >= 2**63
        ]
        if found:
            raise OptionError("; ".join(found))

    @property
    def state_bytes(self) -> int:
        """Bytes of weights and moments in float32, which is what a checkpoint holds.

        AdamW keeps two moments; NorMuon, if it has the blocks' matrices, keeps one.
        """
        parameters = self.model.parameter_count
        in_blocks = parameters - self.model.vocab_size * self.model.d_model
        return 12 * parameters - (4 * in_blocks if self.optim.matrix_rate else 0)

    def fields(self) -> dict[str, Any]:
        """Every value by its section and name, such as `train.steps`."""
        return {
            f"{section}.{name}": value
            for section in _SECTIONS
            for name, value in vars(getattr(self, section)).items()
        }

    def to_json(self) -> str:
        """All fields, resolved, as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Parse what `to_json` wrote. ValueError for anything else, including unknown fields.

        A field with a default may be missing: the run may be older than the field.
        """
        value = json.loads(text)
        if not isinstance(value, dict) or set(value) != set(_SECTIONS):
            raise ValueError(f"needs exactly the sections {', '.join(_SECTIONS)}")
        return cls(**{name: _section(kind, value[name]) for name, kind in _SECTIONS.items()})


_SECTIONS = {"model": Model, "data": Data, "optim": Optim, "train": Train, "run": Run}
_JSON: dict[Any, type] = {int: int, float: float, bool: bool}  # everything else is text


def _section(kind: type, values: Any) -> Any:
    """One section from its JSON object; checks each value against its field's type."""
    section, types = kind.__name__.lower(), {f.name: f.type for f in dataclasses.fields(kind)}
    shape = {
        field.name + "?" * (field.default is not dataclasses.MISSING): _JSON.get(field.type, str)
        for field in dataclasses.fields(kind)
    }
    if wrong := misfit(values, shape, section):
        raise ValueError(wrong)
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{section} has an unknown field {name}")
        choices = get_args(types[name])  # of a Literal
        if choices and value not in choices:
            raise ValueError(f"{section}.{name} {value!r} must be one of {choices}")
    paths = {name: Path(value) for name, value in values.items() if types[name] is Path}
    return kind(**values | paths)


def at_least(section: object, least: int, *names: str) -> list[str]:
    """One line for each named field below `least`."""
    return _unless(lambda x: x >= least, f"at least {least}", section, *names)


def _positive(section: object, *names: str) -> list[str]:
    """One line for each named field that is not above zero."""
    return _unless(lambda x: x > 0, "above 0", section, *names)


def _unless(holds: Callable[[Any], bool], must: str, section: object, *names: str) -> list[str]:
    """One line for each named field for which `holds` is false, as it is for NaN."""
    values, prefix = vars(section), type(section).__name__.lower()
    return [f"{prefix}.{n} {values[n]} must be {must}" for n in names if not holds(values[n])]
