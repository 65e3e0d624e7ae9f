"""Choose what the report's charts show: metrics, AUROC by position, and each source's part.

In the report of one run, a colour is a mode or a kind of figure. In the report of several, a colour
is a run and the dashes distinguish the curves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_mode.report.registry import BLOCKED, CHARTS, LM_LOSS, METRICS, NATS, Chart
from megatron_mode.report.run_folder import RunFolder, number
from megatron_mode.report.svg import (
    Axis,
    Dash,
    Entry,
    Figure,
    Line,
    Point,
    percent,
    short_number,
    stretches,
    thin,
)

Runs = Sequence[RunFolder]
Axes = tuple[Axis, Axis]

WINDOWS = 24  # realised shares are counts: a window of a run holds enough rows to be a share
COLOURS = 6
DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted")
TOKENS = Axis("tokens seen", short_number, low=0)
_MOST_MARKERS = 40
_ENTROPY = "unigram entropy"


def charts(runs: Runs) -> list[Figure]:
    """Return the charts that any run has values for, in order; by source only of one run."""
    found = [
        _figure(chart.title, _metric_lines(runs, chart), (TOKENS, chart.y_axis), runs)
        for chart in CHARTS
    ]
    found.append(_position_chart(runs))
    if len(runs) == 1:
        found += _source_charts(runs[0])
    return [figure for figure in found if figure.lines]


def _metric_lines(runs: Runs, chart: Chart) -> list[Line]:
    """Return the curves of a chart; blocking that blocks nothing has none."""
    metrics = [metric for metric in METRICS.values() if metric.chart is chart]
    lines = []
    for index, run in enumerate(runs):
        for place, metric in enumerate(metrics):
            if points := run.curve(metric.key):
                line = replace(
                    thin(points),
                    label=metric.label,
                    colour=metric.colour,
                    dash=metric.dash,
                    markers=metric.is_held_out and len(points) <= _MOST_MARKERS,
                )
                lines.append(line if len(runs) == 1 else _overlaid(line, index, place))
    if chart is BLOCKED:
        return [line for line in lines if any(value for _, value in line.points)]
    return [*lines, *_entropy_lines(runs)] if chart is LM_LOSS else lines


def _overlaid(line: Line, index: int, place: int) -> Line:
    """Return a curve in its run's colour, dashed by its place in the chart, without a band."""
    dash = DASHES[place % len(DASHES)]
    return replace(line, colour=index % COLOURS, dash=dash, band=())


def _entropy_lines(runs: Runs) -> list[Line]:
    """Return one level line for each different unigram entropy among the runs."""
    entropies = {number(run.summary.get("unigram_entropy")) for run in runs}
    end = float(max(1, *(run.tokens_seen for run in runs)))
    levels = sorted(value for value in entropies if value is not None)
    return [Line(_ENTROPY, [(0.0, y), (end, y)], 5, "dashed") for y in levels]


def _position_chart(runs: Runs) -> Figure:
    lines = []
    for index, run in enumerate(runs):
        by_rendering = run.summary.get("auroc_by_position") or {}
        for place, (rendering, values) in enumerate(by_rendering.items()):
            numbers = [(float(position), number(value)) for position, value in values.items()]
            points = sorted((math.log2(at), y) for at, y in numbers if at > 0 and y is not None)
            dash = DASHES[place % len(DASHES)]
            line = Line(f"held out, {rendering}", points, 3 + place, dash, markers=True)
            if points:
                lines.append(line if len(runs) == 1 else _overlaid(line, index, place))
    first_token = "first token of the range (0 is the document's start)"
    x_axis = Axis(first_token, lambda exponent: short_number(2**exponent))
    axes = (x_axis, Axis("AUROC", short_number, high=1))
    return _figure("Mode AUROC by position in document", lines, axes, runs)


def _source_charts(run: RunFolder) -> list[Figure]:
    share, nats = Axis("share", percent, 0), Axis(NATS, short_number)
    names = _sources(run, "rows_by_source")
    shares = [line for place, name in enumerate(names) for line in _shares(run, name, place)]
    # A training source keeps its colour from chart to chart.
    trained = _losses(run, "lm_loss_by_source", names)
    held_out = _losses(run, "valid_lm_loss_by_source", _sources(run, "valid_lm_loss_by_source"))
    return [
        one_run_figure("Share of rows by source", shares, (TOKENS, share)),
        one_run_figure("Training LM loss by source", trained, (TOKENS, nats)),
        one_run_figure("Held-out LM loss by source", held_out, (TOKENS, nats)),
    ]


def _sources(run: RunFolder, key: str) -> list[str]:
    return [
        column.removeprefix(f"{key}/") for column in run.columns if column.startswith(f"{key}/")
    ]


def _shares(run: RunFolder, name: str, place: int) -> Iterator[Line]:
    """Yield the share that was taken, and the plan as a line that the legend leaves out."""
    colour, dash = _style(place)
    if taken := in_windows(run, f"rows_by_source/{name}"):
        yield Line(name, taken, colour, dash, markers=True)
    if planned := in_windows(run, f"planned_rows_by_source/{name}"):
        yield Line("", planned, colour, "dotted")


def in_windows(run: RunFolder, key: str) -> list[Point]:
    """Return the share of rows in each of at most WINDOWS stretches of the run."""
    totals: Counter[float] = Counter()
    for name in _sources(run, "rows_by_source"):
        totals.update(dict(run.curve(f"rows_by_source/{name}")))
    found = []
    for part in stretches(run.curve(key), WINDOWS):
        if rows := sum(totals[at] for at, _ in part):
            middle = sum(at for at, _ in part) / len(part)
            found.append((middle, sum(value for _, value in part) / rows))
    return found


def _losses(run: RunFolder, key: str, names: Sequence[str]) -> list[Line]:
    lines = []
    for place, name in enumerate(names):
        if points := thin(run.curve(f"{key}/{name}")).points:
            lines.append(Line(name, points, *_style(place), markers=len(points) <= WINDOWS))
    return lines


def _style(place: int) -> tuple[int, Dash]:
    """Return colour and dash; dotted is left to plans."""
    return place % COLOURS, DASHES[place // COLOURS % 2]


def _figure(title: str, lines: Sequence[Line], axes: Axes, runs: Runs) -> Figure:
    if len(runs) == 1:
        return one_run_figure(title, lines, axes)
    legend = [Entry("", run.name, f"c{index % COLOURS}") for index, run in enumerate(runs)]
    kinds = {line.label: line for line in reversed(lines)}
    if len(kinds) > 1:
        for label, line in reversed(kinds.items()):
            colour = "c5" if label == _ENTROPY else "ck"
            legend.append(Entry(label, "", colour, line.dash, line.markers))
    return Figure(title, lines, *axes, legend)


def one_run_figure(title: str, lines: Sequence[Line], axes: Axes) -> Figure:
    """Return a figure whose legend has one entry for each named curve, with its last value."""
    legend = []
    for line in lines:
        if line.label:
            last = axes[1].text(float(f"{line.points[-1][1]:.4g}"))
            legend.append(Entry(line.label, last, f"c{line.colour}", line.dash, line.markers))
    return Figure(title, lines, *axes, legend)
