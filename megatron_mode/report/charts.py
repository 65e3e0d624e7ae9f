"""Draw the report's charts: metrics over tokens, AUROC by position, and each source's part.

In the report of one run, a colour is a mode or a kind of figure. In the report of several, a colour
is a run and the dashes distinguish the curves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from html import escape

from megatron_mode.report.registry import METRICS, Y_AXES, Curve, Metric
from megatron_mode.report.run_folder import RunFolder, number
from megatron_mode.report.svg import (
    Axis,
    Dash,
    Line,
    Point,
    line_chart,
    percent,
    short_number,
    thin,
)

COLOURS = 6
_MOST_MARKERS = 40
WINDOWS = 24  # realised shares are counts: a window of a run holds enough rows to be a share
DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted")
_TOKENS = Axis("tokens seen", short_number, low=0)


def metric_charts(runs: Sequence[RunFolder]) -> list[str]:
    """Return a figure for each chart that any run has values for; an all-zero blocking has none."""
    figures = []
    for chart, y_axis in Y_AXES.items():
        curves = [
            (metric, metric.curve)
            for metric in METRICS.values()
            if metric.curve and metric.curve.chart == chart
        ]
        lines = [
            _metric_line(run, *curve) if len(runs) == 1 else _overlaid(run, *curve, index, place)
            for index, run in enumerate(runs)
            for place, curve in enumerate(curves)
            if run.curve(curve[0].key)
        ]
        if chart == "Blocked tokens":
            lines = [line for line in lines if any(value for _, value in line.points)]
        if chart == "LM loss by mode":
            lines += _entropy_lines(runs)
        if lines:
            figures.append(_figure(chart, lines, (_TOKENS, y_axis), runs))
    return figures


def position_chart(runs: Sequence[RunFolder]) -> str | None:
    """Return the figure of held-out AUROC by position in the document, None without figures."""
    lines = []
    for index, run in enumerate(runs):
        by_rendering = run.summary.get("auroc_by_position") or {}
        for place, (rendering, values) in enumerate(by_rendering.items()):
            numbers = ((float(position), number(value)) for position, value in values.items())
            points = sorted((position, value) for position, value in numbers if value is not None)
            colour = index if len(runs) > 1 else 3 + place
            dash = DASHES[place % len(DASHES)]
            label = f"held out, {rendering}"
            lines.append(Line(label, points, colour % COLOURS, dash, markers=True))
    lines = [line for line in lines if line.points]
    x_axis = Axis("first token of the range (0 is the document's start)", short_number, log2=True)
    y_axis = Axis("AUROC", short_number, high=1)
    title = "Mode AUROC by position in document"
    return _figure(title, lines, (x_axis, y_axis), runs) if lines else None


def _metric_line(run: RunFolder, metric: Metric, curve: Curve) -> Line:
    points = run.curve(metric.key)
    markers = metric.is_held_out and len(points) <= _MOST_MARKERS
    drawn = thin(points)
    return replace(drawn, label=curve.label, colour=curve.colour, dash=curve.dash, markers=markers)


def _overlaid(run: RunFolder, metric: Metric, curve: Curve, index: int, place: int) -> Line:
    """Return the curve in its run's colour, dashed by its place in the chart, without a band."""
    dash = DASHES[place % len(DASHES)]
    return replace(_metric_line(run, metric, curve), colour=index % COLOURS, dash=dash, band=())


def _entropy_lines(runs: Sequence[RunFolder]) -> list[Line]:
    """Return one level line for each different unigram entropy among the runs."""
    entropies = {number(run.summary.get("unigram_entropy")) for run in runs} - {None}
    end = float(max(1, *(run.tokens_seen for run in runs)))
    levels = (value for value in entropies if value is not None)
    return [Line("unigram entropy", [(0.0, y), (end, y)], 5, "dashed") for y in sorted(levels)]


def figure(
    title: str, lines: Sequence[Line], axes: tuple[Axis, Axis], entries: Iterable[str]
) -> str:
    """Put title and the entries of the legend above the drawing."""
    return (
        f'<figure class="card"><h3>{escape(title)}</h3><ul class="legend">{"".join(entries)}</ul>'
        f"{line_chart(lines, *axes)}</figure>"
    )


def _figure(
    title: str, lines: Sequence[Line], axes: tuple[Axis, Axis], runs: Sequence[RunFolder]
) -> str:
    entries = legend(lines, axes[1]) if len(runs) == 1 else _shared_legend(lines, runs)
    return figure(title, lines, axes, entries)


