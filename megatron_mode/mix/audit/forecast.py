"""Say what an order will do to its sources: tokens, epochs, repeats, and where each runs dry."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_mode.mix.apportion import rows_max
from megatron_mode.mix.audit.order_document import OrderDocument
from megatron_mode.mix.order import Order


class Milestone(NamedTuple):
    """Name a row of the run at which something happens to a source.

    `what` is onset, repeat (its second epoch begins), over (past epochs_max, repeating) or dry.
    """

    source: int
    row: int
    what: str
    sentence: str


class SourceForecast(NamedTuple):
    """Hold what a run takes from a source; rows that edits show instead are counted as taken."""

    name: str
    mode: int
    rows: int
    rows_available: int
    epochs: float


def forecast(order: Order, end_row: int | None = None) -> list[SourceForecast]:
    """Return what the rows before `end_row` (default: all) take from each source of the mix."""
    found = []
    for source, config in enumerate(order.configs):
        rows, size = order.rows_of_source(source, end_row), order.sizes[source]
        mode, epochs = order.modes[source], round(rows / size, 6)
        found.append(SourceForecast(config.name, mode, rows, size, epochs))
    return found


def planned_rows(order: Order, begin_row: int, end_row: int) -> list[float]:
    """Return the planned rows of each source of the mix in a short stretch of the run."""
    mode2 = order.integral.planned(end_row) - order.integral.planned(begin_row)
    of_mode = {1: end_row - begin_row - mode2, 2: mode2}
    shares = order.planned_shares((begin_row + end_row) // 2)
    return [share * of_mode[order.modes[source]] for source, share in enumerate(shares)]


def labels(order: Order) -> list[str]:
    """Name every source apart: one that an edit reads says so and how it is packed."""
    edits = (f"{s.name} ({s.packing}, edit)" for s in order.edits.streams)
    return [*(source.name for source in order.configs), *edits]


def milestones(order: Order) -> list[Milestone]:
    """List onsets, then repeats, then ends of sources, in config order."""
    onsets, repeats, ends = [], [], []
    for source, config in enumerate(order.configs):
        size, taken = order.sizes[source], order.rows_of_source(source)
        name, limit = f"source '{config.name}'", rows_max(config, size)
        if config.onset_tokens and taken:
            row = order.row_of(source, 0)
            onsets.append(Milestone(source, row, "onset", f"{name} begins at {order.at(row)}"))
        name += f" (mode {order.modes[source]})"
        if taken > size:
            row = order.row_of(source, size)
            sentence = (
                f"{name} repeats: {taken / size:.2f} epochs by the end of the run, the second "
                f"begins at {order.at(row)}"
            )
            repeats.append(Milestone(source, row, "repeat", sentence))
        if config.when_dry == "repeat" and limit is not None and taken > limit:
            row = order.row_of(source, limit)
            sentence = (
                f"{name} is past its epochs_max {config.epochs_max} at {order.at(row)} and "
                "repeats, as its when_dry says"
            )
            repeats.append(Milestone(source, row, "over", sentence))
    for source, row in order.dry_rows():
        config, mode = order.configs[source], order.modes[source]
        sentence = (
            f"source '{config.name}' (mode {mode}) runs dry after epochs_max {config.epochs_max}, "
            f"at {order.at(row)}; the other sources of mode {mode} take its share"
        )
        ends.append(Milestone(source, row, "dry", sentence))
    return onsets + repeats + ends


def warnings(order: Order) -> list[str]:
    """Say which sources repeat, run dry or never begin, and when."""
    found = [m.sentence for m in milestones(order) if m.what != "onset"]
    found += [
        f"source '{source.name}' (mode {source.mode}) gives no row in this run"
        for source in forecast(order)
        if not source.rows
    ]
    return [*found, *order.edits.notes]


def plan(document: OrderDocument) -> dict[str, Any]:
    """Return the plan as JSON: rows, tokens and epochs by source, events and notes."""
    order = document.order
    sources = [
        {
            **found._asdict(),
            "tokens": found.rows * order.seq_len,
            "share": round(found.rows / max(order.total_rows, 1), 6),
            "padding_share": described["padding_share"],
        }
        for found, described in zip(forecast(order), document.sources, strict=True)
    ]
    return {
        "rows": order.total_rows,
        "steps": document.steps,
        "seq_len": order.seq_len,
        "tokens": order.total_rows * order.seq_len,
        "mode2_rows": order.integral.mode_rows(2, order.total_rows),
        "sources": sources,
        "events": [
            {"source": order.source_names[m.source], "row": m.row, "what": m.what}
            for m in milestones(order)
        ],
        "notes": warnings(order),
    }


def table(plan: dict[str, Any]) -> str:
    """Lay a plan out for a terminal."""
    lines = [
        f"{plan['steps']:,} steps of {plan['rows'] // plan['steps']:,} rows of "
        f"{plan['seq_len']:,} tokens, Mode 2 share {plan['mode2_rows'] / plan['rows']:.4f}",
        f"{'source':<24} mode {'share':>7} {'rows':>14} {'tokens':>16} {'it has':>9} {'epochs':>7} "
        f"{'padding':>7}",
    ]
    lines += [
        f"{s['name'][:24]:<24} {s['mode']:>4} {s['share']:>7.4f} {s['rows']:>14,} "
        f"{s['tokens']:>16,} {s['rows_available']:>9,} {s['epochs']:>7.3f} "
        f"{s['padding_share']:>7.2%}"
        for s in plan["sources"]
    ]
    return "\n".join(lines + [f"note: {note}" for note in plan["notes"]])
