"""Hold what the implementations take beside hidden states and heads, and what they return.

The hidden states are never copied for an order of tokens: targets [B, T] follow them instead.

Letters: B rows, T row length, N = B*T tokens, D hidden size, n tokens with an LM weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import Blocking, Targets, VocabShard


@dataclass(frozen=True)
class TokenGrid:
    """Hold the shape of the targets and the order of the tokens."""

    shape: tuple[int, ...]
    """(B, T), or (N,) beside hidden_ND."""
    rows_first: bool
    """Token order is (B, T) rather than (T, B)."""

    @classmethod
    def of(cls, hidden_TBD: Tensor, sequence_shards: int) -> TokenGrid:
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
        """Return values of the tokens in the shape of the targets."""
        return value_N.view(self.shape) if self.rows_first else value_N.view(self.shape[::-1]).T

    def rows(self, value_N: Tensor) -> Tensor:
        """Return values of the tokens as [B, T]; [1, N] beside hidden_ND."""
        return value_N[None] if len(self.shape) == 1 else self.unflatten(value_N)


class TokenTargets(NamedTuple):
    """Hold the targets in the token order of hidden_ND, weights in the accumulation dtype."""

    target_N: Tensor
    lm_weight_N: Tensor
    mode_label_N: Tensor
    mode_weight_N: Tensor
    lm_rows_n: Tensor | None

    @classmethod
    def of(cls, targets: Targets, grid: TokenGrid, dtype: torch.dtype) -> TokenTargets:
        """Return the targets of a call."""

        # Contiguous: the kernels walk them by index, and a slice or an expanded value is strided.
        def flat(value_BT: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return grid.flatten(value_BT).detach().to(dtype).contiguous()

        row_n = targets.lm_rows_n
        if row_n is not None and not grid.rows_first:
            rows, length = grid.shape
            row_n = row_n % length * rows + row_n // length
        return cls(
            flat(targets.target_BT, torch.int64),
            flat(targets.lm_weight_BT),
            flat(targets.mode_label_BT),
            flat(targets.mode_weight_BT),
            row_n,
        )

    def lm_tokens(self, hidden_ND: Tensor, weight_N: Tensor) -> LmTokens:
        """Return the tokens that the loader named, or all, their hidden states cleared of NaN.

        A token of weight 0 may hold NaN, and 0 * NaN would reach the gradient of the LM weight.
        """
        tokens = LmTokens.of(hidden_ND, self.target_N, weight_N, self.lm_rows_n)
        cleared_nD = torch.where(tokens.weight_n[:, None] != 0, tokens.hidden_nD, 0)
        return tokens._replace(hidden_nD=cleared_nD)


class LmTokens(NamedTuple):
    """Hold the tokens of the LM loss, with their weights after blocking."""

    hidden_nD: Tensor
    target_n: Tensor
    weight_n: Tensor
    rows_n: Tensor | None
    """Their indices into hidden_ND; None: all of them."""

    @classmethod
    def of(
        cls, hidden_ND: Tensor, target_N: Tensor, weight_N: Tensor, rows_n: Tensor | None
    ) -> LmTokens:
        """Return the tokens `rows_n`, or all."""
        if rows_n is None:
            return cls(hidden_ND, target_N, weight_N, None)
        return cls(hidden_ND[rows_n], target_N[rows_n], weight_N[rows_n], rows_n)

    def spread(self, value_n: Tensor, tokens: int) -> Tensor:
        """Put the values of these tokens among zeros."""
        if self.rows_n is None:
            return value_n
        spread_N = value_n.new_zeros(tokens, *value_n.shape[1:])
        return spread_N.index_copy_(0, self.rows_n, value_n)


class Wants(NamedTuple):
    """Say which inputs need a gradient."""

    hidden: bool
    lm_weight: bool
    mode_weight: bool
    mode_bias: bool


@dataclass(frozen=True)
class Choices:
    """Hold everything of a call that is no tensor."""

    grid: TokenGrid
    shard: VocabShard
    wants: Wants
    z_weight: float
    blocking: Blocking | None
    keep_logits_bytes: int


class TokenLosses(NamedTuple):
    """Hold the values of LossOutput in the token order of hidden_ND; only the sums have a graph."""

    lm_sum: Tensor
    mode_sum: Tensor
    z_loss_sum: Tensor
    nll_N: Tensor
    bce_N: Tensor
    mode_logit_N: Tensor
    blocked_N: Tensor


def accumulation_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums: fp64 for fp64 hidden states, else fp32."""
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
