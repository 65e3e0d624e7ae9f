"""Say which tokens of a source stand in which of its rows.

    stream     row r is tokens [r*T, (r + 1)*T]: nothing is lost, documents are cut anywhere
    whole      row r holds the undivided documents that the row table names, then padding
    document   row r is document r alone, cut to T tokens or padded

One more `<|doc|>` follows the last document of a row, so that its last token learns to
stop as it does in a stream; it is a target only. Padding repeats that piece and takes no loss.

Letters: T row length (`seq_len`); a row has T + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_mode.mix.floors import IntArray
from megatron_mode.tokens.flags import BLANK, CONTROL, MODE2, NO_LM_LOSS, NO_MODE_LOSS
from megatron_mode.tokens.source.row_table import Piece

ByteArray = npt.NDArray[np.uint8]

PADDING = BLANK | CONTROL | NO_LM_LOSS | NO_MODE_LOSS


class TokenSource(Protocol):
    """Say what rows need of a prepared source (tokens.shards.Source)."""

    @property
    def name(self) -> str:
        """Return the source's name."""

    @property
    def mode(self) -> int | None:
        """Return the mode of all its documents, 1 or 2, or None where they differ."""

    @property
    def tokens(self) -> int:
        """Return the length of the stream in tokens."""

    def read(self, begin_token: int, end_token: int) -> tuple[IntArray, ByteArray]:
        """Return ids (int64) and flags of tokens begin_token .. end_token - 1."""

    def document_starts(self, begin_token: int, end_token: int) -> IntArray:
        """Return the stream offsets in [begin_token, end_token) at which documents start."""


class DocumentSource(TokenSource, Protocol):
    """Say what the `document` packing needs besides."""

    @property
    def documents(self) -> int:
        """Return the number of documents."""

    def document_spans(self, begin: int, end: int) -> tuple[IntArray, IntArray]:
        """Return the first token and the length in tokens of documents begin .. end - 1."""


class Packing(Protocol):
    """Name the pieces of each row of a source."""

    @property
    def rows(self) -> int:
        """Return the number of rows."""

    def pieces(self, row: int) -> Sequence[Piece]:
        """Return what stands in a row, in order, at most T tokens in all."""

    def rows_of(self, document: int, begin_token: int, end_token: int) -> list[int]:
        """Return the rows of tokens [begin_token, end_token) of a document, from its start on."""


def rows_in_stream(tokens: int, seq_len: int) -> int:
    """Count the rows R_s of a stream: every row needs one token more than it predicts."""
    return max(0, (tokens - 1) // seq_len)


def stream_rows_of(begin_token: int, end_token: int, tokens: int, seq_len: int) -> list[int]:
    """Return the rows of a stream that have any of these tokens as input."""
    rows = rows_in_stream(tokens, seq_len)
    if begin_token == end_token:
        return []
    return list(range(begin_token // seq_len, min((end_token - 1) // seq_len + 1, rows)))


@dataclass(frozen=True)
class DocumentRows:
    """Give each document a row of its own; what does not fit into T tokens is cut off."""

    source: DocumentSource
    seq_len: int

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return self.source.documents

    def pieces(self, row: int) -> list[Piece]:
        """Return the document."""
        begin_D, length_D = self.source.document_spans(row, row + 1)
        length = int(length_D[0])
        return [Piece(int(begin_D[0]), min(length, self.seq_len), length <= self.seq_len)]

    def rows_of(self, document: int, begin_token: int, end_token: int) -> list[int]:
        """Return the document's own row."""
        return [document]


def read_pieces(
    source: TokenSource, pieces: Sequence[Piece], seq_len: int, document_id: int | None
) -> tuple[IntArray, ByteArray, IntArray]:
    """Return ids [T + 1], flags [T + 1] and the offsets at which documents start in the row.

    `document_id` is that of `<|doc|>`; None (a corpus of unknown vocabulary) pads with 0 and has no
    stop to learn.
    """
    ids = np.full(seq_len + 1, document_id or 0, np.int64)
    flags = np.full(seq_len + 1, PADDING, np.uint8)
    starts: list[int] = []
    at = 0
    for begin, length, is_end in pieces:
        room = length if is_end else length + 1  # a cut document still shows what comes next
        ids[at : at + room], flags[at : at + room] = source.read(begin, begin + room)
        # Inside a piece only a replaced document starts anything: its padding.
        starts += [at, *(source.document_starts(begin + 1, begin + length) - begin + at).tolist()]
        at += length
    if not pieces or pieces[-1].is_end:  # a cut document fills its row
        starts.append(at)
        if document_id is not None and pieces:
            flags[at] = CONTROL | NO_MODE_LOSS | (flags[at - 1] & MODE2)
    return ids, flags, np.array(starts, np.int64)
