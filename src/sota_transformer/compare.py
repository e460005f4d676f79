"""`sota report RUN RUN...`: compares runs side by side, as text and as one HTML file.

Reading order: `write_comparison` reads the runs and assembles the parts; `_figures` is a column of
the table, `_mismatches` says why losses are not comparable, `_charts` draws, and `_settings` groups
runs that differ only in their seed. Everything comes from the runs' folders.
"""

import bisect
import itertools
import math
import os
import shutil
import statistics
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from sota_transformer.config import HABITS, RunConfig
from sota_transformer.data.page import document, save, section, table
from sota_transformer.errors import SotaError
from sota_transformer.options import Report
from sota_transformer.report import (
    START,
    Curve,
    Points,
    chart,
    column,
    is_number,
    logged,
    padding_of,
    read_record,
    shown,
    starts_of,
    validations,
    write_report,
)
from sota_transformer.schedules import step_tokens
from sota_transformer.training.runlog import read_config
from sota_transformer.words import perplexity, printable

# Okabe and Ito's color-blind-safe palette; with five dash patterns, thirty distinct styles.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("none", "8 4", "2 3", "12 3 2 3", "5 2")
_IRRELEVANT = HABITS | {"run.seed"}  # fields in which runs of one setting may differ
_COLUMNS = ("runs", "seeds", "step", "nats", "spread", "difference", "+- seeds", "+- text")
_LEGEND = (
    "+- after a loss is its standard error over the validation windows. Comparable runs were "
    "evaluated on the same windows, so their errors are shared and say little about the difference "
    "between them. '+- text' is the sum of both errors, an upper bound on the error of the "
    "difference; `sota evaluate RUN --against RUN` measures that error window by window.",
    "Runs that differ only in their seed share a line with their mean. 'spread' is the standard "
    "deviation over seeds, a rough estimate from two or three; 'difference' is relative to the "
    "first line, and '+- seeds' is its standard error, which needs two seeds of both.",
)

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class _Run:
    name: str
    config: RunConfig
    record: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.metrics[-1]["step"]

    @property
    def complete(self) -> bool:
        """Whether its schedule has finished."""
        return self.step >= self.config.train.steps

    @cached_property
    def validated(self) -> list[dict[str, Any]]:
        """Every validation since the data last changed."""
        since = [-math.inf]
        for start in starts_of(self.record):
            at, changed = start.get("from_step"), shown(start.get("changed"))
            if isinstance(at, int):
                since = [step for step in since if step < at]  # later ones are on a dropped branch
                since += [at] * ("data fingerprint" in changed)
        return [line for line in validations(self.metrics) if line["step"] > since[-1]]

    @cached_property
    def alike(self) -> dict[int, dict[str, Any]]:
        """By step, the validations that read as many tokens as the last one."""
        tokens = self.validated[-1].get("val_tokens") if self.validated else None
        return {line["step"]: line for line in self.validated if line.get("val_tokens") == tokens}

    @cached_property
    def measure(self) -> dict[str, str]:
        """What runs must have in common for their losses to be comparable; empty if unknown."""
        data = self.record.get("data")
        last = self.validated[-1] if self.validated else {}
        return {
            # Older records append the kind of windows to the 64 digits.
            "data (text, split or tokenizer)": data[:64] if isinstance(data, str) else "",
            "tokens per window (--model.seq-len)": str(self.config.model.seq_len),
            "validation tokens": shown(last.get("val_tokens", "")),
            "attention within documents only": "yes" if self.config.data.document_mask else "no",
        }

    @cached_property
    def setting(self) -> Hashable:
        """Everything that determines a loss except the seed, and whether the run is complete."""
        relevant = [v for field, v in self.config.fields().items() if field not in _IRRELEVANT]
        return (*relevant, *self.measure.values(), *_changes(self), self.complete)

    @cached_property
    def _known(self) -> Points:
        return [(0, 0.0), *column(self.metrics, "tokens")]

    def tokens(self, step: float) -> float:
        """Tokens trained on up to `step`, interpolated linearly between logged steps."""
        step = max(0, step)  # a damaged log may hold any value
        after = bisect.bisect_right(self._known, step, key=lambda point: point[0])
        at, tokens = self._known[after - 1]
        if after < len(self._known):
            later, more = self._known[after]
            return tokens + (step - at) / (later - at) * (more - tokens)
        return tokens + (step - at) * step_tokens(self.config, padding_of(self.record))


