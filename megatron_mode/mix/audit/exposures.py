"""Find every place of a run at which a document is shown, past and future, from its id alone."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mode.config.fields import Config
from megatron_mode.errors import DataError
from megatron_mode.mix.corpus import Corpus, packed_sources
from megatron_mode.mix.edits.lookup import PackedSource, find_document, pack
from megatron_mode.mix.order import Order

DONE = {"drop": "dropped", "replace": "replaced"}


class Exposure(NamedTuple):
    """Name one row of the run that holds tokens of a document.

    `via` is mix, inject, cohort, or what an edit did: dropped, replaced, in place of S/ID. In
    dropped and replaced rows the document is not shown.
    """

    step: int
    row: int
    source_row: int
    via: str

    @property
    def is_shown(self) -> bool:
        """Tell whether the document is really read there."""
        return self.via not in ("dropped", "replaced")


def exposures(config: Config, corpus: Corpus, order: Order, document: str) -> list[Exposure]:
    """Return the exposures of SOURCE/ID, ascending; ranks and micro-batches play no part.

    A document that a stream cuts is in several rows, each an exposure of a part of it. Raises
    ConfigError or DataError for a document that the run does not know.
    """
    name = document.partition("/")[0]
    known = {source.name: source for source in corpus.read_sources}
    number = find_document(document, known, "--document")
    seq_len, global_rows = config.model.seq_len, config.batch.global_rows
    found: list[tuple[int, int, str]] = []
    done = {change.name: DONE[change.action] for change in order.edits.changed}
    for source, entry in enumerate(packed_sources(config, corpus)):
        if entry.source.name == name:
            found += _rows(order, source, entry, number, done.get(document, "mix"))
    for place, stream in enumerate(order.edits.streams):
        if stream.name == name:
            entry = pack(corpus.edits[name], stream.packing, seq_len)
            source = len(order.configs) + place
            for source_row in entry.rows_of(number):
                found += [
                    (row, source_row, kind) for row, kind in order.edit_rows(source, source_row)
                ]
    for change in order.edits.changed:
        if change.by == document:
            for source_row in change.by_rows:
                rows = order.rows_seen(change.source, source_row).tolist()
                found += [(row, source_row, f"in place of {change.name}") for row in rows]
    return [
        Exposure(row // global_rows, row, source_row, via) for row, source_row, via in sorted(found)
    ]


def _rows(
    order: Order, source: int, entry: PackedSource, document: int, via: str
) -> list[tuple[int, int, str]]:
    found = []
    for source_row in entry.rows_of(document):
        if source_row >= order.size_of(source):
            raise DataError(
                f"source {entry.source.name} has {entry.rows} rows, but the order was planned for "
                f"{order.size_of(source)}; use the data that the run was planned with"
            )
        found += [(row, source_row, via) for row in order.rows_seen(source, source_row).tolist()]
    return found
