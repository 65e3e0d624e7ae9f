"""Map tokens between [B, T] and the order of hidden_ND without copying the hidden states.

Letters: B rows, T row length, N = B*T tokens, D hidden size, n tokens with an LM weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """Hold the shape of the targets and the order of the tokens."""

    shape: tuple[int, ...]
    """(B, T), or (N,) beside hidden_ND."""
    rows_first: bool
    """Token order is (B, T) rather than (T, B)."""

    @classmethod
    def of(cls, hidden_TBD: Tensor, sequence_shards: int = 1) -> TokenGrid:
        """Return the grid of hidden states [T / sequence_shards, B, D] or [N / shards, D]."""
        if hidden_TBD.dim() == 2:
            return cls((hidden_TBD.shape[0] * sequence_shards,), rows_first=True)
        length, rows, _ = hidden_TBD.shape
        rows_first = (
            sequence_shards == 1
            and not hidden_TBD.is_contiguous()
            and hidden_TBD.transpose(0, 1).is_contiguous()
        )
        return cls((rows, length * sequence_shards), rows_first)

    def flatten_hidden(self, hidden_TBD: Tensor) -> Tensor:
        """Return the hidden states as [N, D]."""
        if hidden_TBD.dim() == 2:
            return hidden_TBD
        ordered = hidden_TBD.transpose(0, 1) if self.rows_first else hidden_TBD
        return ordered.reshape(-1, hidden_TBD.shape[-1])

    def flatten(self, value_BT: Tensor) -> Tensor:
        """Return values of the tokens in the order of hidden_ND."""
        return (value_BT if self.rows_first else value_BT.T).reshape(-1)

    def unflatten(self, value_N: Tensor) -> Tensor:
        """Return values of the tokens as [B, T]."""
        if self.rows_first:
            return value_N.view(self.shape)
        return value_N.view(self.shape[::-1]).T

    def flatten_rows(self, row_n: Tensor) -> Tensor:
        """Return indices b * T + t as indices into hidden_ND."""
        if self.rows_first:
            return row_n
        rows, length = self.shape
        return row_n % length * rows + row_n // length

    def name(self, index: int) -> list[int]:
        """Return the index in the targets of token `index` of hidden_ND."""
        if len(self.shape) == 1:
            return [index]
        rows, length = self.shape
        return (
            [index // length, index % length] if self.rows_first else [index % rows, index // rows]
        )