def run_report(options: Report) -> int:
    """Write the page of one run, or a comparison of several."""
    if not options.runs:
        raise SotaError("report needs at least one RUN: a folder made by `sota train`")
    if len(options.runs) == 1:
        out = write_report(options.runs[0], options.out or options.runs[0] / "report.html")
    else:
        out = options.out or Path("comparison.html")
        print(write_comparison(options.runs, out))
    print(f"wrote {out}")
    return 0


def write_comparison(folders: Sequence[Path], out: Path) -> str:
    """Write the page of two or more runs; returns its contents, without the charts, as text.

    SotaError 2 for a run given twice, 65 or 66 if one is no run, 73 if `out` cannot be written.
    """
    real = [Path(os.path.realpath(folder)) for folder in folders]
    for folder, path in zip(folders, real, strict=True):
        if real.count(path) > 1:
            raise SotaError(f"{folder} is given twice; give different runs to compare")
    runs = [
        _Run(name, read_config(folder), read_record(folder), logged(folder))
        for name, folder in zip(_names(real), folders, strict=True)
    ]
    rows: Rows = [("", *(run.name for run in runs)), *_transposed(map(_figures, runs))]
    rows += [row for row in _transposed(map(_details, runs)) if len(set(row[1:])) > 1]
    settings = _settings(runs)
    compared: Rows = [setting.row(settings[0]) for setting in settings]
    mismatches, notes = list(_mismatches(runs)), [*_notes(runs), *(_LEGEND if compared else ())]
    body = [f"<h1>{len(runs)} runs</h1>", *(f"<p><b>{escape(line)}</b></p>" for line in mismatches)]
    body += [table(rows[0], rows[1:]), *_charts(runs, settings)]
    body.append(section("Last validation", _COLUMNS, compared))
    body += [f"<p>{escape(line)}</p>" for line in notes]
    save(out, document(f"Runs: {', '.join(rows[0][1:])}", body), "--out")
    tables = [_text(rows), _text([_COLUMNS, *compared])] if compared else [_text(rows)]
    return "\n\n".join([*tables, *map(printable, (*mismatches, *notes))])


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many parent folders as make it unique."""
    names = list[str]()
    for folder in folders:
        ends = (folder.parts[-count:] for count in range(1, len(folder.parts)))
        alone = (e for e in ends if sum(other.parts[-len(e) :] == e for other in folders) == 1)
        names.append(str(Path(*next(alone, folder.parts))))
    return names


def _transposed(columns: Iterable[dict[str, str]]) -> Rows:
    """A row for each name in any of the columns."""
    columns = list(columns)
    names = dict.fromkeys(name for values in columns for name in values)
    return [(name, *(values.get(name, "-") for values in columns)) for name in names]


def _figures(run: _Run) -> dict[str, str]:
    """The main figures."""
    numbers = [line for line in run.alike.values() if math.isfinite(line["val_loss"])]
    best = min(numbers, key=lambda line: line["val_loss"], default={})
    rates = [value for _, value in column(run.metrics, "tokens_per_second")]
    memory = [value for _, value in column(run.metrics, "memory")]
    return {
        "parameters": f"{run.config.model.parameter_count:,}",
        "steps": f"{run.step:,} of {run.config.train.steps:,}",
        "tokens trained on": f"{run.tokens(run.step):,.0f}",
        **_validation("last", run.validated[-1] if run.validated else {}),
        **_validation("best", best),
        "tokens/s, median": f"{statistics.median(rates):,.0f}" if rates else "-",
        "peak memory": f"{max(memory) / 1e9:.2f} GB" if memory else "-",
    }


def _validation(kind: str, line: dict[str, Any]) -> dict[str, str]:
    """The figures of a validation, or dashes if there is none."""
    names = ("validation, nats", "perplexity", "bits/byte", "at step")
    if not line:
        return {f"{kind} {name}": "-" for name in names}
    error = line.get("val_error")  # a single window has none
    cells = (
        f"{line['val_loss']:.4f}" + (f" +- {error:.4f}" if is_number(error) else ""),
        perplexity(line.get("val_perplexity")),
        f"{line['val_bits_per_byte']:.4f}",
        f"{line['step']:,}",
    )
    return {f"{kind} {name}": cell for name, cell in zip(names, cells, strict=True)}


def _details(run: _Run) -> dict[str, str]:
    """Every option by its command-line name, and the machine of the last start."""
    yes = {True: "yes", False: "no"}
    found = {
        f"--{field.replace('_', '-')}": yes[value] if isinstance(value, bool) else str(value)
        for field, value in run.config.fields().items()
        if field != "run.out"
    }
    starts = starts_of(run.record)
    machine = starts[-1].get("machine") if starts else None
    parts = machine.items() if isinstance(machine, dict) else ()
    return found | {f"machine: {name}": shown(value) for name, value in parts}


def _mismatches(runs: Sequence[_Run]) -> Iterator[str]:
    """Why their losses are not comparable."""
    for what in runs[0].measure:
        having = dict[str, list[str]]()
        for run in runs:
            if run.validated:
                having.setdefault(run.measure[what], []).append(run.name)
        if len(having) > 1 or "" in having:
            each = (f"{value[:12] or 'unknown'} ({', '.join(of)})" for value, of in having.items())
            yield f"NOT COMPARABLE in validation: {what}: {'; '.join(each)}"


def _changes(run: _Run) -> list[str]:
    """What was changed during training, by start."""
    starts = ((start.get("from_step"), start.get("changed")) for start in starts_of(run.record))
    # A change before the first step does not affect training.
    return [
        f"at step {shown(step)}: {shown(changed)}" for step, changed in starts if changed and step
    ]


def _notes(runs: Sequence[_Run]) -> Iterator[str]:
    """What each run's figures do not show."""
    for run in runs:
        if not run.complete:
            yield f"{run.name} is not complete: its schedule has not finished."
        if not run.validated:
            yield f"{run.name} has no validation yet."
        if changes := _changes(run):
            yield f"{run.name} was changed during training, {'; '.join(changes)}"
    for members in _grouped(runs):
        for repeat in members:
            first = next(run for run in members if run.config.run.seed == repeat.config.run.seed)
            if first is not repeat:
                yield f"{repeat.name} repeats {first.name} with the same seed: only one counts."


