"""Find every place of a run at which a document is shown, and the documents that stand in rows."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mode.config.fields import Config
from megatron_mode.errors import DataError
from megatron_mode.mix.corpus import Corpus, packed_sources
from megatron_mode.mix.edits.documents import find_document
from megatron_mode.mix.order import Order, Rows

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
        """Say whether the document is really read there."""
        return self.via not in DONE.values()


def exposures(config: Config, corpus: Corpus, order: Order, document: str) -> list[Exposure]:
    """Return the exposures of SOURCE/ID, ascending; ranks and micro-batches play no part.

    A document that a stream cuts is in several rows, each an exposure of a part of it. Raises
    ConfigError or DataError for a document that the run does not know.
    """
    known = {source.name: source for source in corpus.read_sources}
    number = find_document(document, known, "--document")
    places: list[tuple[int, int, str]] = []
    done = {change.name: DONE[change.action] for change in order.edits.changed}
    for source, entry in enumerate(packed_sources(config, corpus)):
        if entry.source.name != document.partition("/")[0]:
            continue
        for source_row in entry.rows_of(number):
            if source_row >= order.sizes[source]:
                raise DataError(
                    f"source {entry.source.name} has {entry.rows} rows, but the order was planned "
                    f"for {order.sizes[source]}; use the data that the run was planned with"
                )
            for row, via in order.places(source, source_row):
                places.append((row, source_row, done.get(document, via) if via == "mix" else via))
    for change in order.edits.changed:
        for source_row in change.by_rows if change.by == document else ():
            via = f"in place of {change.name}"
            places += [(row, source_row, via) for row, _ in order.places(change.source, source_row)]
    return [Exposure(found[0] // config.batch.global_rows, *found) for found in sorted(places)]


def describe_rows(
    config: Config, corpus: Corpus, order: Order, rows: Rows
) -> list[dict[str, object]]:
    """Return row index, mode, source, source row and documents (SOURCE/ID) of each row.

    A document that an edit drops or replaces is named as the one whose place it is.
    """
    packed = packed_sources(config, corpus)
    found: list[dict[str, object]] = []
    columns = (rows.row, rows.mode, rows.source, rows.source_row)
    for row, mode, number, source_row in zip(*(c.tolist() for c in columns), strict=True):
        source = packed[number].source
        ids = [source.document(document)[2] for document in packed[number].documents_of(source_row)]
        found.append(
            {
                "row": row,
                "mode": mode,
                "source": source.name,
                "source_row": source_row,
                "documents": [f"{source.name}/{id}" for id in ids],
            }
        )
    return found
