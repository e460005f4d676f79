"""`sota report`: writes one HTML file about a run, using only what is in its folder."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from sota_transformer.config import RunConfig
from sota_transformer.data.page import document, save, section, table
from sota_transformer.errors import BAD_DATA, NO_INPUT, SotaError
from sota_transformer.schedules import describe
from sota_transformer.training.runlog import (
    clock,
    judgement,
    read_config,
    read_metrics,
    samples_of,
)

_WIDTH, _HEIGHT = 860, 240  # of a chart, in pixels
_LEFT, _RIGHT, _BELOW = 80, 44, 24  # its margins, wide enough for labels like 100,000,000
_MOST_POINTS = 600
START = 0.03  # share of the steps to leave out of loss charts; they would flatten the rest

Points = list[tuple[float, float]]


class Curve(NamedTuple):
    """Points of a chart, drawn as a line, as dots, or both."""

    points: Points
    color: str = "#4a7fb5"
    dashes: str = "none"
    """Lengths of dashes and gaps, in pixels."""
    line: bool = True
    dots: bool = False
    name: str = ""
    """In the legend."""

    @property
    def look(self) -> str:
        """The style attribute of its SVG elements."""
        return f'style="color:{self.color};stroke-dasharray:{self.dashes}"'


def write_report(folder: Path, out: Path) -> Path:
    """Write a run's page. SotaError 65 or 66 if it is no run, 73 if `out` cannot be written."""
    config, record, metrics = read_config(folder), read_record(folder), logged(folder)
    done, learned = next(reversed(column(metrics, "tokens")), (0, 0))
    described = describe(config, padding_of(record), int(done), int(learned))
    text = escape(config.to_json())
    body = [
        f"<h1>{escape(str(folder))}</h1>",
        *(f"<p>{escape(line)}</p>" for line in described),
        _summary(config, metrics),
        *_charts(config, metrics),
        _validations(metrics),
        *_starts(record),
        _events(metrics),
        *_samples(metrics),
        f"<details><summary>Configuration</summary><pre>{text}</pre></details>",
    ]
    save(out, document(f"Run: {folder}", body), "--out")
    return out


def read_record(folder: Path) -> dict[str, Any]:
    """run.json, the run's provenance; empty if it is missing. SotaError 65."""
    path = folder / "run.json"
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise SotaError(f"{path}: {error}", BAD_DATA) from error
    return value if isinstance(value, dict) else {}


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. SotaError 66 if there are none."""
    if metrics := read_metrics(folder):
        return metrics
    raise SotaError(f"{folder} has logged nothing yet; there is nothing to report", NO_INPUT)


def padding_of(record: dict[str, Any]) -> float:
    """Share of the targets that is padding, according to run.json."""
    padding = record.get("padding")
    return padding if isinstance(padding, float) and 0 <= padding < 1 else 0.0


def column(metrics: list[dict[str, Any]], name: str) -> Points:
    """(step, value) of every line that has this number."""
    return [(line["step"], float(line[name])) for line in metrics if is_number(line.get(name))]


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _summary(config: RunConfig, metrics: list[dict[str, Any]]) -> str:
    """The main figures."""
    step, steps = metrics[-1]["step"], config.train.steps
    rows = [("steps", f"{step:,} of {steps:,}" + ("" if step >= steps else ": not complete"))]
    if validated := validations(metrics):
        last = validated[-1]
        rows.append((f"validation loss, step {last['step']:,}", judgement(last)))
    if losses := column(metrics, "loss"):
        rows.append(("training loss, last logged", f"{losses[-1][1]:.4f} nats"))
    if rates := [value for _, value in column(metrics, "tokens_per_second")]:
        rows.append(("speed, median", f"{statistics.median(rates):,.0f} tokens/s"))
        seconds = sum(tokens / rate for tokens, rate in _intervals(metrics))
        rows.append(("time in training steps", clock(seconds)))
    if memory := column(metrics, "memory"):
        rows.append(("peak memory", f"{max(value for _, value in memory) / 1e9:.2f} GB"))
    return table(("metric", "value"), rows)


def _intervals(metrics: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """(tokens since the previous line, tokens/s) of each logged step."""
    before = 0.0
    rates = dict(column(metrics, "tokens_per_second"))
    for step, tokens in column(metrics, "tokens"):
        if rates.get(step, 0.0) > 0:
            yield max(0.0, tokens - before), rates[step]
        before = tokens


def validations(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log lines of validations."""
    names = ("val_loss", "val_bits_per_byte")
    numbers = (m for m in metrics if all(isinstance(m.get(name), int | float) for name in names))
    return [m for m in numbers if isinstance(m.get("val_perplexity", ""), int | float | None)]


def _charts(config: RunConfig, metrics: list[dict[str, Any]]) -> Iterator[str]:
    start = config.train.steps * START
    losses = [point for point in column(metrics, "loss") if point[0] >= start]
    validated = [point for point in column(metrics, "val_loss") if point[0] >= start]
    curves = [Curve(losses), Curve(validated, "#c8553d", line=False, dots=True)]
    yield chart("Loss in nats, without smoothing: training blue, validation red", curves)
    yield chart("Learning rate", [Curve(column(metrics, "lr"))])
    yield chart("Gradient norm before clipping", [Curve(column(metrics, "gradient_norm"))])
    yield chart("Tokens per second", [Curve(column(metrics, "tokens_per_second"))])


