"""Hold what the implementations are told beside tensors, and pick the tokens of the LM loss.

Letters: N tokens, n tokens with an LM weight, D hidden size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import Blocking, TokenTargets, VocabShard
from megatron_mode.kernels.mode_loss.layout import TokenGrid

Implementation = Literal["triton", "chunked", "reference"]


class Wants(NamedTuple):
    """Say which inputs need a gradient."""

    hidden: bool
    lm_weight: bool
    mode_weight: bool
    mode_bias: bool


class ModeHead(NamedTuple):
    """Hold the mode head: weight [D] and bias of one element."""

    weight_D: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Plan:
    """Hold the choices of one call."""

    implementation: Implementation
    grid: TokenGrid
    shard: VocabShard
    wants: Wants
    z_weight: float = 0.0
    blocking: Blocking | None = None
    logits_bytes: int | None = None
    """Budget of the logits buffer of `chunked`; None: by device."""
    keep_logits_bytes: int = 0
    """Largest logits that `triton` keeps for the backward pass instead of computing them again."""
    check_targets: bool = False
    """Check the range of targets on a GPU too, on the device."""


class LmTokens(NamedTuple):
    """Hold the tokens of the LM loss."""

    hidden_nD: Tensor
    target_n: Tensor
    weight_n: Tensor
    rows_n: Tensor | None
    """Their indices into hidden_ND; None: all of them."""

    def spread(self, value_n: Tensor, tokens: int) -> Tensor:
        """Put the values of these tokens among zeros."""
        if self.rows_n is None:
            return value_n
        spread_N = value_n.new_zeros(tokens, *value_n.shape[1:])
        return spread_N.index_copy_(0, self.rows_n, value_n)


def lm_tokens(hidden_ND: Tensor, targets: TokenTargets, weight_N: Tensor) -> LmTokens:
    """Return the tokens that the loader named, or all, their hidden states cleared of NaN.

    A token of weight 0 may hold NaN, and 0 * NaN would reach the gradient of the LM weight.
    """
    rows_n = targets.lm_rows_n
    if rows_n is not None:
        hidden_nD, target_n, weight_n = (
            hidden_ND[rows_n],
            targets.target_N[rows_n],
            weight_N[rows_n],
        )
    else:
        hidden_nD, target_n, weight_n = hidden_ND, targets.target_N, weight_N
    hidden_nD = torch.where(weight_n[:, None] != 0, hidden_nD, 0)
    return LmTokens(hidden_nD, target_n, weight_n, rows_n)


def active_lm_tokens(hidden_ND: Tensor, targets: TokenTargets, weight_N: Tensor) -> LmTokens:
    """Return the tokens with a weight; a CPU looks for them, a GPU would have to wait."""
    if weight_N.device.type != "cpu":
        return lm_tokens(hidden_ND, targets, weight_N)
    rows_n = weight_N.nonzero().squeeze(1)
    if len(rows_n) == len(weight_N):
        return LmTokens(hidden_ND, targets.target_N, weight_N, None)
    return LmTokens(hidden_ND[rows_n], targets.target_N[rows_n], weight_N[rows_n], rows_n)


def keeps_logits(plan: Plan, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Tell whether `triton` keeps the logits for the backward pass."""
    wanted = plan.wants.hidden or plan.wants.lm_weight
    fits = rows * columns * dtype.itemsize <= plan.keep_logits_bytes
    return plan.implementation == "triton" and wanted and rows * columns > 0 and fits


def launch_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the tensor's GPU the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
