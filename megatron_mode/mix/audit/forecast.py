"""Say what an order will do to its sources: tokens, epochs, repeats, and where each runs dry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_mode.mix.apportion import rows_max
from megatron_mode.mix.order import Order


class Milestone(NamedTuple):
    """Name a row of the run at which something happens to a source."""

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
    end_row = order.total_rows if end_row is None else end_row
    found = []
    for source, config in enumerate(order.configs):
        rows, size = order.rows_of_source(source, end_row), order.size_of(source)
        found.append(
            SourceForecast(config.name, order.mode_of(source), rows, size, round(rows / size, 6))
        )
    return found


def planned_rows(order: Order, begin_row: int, end_row: int) -> list[float]:
    """Return the planned rows of each source of the mix in a short stretch of the run."""
    mode2 = order.integral.planned(end_row) - order.integral.planned(begin_row)
    of_mode = {1: end_row - begin_row - mode2, 2: mode2}
    shares = order.planned_shares((begin_row + end_row) // 2)
    return [share * of_mode[order.mode_of(source)] for source, share in enumerate(shares)]


def labels(order: Order) -> list[str]:
    """Name every source apart: one that an edit reads says so and how it is packed."""
    edits = (f"{s.name} ({s.packing}, edit)" for s in order.edits.streams)
    return [*(source.name for source in order.configs), *edits]


def milestones(order: Order) -> list[Milestone]:
    """List onsets, repeats and ends of sources, in config order."""
    return [*_onsets(order), *_repeats(order), *_ends(order)]


def warnings(order: Order) -> list[str]:
    """Say which sources repeat, run dry or never begin, and when."""
    found = [m.sentence for m in milestones(order) if m.what != "onset"]
    for source, config in enumerate(order.configs):
        if not order.rows_of_source(source):
            found.append(
                f"source '{config.name}' (mode {order.mode_of(source)}) gives no row in this run"
            )
    return found + list(order.edits.notes)


def _onsets(order: Order) -> Iterator[Milestone]:
    for source, config in enumerate(order.configs):
        if config.onset_tokens and order.rows_of_source(source):
            row = order.row_of(source, 0)
            yield Milestone(
                source, row, "onset", f"source '{config.name}' begins at {_at(order, row)}"
            )


def _repeats(order: Order) -> Iterator[Milestone]:
    for source, config in enumerate(order.configs):
        mode, size, taken = (
            order.mode_of(source),
            order.size_of(source),
            order.rows_of_source(source),
        )
        if taken > size:
            row = order.row_of(source, size)
            yield Milestone(
                source,
                row,
                "repeat",
                f"source '{config.name}' (mode {mode}) repeats: {taken / size:.2f} epochs by the "
                f"end of the run, the second begins at {_at(order, row)}",
            )
        limit = rows_max(config, size)
        if config.when_dry == "repeat" and limit is not None and taken > limit:
            row = order.row_of(source, limit)
            yield Milestone(
                source,
                row,
                "over",
                f"source '{config.name}' (mode {mode}) is past its epochs_max "
                f"{config.epochs_max} at {_at(order, row)} and repeats, as its when_dry says",
            )


def _ends(order: Order) -> Iterator[Milestone]:
    for source, row in order.dry_rows():
        config, mode = order.configs[source], order.mode_of(source)
        yield Milestone(
            source,
            row,
            "dry",
            f"source '{config.name}' (mode {mode}) runs dry after epochs_max {config.epochs_max}, "
            f"at {_at(order, row)}; the other sources of mode {mode} take its share",
        )


def _at(order: Order, row: int) -> str:
    return f"row {row:,} ({row * order.seq_len:,} tokens)"
