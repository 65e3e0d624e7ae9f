"""Say which curves the report draws: key in metrics.jsonl, label, axis.

In the report of one run, a colour is a mode or a kind of figure. In the report of several, a colour
is a run and the dashes distinguish the curves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

from megatron_mode.report.run_folder import RunFolder, number
from megatron_mode.report.svg import Axis, Dash, Line, line_chart, percent, short_number, thin

COLOURS = 6
_MOST_MARKERS = 40
DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted")
_TOKENS = Axis("tokens seen", short_number, low=0)


@dataclass(frozen=True)
class Curve:
    """Name one metric of a chart; colour 0 is Mode 1 and 1 is Mode 2, as in the heat map."""

    key: str
    label: str
    colour: int = 2
    dash: Dash = "solid"
    held_out: bool = False


@dataclass(frozen=True)
class Chart:
    """Describe one chart over tokens seen."""

    title: str
    y_axis: Axis
    curves: tuple[Curve, ...]


CHARTS = (
    Chart(
        "LM loss by mode",
        Axis("nats per token", short_number),
        (
            Curve("lm_loss_mode1", "train, Mode 1", 0),
            Curve("lm_loss_mode2", "train, Mode 2", 1),
            Curve("valid_lm_loss", "held out", 2, held_out=True),
        ),
    ),
    Chart(
        "Mode AUROC a token",
        Axis("AUROC", short_number, high=1),
        (
            Curve("mode_auroc", "train", 2),
            Curve("valid_mode_auroc", "held out, plain", 3, held_out=True),
            Curve("valid_mode_auroc_chat", "held out, chat", 4, "dashed", held_out=True),
        ),
    ),
    Chart(
        "Mode 2 recall at 1 % false positives",
        Axis("recall", percent, low=0, high=1),
        (
            Curve("mode_recall_at_fpr01", "train", 2),
            Curve("valid_mode_recall_at_fpr01", "held out, plain", 3, held_out=True),
            Curve("valid_mode_recall_at_fpr01_chat", "held out, chat", 4, "dashed", held_out=True),
        ),
    ),
    Chart(
        "Mode 2 share",
        Axis("share of Mode 2", percent, low=0),
        (
            Curve("mode2_fraction_realised", "rows, realised", 1),
            Curve("mode2_token_fraction_realised", "tokens, realised", 3),
            Curve("mode2_fraction_planned", "rows, planned", 2, "dashed"),
        ),
    ),
    Chart(
        "Mode loss",
        Axis("nats per token", short_number, low=0),
        (
            Curve("mode_loss", "train", 2),
            Curve("valid_mode_loss", "held out", 3, held_out=True),
        ),
    ),
    Chart(
        "Throughput",
        Axis("tokens per second", short_number, low=0),
        (Curve("tokens_per_second", "all ranks", 2),),
    ),
    Chart(
        "Gradient norm",
        Axis("global L2 norm before clipping", short_number, low=0),
        (Curve("grad_norm", "all parameters", 2),),
    ),
    Chart(
        "Learning rate",
        Axis("learning rate", short_number, low=0),
        (Curve("learning_rate", "AdamW", 2),),
    ),
    Chart(
        "Blocked tokens",
        Axis("share of valid tokens", percent, low=0),
        (Curve("blocked_share", "blocked", 4),),
    ),
)


def metric_charts(runs: Sequence[RunFolder]) -> list[str]:
    """Return a figure for each chart that any run has values for; an all-zero blocking has none."""
    figures = []
    for chart in CHARTS:
        lines = [
            _metric_line(run, curve) if len(runs) == 1 else _overlaid(run, curve, index, place)
            for index, run in enumerate(runs)
            for place, curve in enumerate(chart.curves)
            if run.curve(curve.key)
        ]
        if chart.title == "Blocked tokens":
            lines = [line for line in lines if any(value for _, value in line.points)]
        if chart.title == "LM loss by mode":
            lines += _entropy_lines(runs)
        if lines:
            figures.append(_figure(chart.title, lines, (_TOKENS, chart.y_axis), runs))
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


def _metric_line(run: RunFolder, curve: Curve) -> Line:
    points = run.curve(curve.key)
    markers = curve.held_out and len(points) <= _MOST_MARKERS
    drawn = thin(points)
    return replace(drawn, label=curve.label, colour=curve.colour, dash=curve.dash, markers=markers)


def _overlaid(run: RunFolder, curve: Curve, index: int, place: int) -> Line:
    """Return the curve in its run's colour, dashed by its place in the chart, without a band."""
    dash = DASHES[place % len(DASHES)]
    return replace(_metric_line(run, curve), colour=index % COLOURS, dash=dash, band=())


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
