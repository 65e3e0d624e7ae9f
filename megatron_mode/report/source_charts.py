"""Draw what a run took from each source beside its plan, and the loss on each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megatron_mode.report.charts import DASHES, figure, legend
from megatron_mode.report.run_folder import RunFolder
from megatron_mode.report.svg import Axis, Dash, Line, Point, percent, short_number, thin

SERIES_COLOURS = 6
WINDOWS = 24  # realised shares are counts: a window of a run holds enough rows to be a share
_TOKENS = Axis("tokens seen", short_number, low=0)


def source_charts(run: RunFolder) -> list[str]:
    """Return the figures by source that a run has values for."""
    names = _names(run, "rows_by_source")
    figures = []
    if names:
        lines = [line for place, name in enumerate(names) for line in _shares(run, name, place)]
        figures.append(_figure("Share of rows by source", lines, Axis("share", percent, 0)))
    losses = Axis("nats per token", short_number)
    for key, title in (
        ("lm_loss_by_source", "Training LM loss by source"),
        ("valid_lm_loss_by_source", "Held-out LM loss by source"),
    ):
        # A training source keeps its colour from chart to chart.
        own = names if key == "lm_loss_by_source" and names else _names(run, key)
        lines = [_line(run, f"{key}/{name}", name, place) for place, name in enumerate(own)]
        if lines := [line for line in lines if line.points]:
            figures.append(_figure(title, lines, losses))
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
    return place % SERIES_COLOURS, DASHES[place // SERIES_COLOURS % 2]


def _figure(title: str, lines: list[Line], y_axis: Axis) -> str:
    shown = [line for line in lines if not line.label.endswith(", planned")]
    return figure(title, lines, (_TOKENS, y_axis), legend(shown, y_axis))
