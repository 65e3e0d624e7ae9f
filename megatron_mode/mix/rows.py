"""Read rows of prepared sources: ids and targets, loss weights, mode labels, positions.

A row has T + 1 tokens (`packing` says which): T inputs and, one to the right, T targets. What a
token means is written in its flag byte, so weights are functions of flags:

    lm_weight[t]    from the target's flags: 0 for NO_LM_LOSS, and for Mode 2 tokens the weight of
                    their role under mix.mode2_lm_loss. Where the target starts the next document,
                    the input's role decides instead: a document's last token learns to stop
                    exactly as much as it was itself worth learning; not at all at the end of
                    a turn that is not trained (NO_LM_LOSS; on a mode piece only without a role,
                    since it carries the flag on its own account).
    mode_label[t]   the mode of the document that the input belongs to
    mode_weight[t]  from the input's flags: 0 for NO_MODE_LOSS

Padding and dropped documents (BLANK) take no loss of either kind.

Letters: B rows read together, T row length (`seq_len`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_mode.config.mix import MixConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.packing import (
    ByteArray,
    Packing,
    TokenSource,
    read_pieces,
    rows_in_stream,
)
from megatron_mode.tokens.flags import (
    BLANK,
    CONTROL,
    MODE2,
    NO_LM_LOSS,
    NO_MODE_LOSS,
    ROLE_MASK,
    ROLES,
    role_bits,
)

Float32Array = npt.NDArray[np.float32]
Array = TypeVar("Array")


class Batch(NamedTuple, Generic[Array]):
    """Hold B rows of T tokens: numpy arrays as read, tensors as the loader gives them.

    Weights and labels are float32, flags uint8, the others int64. A new field needs a line here and
    one in `RowReader._batch`: it then travels to the loss and the metrics.
    """

    input_BT: Array
    target_BT: Array
    lm_weight_BT: Array
    mode_label_BT: Array
    mode_weight_BT: Array
    position_BT: Array
    """0 where attention restarts."""
    flags_BT: Array
    source_B: Array
    """Index of each row's source among those of the reader."""


ArrayBatch = Batch[npt.NDArray[Any]]


def role_weights(mix: MixConfig) -> Float32Array:
    """Return the LM weight of each of the 256 flag bytes; Mode 1 always has 1."""
    flags = np.arange(256)
    weight = np.ones(256, np.float32)
    if mix.mode2_lm_loss != "all":
        given_weights = mix.role_weights
        by_role = {
            "system": given_weights.system,
            "user": given_weights.user,
            "assistant": given_weights.assistant,
            "tool": given_weights.tool,
        }
        for role in ROLES:
            given = float(by_role.get(role, 0))
            if mix.mode2_lm_loss == "assistant":
                given = float(role == "assistant")
            weight[((flags & MODE2) != 0) & ((flags & ROLE_MASK) == role_bits(role))] = given
    weight[(flags & BLANK) != 0] = 0
    return weight


def ends_untrained() -> Float32Array:
    """Return 0 for flag bytes of a turn that is not trained, after which no stop is learnt."""
    flags = np.arange(256)
    untrained = (flags & (MODE2 | NO_LM_LOSS)) == MODE2 | NO_LM_LOSS
    is_piece = (flags & (CONTROL | NO_MODE_LOSS)) == CONTROL | NO_MODE_LOSS
    is_own_account = is_piece & ((flags & ROLE_MASK) != 0)
    weight: Float32Array = (~(untrained & ~is_own_account)).astype(np.float32)
    return weight


