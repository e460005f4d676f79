"""A run's output: metrics.jsonl and samples.txt in its folder, a live panel or plain lines.

Also reads them back, without loading torch.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sota_transformer import durable
from sota_transformer.config import RunConfig
from sota_transformer.errors import BAD_DATA, NO_INPUT, SotaError
from sota_transformer.training.signals import Stopped
from sota_transformer.words import json_line, perplexity

_SAMPLE_LINES = 12


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader of our output (`head`, say) has exited: save and stop as on any signal."""
        with suppress(SystemExit):
            super().on_broken_pipe()  # writes nothing from here on
        raise Stopped(signal.SIGPIPE)


class RunLog:
    """The output of one run; `silent` on every rank but the first."""

    def __init__(self, folder: Path, total_steps: int, silent: bool = False) -> None:
        self.folder, self.total, self.silent = folder, total_steps, silent
        self.console = _Console(quiet=silent, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._bar = Progress(TextColumn("step"), BarColumn(None), MofNCompleteColumn())
        self._task = self._bar.add_task("steps", total=total_steps)
        self._last: dict[str, Any] = {}
        self._sample = ""  # the part of the last one that is shown

    def __enter__(self) -> Self:
        if not self.silent:
            path = self.folder / "metrics.jsonl"
            torn = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
            self._metrics = path.open("a", encoding="utf-8")
            if torn:  # by a killed process; readers skip the half line
                self._metrics.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.end_live()
        if not self.silent:
            with durable.naming(self.folder / "metrics.jsonl"), self._metrics:
                self.sync()

    def sync(self) -> None:
        """Have every line on the disk: a power cut must not take what led to a checkpoint."""
        with durable.naming(self.folder / "metrics.jsonl"):
            durable.fsync(self._metrics.fileno())

    def begin_live(self, step: int) -> None:
        """Show the panel of a run at `step`, if there is a terminal."""
        self._last["step"] = step
        if self.console.is_terminal and not self.silent:
            self._live = Live(self._panel(), console=self.console, refresh_per_second=4)
            self._live.start()

    def end_live(self) -> None:
        """Leave the panel on screen and continue with plain lines."""
        if self._live is not None:
            self._live.update(self._panel())
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(Text(text))

    def step(self, values: dict[str, Any]) -> None:
        """A logged step: loss, lr, tokens_per_second, memory, seconds_left."""
        self._write(values)
        self._last |= values
        if self._live is not None:
            self._live.update(self._panel())
            return
        self.say(
            f"step {values['step']:>6}/{self.total}  loss {values['loss']:.4f}  "
            f"lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"{values['memory'] / 1e9:.2f} GB  {clock(values['seconds_left'])} left"
        )

    def validation(self, values: dict[str, Any]) -> None:
        """A validation: val_loss, val_error, val_perplexity, val_bits_per_byte, val_tokens."""
        self._write(values)
        self._last |= values
        self.say(
            f"step {values['step']:>6}  validation {judgement(values)} over "
            f"{values['val_tokens']:,} tokens"
        )

    def event(self, values: dict[str, Any], text: str) -> None:
        """Any other event, for the log and the user."""
        self._write(values)
        self.say(text)

    def sample(self, step: int, text: str) -> None:
        """A generated sample, for samples.txt (people) and metrics.jsonl (programs)."""
        self._sample = "\n".join(text.splitlines()[:_SAMPLE_LINES])
        if not self.silent:
            path = self.folder / "samples.txt"
            with durable.naming(path), path.open("a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n{text}\n\n")
            self._write({"step": step, "sample": text})
        if self._live is None:
            self.say(f"--- sample at step {step}\n{self._sample}\n---")

    def _write(self, values: dict[str, Any]) -> None:
        if not self.silent:
            with durable.naming(self.folder / "metrics.jsonl"):
                self._metrics.write(json_line({**values, "time": round(time.time(), 3)}) + "\n")
                self._metrics.flush()

    def _panel(self) -> Panel:
        last = self._last
        self._bar.update(self._task, completed=last.get("step", 0))
        rows = Table.grid(padding=(0, 3))
        if "loss" in last:
            rows.add_row(
                "loss", f"{last['loss']:.4f}", "tokens/s", f"{last['tokens_per_second']:,.0f}"
            )
            memory, left = f"{last['memory'] / 1e9:.2f} GB", clock(last["seconds_left"])
            rows.add_row("learning rate", f"{last['lr']:.2e}", "memory", memory)
            rows.add_row("dropout", f"{last['dropout']:.3f}", "time left", left)
        if "val_loss" in last:
            value = f"{last['val_loss']:.4f} (perplexity {perplexity(last['val_perplexity'])})"
            rows.add_row("validation", value, "bits/byte", f"{last['val_bits_per_byte']:.4f}")
        sample = Text(self._sample, style="dim")
        return Panel(Group(self._bar, rows, sample), title=str(self.folder))


def judgement(values: dict[str, Any]) -> str:
    """A validation as text; a single window has no error estimate."""
    error = values.get("val_error")
    shown = f" +- {error:.4f}" if isinstance(error, int | float) else ""
    return (
        f"{values['val_loss']:.4f}{shown} nats, perplexity "
        f"{perplexity(values['val_perplexity'])}, {values['val_bits_per_byte']:.4f} bits/byte"
    )


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


_Lines = dict[tuple[int, str], dict[str, Any]]
"""Lines by step and kind."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl by step, the last of each kind and step; torn lines are skipped.

    So are abandoned branches: a start resumes from what was saved at its step, so earlier lines
    that lie past that step, or were never saved, are not part of the run.
    """
    here: _Lines = {}
    before: tuple[tuple[_Lines, int], ...] = ()  # earlier starts, each up to a step
    saved: dict[int, tuple[tuple[_Lines, int], ...]] = {}  # the starts behind each checkpoint
    for line in _lines(folder):
        step, event = line["step"], line.get("event")
        if event == "saved":
            while saved and next(reversed(saved)) >= step:  # saving has deleted it
                saved.popitem()
            saved[step] = (*before, (here, step))
        elif event == "start":
            before, here = saved.get(step, (*before, (here, step))), {}
        else:
            kind = next((n for n in ("loss", "val_loss", "sample") if n in line), f"event {event}")
            here[step, kind] = line
    found, least = dict(here), None
    for lines, until in reversed(before):
        least = until if least is None else min(least, until)
        found = {key: line for key, line in lines.items() if key[0] <= least} | found
    return [found[key] for key in sorted(found)]


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Every complete line of metrics.jsonl that has a step."""
    path = folder / "metrics.jsonl"
    for line in path.read_text("utf-8", "replace").split("\n") if path.is_file() else ():
        try:
            value = json.loads(line, parse_int=_count)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            yield value


def _count(digits: str) -> int | None:
    """An integer; None for one beyond any step count, which might overflow a float."""
    return int(digits) if len(digits) < 20 else None


def samples_of(metrics: list[dict[str, Any]]) -> dict[int, str]:
    """Samples by step; from the log, since a sample may contain a heading of samples.txt."""
    lines = [line for line in metrics if isinstance(line.get("sample"), str)]
    return {line["step"]: line["sample"].strip() for line in lines}


def judged(folder: Path, step: int) -> tuple[bool, bool]:
    """Whether the log has a validation and a sample of the model after `step` steps."""
    metrics = read_metrics(folder)
    validated = any("val_loss" in line and line["step"] == step for line in metrics)
    return validated, step in samples_of(metrics)


def read_config(run_folder: Path) -> RunConfig:
    """The configuration a run was started with. SotaError 65 or 66."""
    path = run_folder / "config.json"
    try:
        return RunConfig.from_json(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is not a run (no config.json)" if run_folder.exists() else "does not exist"
        model = run_folder / "model.gguf" if run_folder.is_dir() else run_folder
        if model.suffix == ".gguf" and model.exists():
            what = "is a GGUF export, which only llama.cpp and Ollama read"
        elif run_folder.is_file():
            what = "is a file, not a run"
        elif (run_folder / "train-00000.npy").exists():
            what = "is prepared data, not a run trained on it"
        raise SotaError(
            f"{run_folder} {what}; give a folder made by `sota train`", NO_INPUT
        ) from error
    except (ValueError, TypeError, RecursionError, OSError) as error:
        if (run_folder / "tokenizer_config.json").exists():
            text = f"{run_folder} is a model, not a run; give a folder made by `sota train`"
            raise SotaError(text, NO_INPUT) from error
        why = getattr(error, "strerror", None) or error
        raise SotaError(f"{path}: {why}", BAD_DATA) from error