def _grouped(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Runs that have a validation, grouped with those that differ only in the seed."""
    groups = dict[Hashable, list[_Run]]()
    for run in runs:
        if run.validated:
            unknown = run.name if "" in run.measure.values() else None
            groups.setdefault((run.setting, unknown), []).append(run)
    return list(groups.values())


@dataclass(frozen=True)
class _Setting:
    """Runs that differ only in their seed, at the last step where all were validated."""

    runs: list[_Run]
    step: int

    def of(self, name: str) -> list[Any]:
        """A figure of that validation for each run."""
        return [run.alike[self.step].get(name) for run in self.runs]

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, nats."""
        losses = self.of("val_loss")
        return statistics.stdev(losses) if len(losses) > 1 and all(map(is_number, losses)) else None

    def row(self, first: "_Setting") -> tuple[str, ...]:
        """Its row of the table, compared with the first setting."""
        mean, spread = statistics.fmean(self.of("val_loss")), self.spread
        cells = (
            ", ".join(run.name for run in self.runs),
            ", ".join(str(run.config.run.seed) for run in self.runs),
            f"{self.step:,}",
            f"{mean:.4f}",
            "-" if spread is None else f"{spread:.4f}",
        )
        if self is first:
            return (*cells, "-", "-", "-")
        one, other = self.runs[0], first.runs[0]
        same_tokens = one.tokens(self.step) == other.tokens(first.step)
        if one.measure != other.measure or "" in one.measure.values():
            return (*cells, "not comparable", "-", "-")
        if not same_tokens and not (one.complete and other.complete):
            return (*cells, "not complete", "-", "-")
        seeds = text = "-"
        if spread is not None and first.spread is not None:
            parts = (spread**2 / len(self.runs), first.spread**2 / len(first.runs))
            seeds = f"{math.sqrt(sum(parts)):.4f}"
        errors = (self.of("val_error"), first.of("val_error"))
        if all(map(is_number, (*errors[0], *errors[1]))):
            text = f"<= {sum(map(statistics.fmean, errors)):.4f}"
        return (*cells, f"{mean - statistics.fmean(first.of('val_loss')):+.4f}", seeds, text)


def _settings(runs: Sequence[_Run]) -> list[_Setting]:
    found = list[_Setting]()
    for members in _grouped(runs):
        seeds = {run.config.run.seed: run for run in reversed(members)}  # first run of each seed
        distinct = [run for run in members if seeds[run.config.run.seed] is run]
        steps = set[int].intersection(*(set(run.alike) for run in distinct))
        if steps:
            found.append(_Setting(distinct, max(steps)))
        else:
            found += [_Setting([run], max(run.alike)) for run in distinct]
    return found


def _charts(runs: Sequence[_Run], settings: Sequence[_Setting]) -> Iterator[str]:
    """The losses of all runs over tokens, so that runs with different batch sizes compare."""

    def points(run: _Run, name: str) -> Points:
        start = run.config.train.steps * START
        return [(run.tokens(at), y) for at, y in column(run.metrics, name) if at >= start]

    bands = list[Points]()
    for group in (setting.runs for setting in settings if len(setting.runs) > 1):
        losses = [dict(points(run, "val_loss")) for run in group]
        common = sorted(set[float].intersection(*map(set, losses)))
        if len(common) > 1:
            low = [(x, min(of[x] for of in losses)) for x in common]
            bands.append([*low, *((x, max(of[x] for of in losses)) for x in reversed(common))])

    def curves(name: str, dots: bool) -> list[Curve]:
        styles = zip(itertools.cycle(_COLORS), itertools.cycle(_DASHES), runs)
        return [Curve(points(run, name), c, d, dots=dots, name=run.name) for c, d, run in styles]

    shaded = "; shaded: range over seeds" if bands else ""
    title = f"Validation loss in nats, without smoothing, by tokens trained on{shaded}"
    yield chart(title, curves("val_loss", dots=True), "tokens", bands)
    title = "Training loss in nats, without smoothing, by tokens trained on"
    yield chart(title, curves("loss", dots=False), "tokens")


def _text(rows: Rows) -> str:
    """Aligned columns, as many side by side as fit the terminal."""
    width = shutil.get_terminal_size().columns
    rows = [tuple(map(printable, row)) for row in rows]
    sizes = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    blocks, begin = list[str](), 1
    while begin < len(sizes):
        end = begin + 1
        while end < len(sizes) and sizes[0] + sum(2 + n for n in sizes[begin : end + 1]) <= width:
            end += 1
        lines = (
            row[0].ljust(sizes[0]) + "".join(f"  {row[i]:>{sizes[i]}}" for i in range(begin, end))
            for row in rows
        )
        blocks.append("\n".join(lines))
        begin = end
    return "\n\n".join(blocks)
