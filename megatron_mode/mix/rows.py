"""Read rows of prepared sources: ids and targets, loss weights, mode labels, positions.

Source row r of a stream is its tokens [r*T, (r+1)*T], T + 1 of them: T inputs and, one to the
right, T targets. What a token means is written in its flag byte, so weights are functions of flags:

    lm_weight[t]    from the target's flags: 0 for NO_LM_LOSS and, with mix.mode2_lm_loss
                    "assistant", for Mode 2 tokens of another role. Where the target starts the
                    next document, the input's role decides instead: a document's last token
                    learns to stop exactly when it was itself worth learning.
    mode_label[t]   the mode of the document that the input belongs to
    mode_weight[t]  from the input's flags: 0 for NO_MODE_LOSS

Letters: B rows read together, T row length (`seq_len`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_mode.config.fields import MixConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.floors import IntArray
from megatron_mode.tokens.flags import MODE2, NO_LM_LOSS, NO_MODE_LOSS, ROLE_MASK, role_bits

Float32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

ASSISTANT_BITS = role_bits("assistant")


class StreamSource(Protocol):
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


@dataclass(frozen=True)
class RowBatch:
    """Hold B rows of T tokens; `position_BT` is 0 where attention restarts."""

    input_BT: IntArray
    target_BT: IntArray
    lm_weight_BT: Float32Array
    mode_label_BT: Float32Array
    mode_weight_BT: Float32Array
    position_BT: IntArray
    flags_BT: ByteArray


@dataclass(frozen=True)
class Row:
    """Hold one row of T tokens, the fields as in `RowBatch`."""

    input_T: IntArray
    target_T: IntArray
    lm_weight_T: Float32Array
    mode_label_T: Float32Array
    mode_weight_T: Float32Array
    position_T: IntArray
    flags_T: ByteArray


def rows_in_stream(tokens: int, seq_len: int) -> int:
    """Count the rows R_s of a stream: every row needs one token more than it predicts."""
    return max(0, (tokens - 1) // seq_len)


class RowReader:
    """Turn (source, source row) into arrays; holds no state, so threads may share it."""

    def __init__(self, sources: Sequence[StreamSource], seq_len: int, mix: MixConfig) -> None:
        """Read from `sources`, indexed as in Order.source_names, in rows of `seq_len` tokens.

        Raises ConfigError for a source that stands in the list of the other mode.
        """
        for mode, section in ((1, mix.mode1), (2, mix.mode2)):
            names = {source.name for source in section.sources}
            for source in sources:
                if source.name in names and source.mode not in (None, mode):
                    raise ConfigError(
                        f"mix.mode{mode}.sources names '{source.name}', but that source was "
                        f"prepared as mode {source.mode}; move it to mix.mode{source.mode}.sources"
                    )
        self.sources = tuple(sources)
        self.seq_len = seq_len
        self._reset = mix.reset_at_documents
        self._assistant_only = mix.mode2_lm_loss == "assistant"

    def read(self, source_index: int, source_row: int) -> Row:
        """Read one row."""
        batch = self.read_batch([source_index], [source_row])
        return Row(
            input_T=batch.input_BT[0],
            target_T=batch.target_BT[0],
            lm_weight_T=batch.lm_weight_BT[0],
            mode_label_T=batch.mode_label_BT[0],
            mode_weight_T=batch.mode_weight_BT[0],
            position_T=batch.position_BT[0],
            flags_T=batch.flags_BT[0],
        )

    def read_batch(self, source_index: Sequence[int], source_row: Sequence[int]) -> RowBatch:
        """Read B rows: two slices of memory-mapped files a row, then arithmetic on all at once.

        Raises DataError for a row that its source does not have.
        """
        begin_token = [row * self.seq_len for row in source_row]
        for index, row, begin in zip(source_index, source_row, begin_token, strict=True):
            source = self.sources[index]
            if row < 0 or begin + self.seq_len >= source.tokens:
                raise DataError(
                    f"row {row} of source '{source.name}' does not exist: it has {source.tokens} "
                    f"tokens, {rows_in_stream(source.tokens, self.seq_len)} rows of "
                    f"{self.seq_len}; run again with the data that the order was planned for"
                )
        return self.read_windows(source_index, begin_token)

    def read_windows(self, source_index: Sequence[int], begin_token: Sequence[int]) -> RowBatch:
        """Read B rows that begin at any token of their source with T + 1 tokens to go."""
        rows, length = len(source_index), self.seq_len
        ids = np.empty((rows, length + 1), np.int64)
        flags = np.empty((rows, length + 1), np.uint8)
        starts: list[IntArray] = []
        for b, (index, begin) in enumerate(zip(source_index, begin_token, strict=True)):
            source = self.sources[index]
            ids[b], flags[b] = source.read(begin, begin + length + 1)
            starts.append(
                source.document_starts(begin, begin + length + 1) + (b * (length + 1) - begin)
            )
        start = np.concatenate(starts) if starts else np.empty(0, np.int64)
        input_flags = np.ascontiguousarray(flags[:, :-1])
        return RowBatch(
            input_BT=np.ascontiguousarray(ids[:, :-1]),
            target_BT=np.ascontiguousarray(ids[:, 1:]),
            lm_weight_BT=self._lm_weights(flags, start),
            mode_label_BT=(input_flags & MODE2).astype(np.float32),
            mode_weight_BT=((input_flags & NO_MODE_LOSS) == 0).astype(np.float32),
            position_BT=self._positions(rows, start),
            flags_BT=input_flags,
        )

    def _lm_weights(self, flags: ByteArray, start: IntArray) -> Float32Array:
        """Weigh targets; `start` are document starts as flat offsets into flags [B, T + 1]."""
        keep = (flags & NO_LM_LOSS) == 0
        if self._assistant_only:
            learns = ((flags & MODE2) == 0) | ((flags & ROLE_MASK) == ASSISTANT_BITS)
            final = start[start % (self.seq_len + 1) != 0]
            judge = learns.reshape(-1)
            judge[final] = judge[final - 1]
            keep &= learns
        weight: Float32Array = keep[:, 1:].astype(np.float32)
        return weight

    def _positions(self, rows: int, start: IntArray) -> IntArray:
        """Count from 0 in each row and, with resets on, in each document."""
        breaks = np.arange(rows, dtype=np.int64) * self.seq_len
        if self._reset:
            row, column = np.divmod(start, self.seq_len + 1)
            inside = column < self.seq_len
            breaks = np.union1d(breaks, row[inside] * self.seq_len + column[inside])
        size = rows * self.seq_len
        begin = np.repeat(breaks, np.diff(breaks, append=size))
        return (np.arange(size, dtype=np.int64) - begin).reshape(rows, self.seq_len)
