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
from decimal import Decimal
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_mode.config.mix import MixConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.packing import ByteArray, PackedSource, RowTokens
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
    of = mix.role_weights
    given_weights = (Decimal(0), of.system, of.user, of.assistant, of.tool)
    by_role = dict(zip(ROLES, given_weights, strict=True))
    for role in ROLES:
        match mix.mode2_lm_loss:
            case "all":
                given = 1.0
            case "assistant":
                given = float(role == "assistant")
            case "weighted":
                given = float(by_role[role])
        weight[((flags & MODE2) != 0) & ((flags & ROLE_MASK) == role_bits(role))] = given
    weight[(flags & BLANK) != 0] = 0
    return weight


def ends_untrained() -> npt.NDArray[np.bool_]:
    """Return whether a flag byte is of a turn that is not trained: no stop is learned after it."""
    flags = np.arange(256)
    is_piece = (flags & (CONTROL | NO_MODE_LOSS)) == CONTROL | NO_MODE_LOSS
    is_own_account = is_piece & ((flags & ROLE_MASK) != 0)
    is_untrained = (flags & (MODE2 | NO_LM_LOSS)) == MODE2 | NO_LM_LOSS
    ends: npt.NDArray[np.bool_] = is_untrained & ~is_own_account
    return ends


class RowReader:
    """Turn (source, source row) into arrays; holds no state, so threads may share it."""

    def __init__(
        self,
        packed: Sequence[PackedSource],
        seq_len: int,
        mix: MixConfig,
        *,
        document_id: int | None = 0,
    ) -> None:
        """Read from `packed`, indexed as in Order.source_names, in rows of `seq_len` tokens.

        Raises ConfigError for a source that stands in the list of the other mode.
        """
        self.sources = [entry.source for entry in packed]
        for mode, section in ((1, mix.mode1), (2, mix.mode2)):
            names = {source.name for source in section.sources}
            for source in self.sources:
                if source.name in names and source.mode != mode:
                    raise ConfigError(
                        f"mix.mode{mode}.sources names '{source.name}', but that source was "
                        f"prepared as mode {source.mode}; move it to mix.mode{source.mode}.sources"
                    )
        self.seq_len = seq_len
        self._packed = packed
        self._document_id = document_id
        self._reset = mix.reset_at_documents
        self._judged = role_weights(mix)
        self._judged_stop = np.where(ends_untrained(), 0, self._judged)
        self._allowed = ((np.arange(256) & (NO_LM_LOSS | BLANK)) == 0).astype(np.float32)

    def read_batch(self, source_index: Sequence[int], source_row: Sequence[int]) -> ArrayBatch:
        """Read B rows: a few slices of memory-mapped files, then arithmetic on all at once.

        Raises DataError for a row that its source does not have.
        """
        parts = []
        for index, row in zip(source_index, source_row, strict=True):
            entry = self._packed[index]
            if not 0 <= row < entry.rows:
                raise DataError(
                    f"row {row} of source '{entry.source.name}' does not exist: it has "
                    f"{entry.source.tokens} tokens, {entry.rows} rows of {self.seq_len}; run again "
                    "with the data that the order was planned for"
                )
            parts.append(entry.read(row, self._document_id))
        return self._batch(parts, source_index)

    def read_windows(self, source_index: Sequence[int], begin_token: Sequence[int]) -> ArrayBatch:
        """Read B rows that begin at any token of their source with T + 1 tokens to go."""
        pairs = zip(source_index, begin_token, strict=True)
        parts = [self._packed[index].window(begin) for index, begin in pairs]
        return self._batch(parts, source_index)

    def _batch(self, parts: Sequence[RowTokens], source_index: Sequence[int]) -> ArrayBatch:
        width = self.seq_len + 1
        ids, flags = np.stack([part.ids for part in parts]), np.stack([p.flags for p in parts])
        start = np.concatenate([part.starts + b * width for b, part in enumerate(parts)])
        input_flags = np.ascontiguousarray(flags[:, :-1])
        return ArrayBatch(
            input_BT=np.ascontiguousarray(ids[:, :-1]),
            target_BT=np.ascontiguousarray(ids[:, 1:]),
            lm_weight_BT=self._lm_weights(flags, start),
            mode_label_BT=(input_flags & MODE2).astype(np.float32),
            mode_weight_BT=((input_flags & NO_MODE_LOSS) == 0).astype(np.float32),
            position_BT=self._positions(len(parts), start),
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