def chart(
    title: str, curves: Sequence[Curve], unit: str = "step", bands: Sequence[Points] = ()
) -> str:
    """A heading, a legend of the named curves, and an SVG; empty for fewer than two points.

    `unit` is the unit of the x axis. A band is the outline of an area shaded behind the curves.
    """
    curves = [c._replace(points=thinned(c.points)) if c.line else c for c in curves]
    everything = [point for part in (*(c.points for c in curves), *bands) for point in part]
    if len(everything) < 2:
        return ""
    (first, last), (low, high) = ((min(line), max(line)) for line in zip(*everything, strict=True))
    span, length = high - low or abs(high) or 1.0, last - first or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - first) / length * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(8 + (high - y) / span * (_HEIGHT - _BELOW - 16), 1)

    def path(points: Points) -> str:
        return " ".join(f"{x},{y}" for x, y in (at(*point) for point in points))

    parts = [f'<text x="0" y="{_HEIGHT - 6}">{unit}</text>']
    for tick in _ticks(low, high):
        y = at(first, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:,.10g}</text>')
    for tick in _ticks(first, last):
        x = at(tick, low)[0]
        parts.append(f'<text x="{x}" y="{_HEIGHT - 6}" text-anchor="middle">{tick:,.10g}</text>')
    parts += [f'<polygon points="{path(band)}"/>' for band in bands]
    for curve in curves:
        inner = f'<polyline points="{path(curve.points)}"/>' if curve.line else ""
        alone = len(curve.points) == 1  # a line of one point would not show
        for x, y in curve.points if curve.dots or alone else ():
            hint = escape(f"{curve.name} {unit} {x:,.0f}: {y:.4f}".strip())
            across, down = at(x, y)
            inner += f'<circle cx="{across}" cy="{down}" r="3"><title>{hint}</title></circle>'
        parts.append(f"<g {curve.look}>{inner}</g>")
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" aria-label="{escape(title)}"'
    svg = f'<svg role="img" {size}>{"".join(parts)}</svg>'
    return f'<h2>{escape(title)}</h2>{_legend(curves)}<div class="wide">{svg}</div>'


def _legend(curves: Sequence[Curve]) -> str:
    """A sample of each line followed by its name."""
    entries = [
        f'<span><svg width="40" height="10"><g {curve.look}><polyline points="0,5 40,5"/></g>'
        f"</svg> {escape(curve.name)}</span> "
        for curve in curves
        if curve.name and curve.points
    ]
    return f'<p class="legend">{"".join(entries)}</p>' if entries else ""


def thinned(line: Points) -> Points:
    """At most `_MOST_POINTS` points, each the mean of a few neighbors."""
    size = math.ceil(len(line) / _MOST_POINTS) or 1
    groups = (line[begin : begin + size] for begin in range(0, len(line), size))
    return [(group[-1][0], statistics.fmean(y for _, y in group)) for group in groups]


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers from low to high."""
    span = high - low or 1.0
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * size for size in (0.2, 0.5, 1, 2) if span / (unit * size) <= 7)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _validations(metrics: list[dict[str, Any]]) -> str:
    rows = [(f"{line['step']:,}", judgement(line)) for line in validations(metrics)]
    return section("Validation", ("step", "loss without smoothing"), rows)


def starts_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every start of a run, from its run.json."""
    attempts = record.get("attempts")
    return [a for a in attempts if isinstance(a, dict)] if isinstance(attempts, list) else []


def _starts(run: dict[str, Any]) -> Iterator[str]:
    names = ("from_step", "started", "machine", "changed", "command")
    head = ("from step", "started", "machine", "changed since the previous start", "command")
    if starts := starts_of(run):
        rows = [tuple(shown(start.get(name)) for name in names) for start in starts]
        yield section("Starts", head, rows)
        yield f"<p>Data: fingerprint <code>{escape(shown(run.get('data')))}</code></p>"


def shown(value: Any) -> str:
    """A value of run.json as readable text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)


def _events(metrics: list[dict[str, Any]]) -> str:
    rows = [
        (f"{line['step']:,}", str(line["event"]), str(line.get("reason", "")))
        for line in metrics
        if "event" in line
    ]
    return section("Events", ("step", "event", "reason"), rows)


def _samples(metrics: list[dict[str, Any]]) -> Iterator[str]:
    """The last sample, with earlier ones collapsed."""
    samples = list(samples_of(metrics).items())
    if samples:
        yield f"<h2>Sample at step {samples[-1][0]:,}</h2><pre>{escape(samples[-1][1])}</pre>"
    if samples[:-1]:
        earlier = escape("\n\n".join(f"step {at:,}\n{text}" for at, text in samples[:-1]))
        yield f"<details><summary>Earlier samples</summary><pre>{earlier}</pre></details>"
