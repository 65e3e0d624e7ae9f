"""Draw an order before training: shares, tokens and epochs by source, and where sources run dry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from megatron_mode.mix.audit.forecast import forecast, milestones, warnings
from megatron_mode.mix.order import Order
from megatron_mode.report.charts import DASHES, figure, legend
from megatron_mode.report.svg import Axis, Line, Point, percent, short_number
from megatron_mode.report.theme import style_sheet

POINTS = 120
SERIES_COLOURS = 5  # the sixth is that of notes
EVENT_COLOUR = 5


def order_page(order: Order, global_rows: int) -> str:
    """Return one HTML file without scripts."""
    rows = [order.total_rows * k // POINTS for k in range(POINTS + 1)]
    tokens = Axis("tokens seen", short_number, low=0)
    charts = [
        _chart(
            "Planned share of rows", share_lines(order, rows), tokens, Axis("share", percent, 0)
        ),
        _chart(
            "Tokens taken",
            count_lines(order, rows, lambda source, count: count * order.seq_len),
            tokens,
            Axis("tokens", short_number, 0),
        ),
        _chart(
            "Epochs",
            [
                *count_lines(order, rows, lambda source, count: count / order.size_of(source)),
                *event_lines(order),
            ],
            tokens,
            Axis("passes over the source", short_number, 0),
        ),
    ]
    total = short_number(order.total_rows * order.seq_len)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Order of the data</title><style>{style_sheet()}</style></head><body><main>"
        f'<h1>Order of the data</h1><p class="quiet">{total} tokens in '
        f"{order.total_rows // max(global_rows, 1):,} steps of {global_rows:,} rows of "
        f"{order.seq_len:,} tokens; nothing has been trained to draw this.</p>"
        f'<div class="grid">{"".join(charts)}</div>{_table(order)}{_notes(order)}</main></body>'
        "</html>\n"
    )


def share_lines(order: Order, rows: Sequence[int]) -> list[Line]:
    """Return the planned share of each source, and of Mode 2, over tokens."""
    points: list[list[Point]] = [[] for _ in order.configs]
    mode2: list[Point] = []
    for row in rows:
        # The share of the rows just ahead; the run's end looks back.
        begin = min(row, order.total_rows - 1)
        fraction = order.integral.planned(begin + 1) - order.integral.planned(begin)
        mode2.append((row * order.seq_len, fraction))
        for source, share in enumerate(order.planned_shares(begin)):
            of_mode = fraction if order.mode_of(source) == 2 else 1 - fraction
            points[source].append((row * order.seq_len, share * of_mode))
    lines = [_line(order, source, values) for source, values in enumerate(points)]
    return [*lines, Line("all of Mode 2", mode2, EVENT_COLOUR, "dashed")]


def count_lines(
    order: Order, rows: Sequence[int], scale: Callable[[int, int], float]
) -> list[Line]:
    """Return what has been taken of each source; `scale` turns (source, rows) into the ordinate."""
    by_row = [(row, forecast(order, row)) for row in rows]
    return [
        _line(
            order,
            source,
            [(row * order.seq_len, scale(source, found[source].rows)) for row, found in by_row],
        )
        for source in range(len(order.configs))
    ]


def event_lines(order: Order) -> list[Line]:
    """Return a mark where a source begins to repeat or runs dry."""
    words = {"repeat": "repeats", "dry": "runs dry", "over": "is past epochs_max"}
    lines = []
    for event in milestones(order):
        if event.what in words:
            count = order.rows_of_source(event.source, event.row)
            at = (event.row * order.seq_len, count / order.size_of(event.source))
            label = f"{order.source_names[event.source]} {words[event.what]}"
            lines.append(Line(label, [at], EVENT_COLOUR, markers=True))
    return lines


def _line(order: Order, source: int, points: list[Point]) -> Line:
    dash = DASHES[source // SERIES_COLOURS % len(DASHES)]
    return Line(order.source_names[source], points, source % SERIES_COLOURS, dash)


def _chart(title: str, lines: list[Line], x_axis: Axis, y_axis: Axis) -> str:
    return figure(title, lines, (x_axis, y_axis), legend(lines, y_axis))


def _table(order: Order) -> str:
    titles = ("source", "mode", "rows taken", "rows it has", "epochs", "tokens taken")
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(
        f"<tr><td>{escape(s.name)}</td><td>{s.mode}</td><td>{s.rows:,}</td>"
        f"<td>{s.rows_available:,}</td><td>{s.epochs:.3f}</td>"
        f"<td>{s.rows * order.seq_len:,}</td></tr>"
        for s in forecast(order)
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _notes(order: Order) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in warnings(order))
    return f"<h2>What happens to the sources</h2><ul>{notes}</ul>" if notes else ""