class RowReader:
    """Turn (source, source row) into arrays; holds no state, so threads may share it."""

    def __init__(
        self,
        sources: Sequence[TokenSource],
        seq_len: int,
        mix: MixConfig,
        *,
        packings: Sequence[Packing | None] = (),
        document_id: int | None = 0,
    ) -> None:
        """Read from `sources`, indexed as in Order.source_names, in rows of `seq_len` tokens.

        `packings` stands beside the sources, None for a stream. Raises ConfigError for a source
        that stands in the list of the other mode.
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
        self.packings = tuple(packings) or (None,) * len(self.sources)
        self.seq_len = seq_len
        self._document_id = document_id
        self._reset = mix.reset_at_documents
        self._judged = role_weights(mix)
        self._judged_stop = self._judged * ends_untrained()
        flags = np.arange(256)
        self._allowed = ((flags & (NO_LM_LOSS | BLANK)) == 0).astype(np.float32)

    def rows(self, source_index: int) -> int:
        """Return the number of rows of a source."""
        packing = self.packings[source_index]
        if packing is not None:
            return packing.rows
        return rows_in_stream(self.sources[source_index].tokens, self.seq_len)

    def read_batch(self, source_index: Sequence[int], source_row: Sequence[int]) -> ArrayBatch:
        """Read B rows: a few slices of memory-mapped files, then arithmetic on all at once.

        Raises DataError for a row that its source does not have.
        """
        parts = []
        for index, row in zip(source_index, source_row, strict=True):
            if not 0 <= row < self.rows(index):
                source = self.sources[index]
                raise DataError(
                    f"row {row} of source '{source.name}' does not exist: it has {source.tokens} "
                    f"tokens, {self.rows(index)} rows of {self.seq_len}; run again with the data "
                    "that the order was planned for"
                )
            parts.append(self._read_row(index, row))
        return self._batch(parts, source_index)

    def read_windows(self, source_index: Sequence[int], begin_token: Sequence[int]) -> ArrayBatch:
        """Read B rows that begin at any token of their source with T + 1 tokens to go."""
        pairs = zip(source_index, begin_token, strict=True)
        return self._batch([self._window(index, begin) for index, begin in pairs], source_index)

    def _read_row(self, index: int, row: int) -> tuple[IntArray, ByteArray, IntArray]:
        packing = self.packings[index]
        if packing is None:
            return self._window(index, row * self.seq_len)
        pieces = packing.pieces(row)
        return read_pieces(self.sources[index], pieces, self.seq_len, self._document_id)

    def _window(self, index: int, begin: int) -> tuple[IntArray, ByteArray, IntArray]:
        source, end = self.sources[index], begin + self.seq_len + 1
        ids, flags = source.read(begin, end)
        return ids, flags, source.document_starts(begin, end) - begin

    def _batch(
        self,
        parts: Sequence[tuple[IntArray, ByteArray, IntArray]],
        source_index: Sequence[int],
    ) -> ArrayBatch:
        rows, width = len(parts), self.seq_len + 1
        ids = np.empty((rows, width), np.int64)
        flags = np.empty((rows, width), np.uint8)
        starts = [np.empty(0, np.int64)]
        for b, (row_ids, row_flags, row_starts) in enumerate(parts):
            ids[b], flags[b] = row_ids, row_flags
            starts.append(row_starts + b * width)
        start = np.concatenate(starts)
        input_flags = np.ascontiguousarray(flags[:, :-1])
        return ArrayBatch(
            input_BT=np.ascontiguousarray(ids[:, :-1]),
            target_BT=np.ascontiguousarray(ids[:, 1:]),
            lm_weight_BT=self._lm_weights(flags, start),
            mode_label_BT=(input_flags & MODE2).astype(np.float32),
            mode_weight_BT=((input_flags & NO_MODE_LOSS) == 0).astype(np.float32),
            position_BT=self._positions(rows, start),
            flags_BT=input_flags,
            source_B=np.array(source_index, np.int64),
        )

    def _lm_weights(self, flags: ByteArray, start: IntArray) -> Float32Array:
        """Weigh targets; `start` are document starts as flat offsets into flags [B, T + 1]."""
        judged = self._judged[flags].reshape(-1)
        final = start[start % (self.seq_len + 1) != 0]
        judged[final] = self._judged_stop[flags.reshape(-1)[final - 1]]
        weight = self._allowed[flags] * judged.reshape(flags.shape)
        return np.ascontiguousarray(weight[:, 1:])

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
