"""Name the documents that stand in rows: the way back from what a step read to who wrote it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mode.config.fields import Config
from megatron_mode.mix.corpus import Corpus, packed_sources
from megatron_mode.mix.edits.lookup import PackedSource, pack
from megatron_mode.mix.order import Order, Rows


def documents_of_row(entry: PackedSource, source_row: int) -> list[int]:
    """Return the documents whose tokens are inputs of a row, in the order in which they stand."""
    source = entry.source
    if entry.packing is not None:
        return [source.document_of(piece.begin) for piece in entry.packing.pieces(source_row)]
    begin = source_row * entry.seq_len
    first = source.document_of(begin)
    return list(range(first, source.document_of(begin + entry.seq_len - 1) + 1))


def describe_rows(
    config: Config, corpus: Corpus, order: Order, rows: Rows
) -> list[dict[str, object]]:
    """Return row index, mode, source, source row and documents (SOURCE/ID) of each row.

    A document that an edit drops or replaces is named as the one whose place it is.
    """
    streams = order.edits.streams
    entries: Sequence[PackedSource] = [
        *packed_sources(config, corpus),
        *(pack(corpus.edits[s.name], s.packing, config.model.seq_len) for s in streams),
    ]
    found: list[dict[str, object]] = []
    columns = (rows.row, rows.mode, rows.source, rows.source_row)
    for row, mode, source, source_row in zip(*(c.tolist() for c in columns), strict=True):
        entry = entries[source]
        numbers = documents_of_row(entry, source_row)
        name = entry.source.name
        ids = [entry.source.document(number)[2] for number in numbers]
        found.append(
            {
                "row": row,
                "mode": mode,
                "source": name,
                "source_row": source_row,
                "documents": [f"{name}/{id}" for id in ids],
            }
        )
    return found