def legend(lines: Sequence[Line], y_axis: Axis) -> Iterable[str]:
    """Return one entry for each curve, with its last value."""
    for line in lines:
        value = escape(y_axis.text(float(f"{line.points[-1][1]:.4g}")))
        yield f"<li>{_sample(line, f'c{line.colour}')}{escape(line.label)} <b>{value}</b></li>"


def _shared_legend(lines: Sequence[Line], runs: Sequence[RunFolder]) -> Iterable[str]:
    """Return one entry for each run's colour, then one for each kind of curve's dashes."""
    for index, run in enumerate(runs):
        swatch = _sample(Line("", []), f"c{index % COLOURS}")
        yield f"<li>{swatch}<b>{escape(run.name)}</b></li>"
    kinds = {line.label: line for line in reversed(lines)}
    for label, line in reversed(kinds.items()):
        if len(kinds) > 1:
            colour = "c5" if label == "unigram entropy" else "ck"
            yield f"<li>{_sample(line, colour)}{escape(label)}</li>"


def _sample(line: Line, colour: str) -> str:
    dot = '<circle cx="11" cy="4" r="3"/>' if line.markers else ""
    return (
        f'<svg viewBox="0 0 22 8" aria-hidden="true"><g class="{colour}">'
        f'<path class="curve {line.dash}" d="M0 4H22"/>{dot}</g></svg>'
    )


def source_charts(run: RunFolder) -> list[str]:
    """Return the figures by source that a run has values for."""
    names = _names(run, "rows_by_source")
    figures = []
    if names:
        lines = [line for place, name in enumerate(names) for line in _shares(run, name, place)]
        figures.append(_source_figure("Share of rows by source", lines, Axis("share", percent, 0)))
    losses = Axis("nats per token", short_number)
    for key, title in (
        ("lm_loss_by_source", "Training LM loss by source"),
        ("valid_lm_loss_by_source", "Held-out LM loss by source"),
    ):
        # A training source keeps its colour from chart to chart.
        own = names if key == "lm_loss_by_source" and names else _names(run, key)
        lines = [_line(run, f"{key}/{name}", name, place) for place, name in enumerate(own)]
        if lines := [line for line in lines if line.points]:
            figures.append(_source_figure(title, lines, losses))
    return figures


def _names(run: RunFolder, key: str) -> list[str]:
    return [
        column.removeprefix(f"{key}/") for column in run.columns if column.startswith(f"{key}/")
    ]


def _shares(run: RunFolder, name: str, place: int) -> Iterator[Line]:
    colour, dash = _style(place)
    realised = _in_windows(run, f"rows_by_source/{name}")
    yield Line(name, realised, colour, dash, markers=True)
    if planned := _in_windows(run, f"planned_rows_by_source/{name}"):
        yield Line(f"{name}, planned", planned, colour, "dotted")


def _in_windows(run: RunFolder, key: str) -> list[Point]:
    """Return the share of rows in each of WINDOWS stretches of the run."""
    points = run.curve(key)
    totals = _rows_of_steps(run)
    found = []
    for window in range(min(WINDOWS, len(points))):
        part = slice(window * len(points) // WINDOWS, (window + 1) * len(points) // WINDOWS)
        if len(points) < WINDOWS:
            part = slice(window, window + 1)
        rows = sum(totals[at] for at, _ in points[part])
        if rows:
            middle = sum(at for at, _ in points[part]) / len(points[part])
            found.append((middle, sum(value for _, value in points[part]) / rows))
    return found


def _rows_of_steps(run: RunFolder) -> Counter[float]:
    """Return the rows of all sources by tokens seen."""
    totals: Counter[float] = Counter()
    for name in _names(run, "rows_by_source"):
        totals.update(dict(run.curve(f"rows_by_source/{name}")))
    return totals


def _line(run: RunFolder, key: str, name: str, place: int) -> Line:
    colour, dash = _style(place)
    drawn = thin(run.curve(key))
    return Line(name, drawn.points, colour, dash, markers=len(drawn.points) <= WINDOWS)


def _style(place: int) -> tuple[int, Dash]:
    """Return colour and dash; dotted is left to plans."""
    return place % COLOURS, DASHES[place // COLOURS % 2]


def _source_figure(title: str, lines: list[Line], y_axis: Axis) -> str:
    shown = [line for line in lines if not line.label.endswith(", planned")]
    return figure(title, lines, (_TOKENS, y_axis), legend(shown, y_axis))
