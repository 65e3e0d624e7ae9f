"""Draw an order before training: shares, tokens and epochs by source, and where sources run dry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_mode.mix.audit.forecast import forecast, milestones, warnings
from megatron_mode.mix.order import Order
from megatron_mode.report.charts import DASHES, TOKENS, one_run_figure
from megatron_mode.report.render import render
from megatron_mode.report.svg import Axis, Line, Point, percent, short_number

POINTS = 120
SERIES_COLOURS = 5  # the sixth is that of notes
EVENT_COLOUR = 5
EVENTS = {"repeat": "repeats", "dry": "runs dry", "over": "is past epochs_max"}


def order_page(order: Order, global_rows: int) -> str:
    """Return one HTML file without scripts."""
    rows = [order.total_rows * k // POINTS for k in range(POINTS + 1)]
    tokens = _count_lines(order, rows, lambda source, count: count * order.seq_len)
    epochs = _count_lines(order, rows, lambda source, count: count / order.sizes[source])
    charts = (
        ("Planned share of rows", _share_lines(order, rows), Axis("share", percent, 0)),
        ("Tokens taken", tokens, Axis("tokens", short_number, 0)),
        (
            "Epochs",
            [*epochs, *_event_lines(order)],
            Axis("passes over the source", short_number, 0),
        ),
    )
    return render(
        "order.html",
        charts=[one_run_figure(title, lines, (TOKENS, y_axis)) for title, lines, y_axis in charts],
        tokens=short_number(order.total_rows * order.seq_len),
        steps=order.total_rows // max(global_rows, 1),
        global_rows=global_rows,
        seq_len=order.seq_len,
        rows=[
            (
                source.name,
                source.mode,
                f"{source.rows:,}",
                f"{source.rows_available:,}",
                f"{source.epochs:.3f}",
                f"{source.rows * order.seq_len:,}",
            )
            for source in forecast(order)
        ],
        warnings=warnings(order),
    )


def _share_lines(order: Order, rows: Sequence[int]) -> list[Line]:
    """Return the planned share of each source, and of Mode 2, over tokens."""
    points: list[list[Point]] = [[] for _ in order.configs]
    mode2: list[Point] = []
    for row in rows:
        # The share of the rows just ahead; the run's end looks back.
        begin = min(row, order.total_rows - 1)
        fraction = order.integral.planned(begin + 1) - order.integral.planned(begin)
        mode2.append((row * order.seq_len, fraction))
        for source, share in enumerate(order.planned_shares(begin)):
            of_mode = fraction if order.modes[source] == 2 else 1 - fraction
            points[source].append((row * order.seq_len, share * of_mode))
    lines = [_line(order, source, values) for source, values in enumerate(points)]
    return [*lines, Line("all of Mode 2", mode2, EVENT_COLOUR, "dashed")]


def _count_lines(
    order: Order, rows: Sequence[int], scale: Callable[[int, int], float]
) -> list[Line]:
    """Return what has been taken of each source; `scale` turns (source, rows) into the ordinate."""
    by_row = [(row * order.seq_len, forecast(order, row)) for row in rows]
    return [
        _line(order, source, [(at, scale(source, found[source].rows)) for at, found in by_row])
        for source in range(len(order.configs))
    ]


def _event_lines(order: Order) -> list[Line]:
    """Return a mark where a source begins to repeat or runs dry."""
    lines = []
    for event in milestones(order):
        if event.what in EVENTS:
            count = order.rows_of_source(event.source, event.row)
            at = (event.row * order.seq_len, count / order.sizes[event.source])
            label = f"{order.source_names[event.source]} {EVENTS[event.what]}"
            lines.append(Line(label, [at], EVENT_COLOUR, markers=True))
    return lines


def _line(order: Order, source: int, points: list[Point]) -> Line:
    dash = DASHES[source // SERIES_COLOURS % len(DASHES)]
    return Line(order.source_names[source], points, source % SERIES_COLOURS, dash)
