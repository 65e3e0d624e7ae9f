"""Say which tokens of a source stand in which of its rows, and read a row.

    stream     row r is tokens [r*T, (r + 1)*T]: nothing is lost, documents are cut anywhere
    whole      row r holds the undivided documents that the row table names, then padding
    document   row r is document r alone, cut to T tokens or padded

One more `<|doc|>` follows the last document of a row, so that its last token learns to
stop as it does in a stream; it is a target only. Padding repeats that piece and takes no loss.

Letters: T row length (`seq_len`); a row has T + 1 tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt

from megatron_mode.mix.floors import IntArray
from megatron_mode.tokens.flags import BLANK, CONTROL, MODE2, NO_LM_LOSS, NO_MODE_LOSS
from megatron_mode.tokens.source.row_table import Piece, RowTable, open_table
from megatron_mode.tokens.source.shards import Source

PackingName = Literal["stream", "whole", "document"]
ByteArray = npt.NDArray[np.uint8]

PADDING = BLANK | CONTROL | NO_LM_LOSS | NO_MODE_LOSS


class RowTokens(NamedTuple):
    """Hold a row: ids [T + 1], flags [T + 1] and the offsets at which documents start in it."""

    ids: IntArray
    flags: ByteArray
    starts: IntArray


class PackedSource(NamedTuple):
    """Hold a source and how its rows are packed; only packing `whole` has a table."""

    source: Source
    seq_len: int
    packing: PackingName = "stream"
    table: RowTable | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        if self.table is not None:
            return int(self.table.rows)
        if self.packing == "document":
            return int(self.source.documents)
        return rows_in_stream(self.source.tokens, self.seq_len)

    @property
    def padding_share(self) -> float:
        """Return the share of padding among the tokens of all rows; 0 without a table."""
        return self.table.padding_share if self.table is not None else 0.0

    def rows_of(self, document: int, tokens: int | None = None) -> list[int]:
        """Return the rows that read a document, or its first `tokens` tokens; ascending."""
        if self.packing == "document":
            return [document]
        begin, end = span_of(self.source, document)
        end = end if tokens is None else min(end, begin + tokens)
        if self.table is not None:
            return self.table.rows_of(begin, end)
        last = min((end - 1) // self.seq_len, self.rows - 1) if end > begin else -1
        return list(range(begin // self.seq_len, last + 1))

    def documents_of(self, row: int) -> list[int]:
        """Return the documents whose tokens are inputs of a row, in the order in which they stand.

        Documents that an edit changed are named as they were.
        """
        if self.packing != "stream":
            return [self.source.document_of(piece.begin) for piece in self._pieces(row)]
        begin = row * self.seq_len
        last = self.source.document_of(begin + self.seq_len - 1)
        return list(range(self.source.document_of(begin), last + 1))

    def read(self, row: int, document_id: int | None) -> RowTokens:
        """Read a row.

        `document_id` is that of `<|doc|>`; None (a corpus of unknown vocabulary) pads with 0 and
        has no stop to learn.
        """
        if self.packing == "stream":
            return self.window(row * self.seq_len)
        ids = np.full(self.seq_len + 1, document_id or 0, np.int64)
        flags = np.full(self.seq_len + 1, PADDING, np.uint8)
        starts: list[int] = []
        at = 0
        pieces = self._pieces(row)
        for begin, length, is_end in pieces:
            room = length if is_end else length + 1  # a cut document still shows what comes next
            ids[at : at + room], flags[at : at + room] = self.source.read(begin, begin + room)
            # Inside a piece only a replaced document starts anything: its padding.
            inside = self.source.document_starts(begin + 1, begin + length)
            starts += [at, *(inside - begin + at).tolist()]
            at += length
        if not pieces or pieces[-1].is_end:  # a cut document fills its row
            starts.append(at)
            if document_id is not None and pieces:
                flags[at] = CONTROL | NO_MODE_LOSS | (flags[at - 1] & MODE2)
        return RowTokens(ids, flags, np.array(starts, np.int64))

    def window(self, begin: int) -> RowTokens:
        """Read the T + 1 tokens from `begin` on."""
        end = begin + self.seq_len + 1
        starts = self.source.document_starts(begin, end) - begin
        return RowTokens(*self.source.read(begin, end), starts)

    def _pieces(self, row: int) -> list[Piece]:
        if self.table is not None:
            return self.table.pieces(row)
        begin, end = span_of(self.source, row)
        return [Piece(begin, min(end - begin, self.seq_len), end - begin <= self.seq_len)]


def pack(source: Source, packing: PackingName, seq_len: int) -> PackedSource:
    """Open a source under a packing; DataError where `whole` lacks its row table."""
    match packing:
        case "whole":
            return PackedSource(source, seq_len, packing, open_table(source, seq_len))
        case "stream" | "document":
            return PackedSource(source, seq_len, packing)
    assert_never(packing)


def rows_in_stream(tokens: int, seq_len: int) -> int:
    """Count the rows R_s of a stream: every row needs one token more than it predicts."""
    return max(0, (tokens - 1) // seq_len)


def span_of(source: Source, document: int) -> tuple[int, int]:
    """Return the first token of a document and the token after its last."""
    begin_D, length_D = source.document_spans(document, document + 1)
    return int(begin_D[0]), int(begin_D[0] + length_D[0])
