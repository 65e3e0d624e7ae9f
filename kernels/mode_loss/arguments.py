"""Describe and check what the LM + mode loss takes: targets, vocabulary shard, blocking.

Letters: B rows, T row length, N = B*T tokens, D hidden size, V vocabulary columns of this shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)


class TargetRangeError(ValueError):
    """Report a target outside the vocabulary at a token whose LM weight is not zero."""


@dataclass(frozen=True)
class Targets:
    """Hold what the tokens of a micro-batch are judged by; [B, T] each, or [N] beside hidden_ND."""

    target_BT: Tensor
    """Ids of the tokens to predict, int32 or int64; any value where lm_weight_BT is 0."""
    lm_weight_BT: Tensor
    """Weight a_i of the token's negative log-likelihood."""
    mode_label_BT: Tensor
    """Mode label m_i, 0 (Mode 1) to 1 (Mode 2); fractions are allowed."""
    mode_weight_BT: Tensor
    """Weight c_i of the token's mode cross-entropy."""


@dataclass(frozen=True)
class TokenTargets:
    """Hold the targets in the token order of hidden_ND, weights after blocking, in one dtype."""

    target_N: Tensor
    lm_weight_N: Tensor
    mode_label_N: Tensor
    mode_weight_N: Tensor


@dataclass(frozen=True)
class VocabShard:
    """Place the local rows of the LM head in the vocabulary; the default is the whole of it.

    The shard holds columns [start, start + rows of lm_weight); those at or beyond `vocab_size` are
    padding and stay out of the softmax.
    """

    start: int = 0
    """First vocabulary column of the shard."""
    vocab_size: int | None = None
    """Columns of the whole vocabulary without padding; None: the local rows end it."""
    ranks: int = 1
    """Shards of the vocabulary; sets the chunk size, which must be equal on all of them."""
    merge: Callable[[Tensor], Tensor] | None = None
    """Partial (maximum, sum of exponentials, target logit) [3, n] of this shard to that of all
    shards, with the same bits on every rank; None: the shard is whole."""
    reduce: Callable[[Tensor], None] | None = None
    """Sum a tensor over the shards in place; None: the shard is whole."""

    def real_columns(self, local_columns: int) -> int:
        """Count the columns of the shard that are not padding."""
        if self.vocab_size is None:
            return local_columns
        return min(max(self.vocab_size - self.start, 0), local_columns)


@dataclass(frozen=True)
class Blocking:
    """Say which tokens lose which loss; their effective weight becomes 0."""

    select: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(mode_logit_BT, mode_label_BT, mode_weight_BT) to a bool mask of the blocked tokens."""
    lm: bool
    """Blocked tokens lose the LM loss."""
    mode: bool
    """Blocked tokens lose the mode loss."""


def check_heads(
    hidden_TBD: Tensor, lm_weight_VD: Tensor, mode_weight_D: Tensor, mode_bias: Tensor
) -> None:
    """Check shapes and dtypes of the hidden states and of both heads.

    Raises ValueError for a shape and TypeError for a dtype, naming argument, value, expectation.
    """
    _check_dtype("hidden", hidden_TBD, FLOAT_DTYPES)
    _check_dtype("lm_weight", lm_weight_VD, (hidden_TBD.dtype,))
    _check_dtype("mode_weight", mode_weight_D, FLOAT_DTYPES)
    _check_dtype("mode_bias", mode_bias, FLOAT_DTYPES)
    if hidden_TBD.dim() not in (2, 3):
        raise ValueError(
            f"hidden has shape {list(hidden_TBD.shape)}; expected [T, B, D] or [N, D]."
        )
    hidden_size = hidden_TBD.shape[-1]
    if lm_weight_VD.dim() != 2 or lm_weight_VD.shape[1] != hidden_size:
        raise ValueError(
            f"lm_weight has shape {list(lm_weight_VD.shape)}; expected [V, {hidden_size}], "
            "with the hidden size of hidden."
        )
    _check_shape("mode_weight", mode_weight_D, (hidden_size,))
    if mode_bias.numel() != 1:
        raise ValueError(f"mode_bias has shape {list(mode_bias.shape)}; expected one element.")


def check_targets(targets: Targets, shape: tuple[int, ...], shard: VocabShard) -> None:
    """Check the targets against the tokens of the hidden states and against the vocabulary.

    The range is checked on a CPU only: on a GPU it would make the host wait for the device.
    Raises ValueError for a shape, TypeError for a dtype, TargetRangeError for a target.
    """
    _check_dtype("target", targets.target_BT, INDEX_DTYPES)
    _check_shape("target", targets.target_BT, shape)
    _check_shape("lm_weight of the tokens", targets.lm_weight_BT, shape)
    _check_shape("mode_label", targets.mode_label_BT, shape)
    _check_shape("mode_weight of the tokens", targets.mode_weight_BT, shape)
    if targets.target_BT.device.type != "cpu" or shard.vocab_size is None:
        return
    outside_BT = (targets.target_BT < 0) | (targets.target_BT >= shard.vocab_size)
    outside_BT &= targets.lm_weight_BT != 0
    if bool(outside_BT.any()):
        position = tuple(int(index) for index in outside_BT.nonzero()[0])
        raise TargetRangeError(
            f"target{list(position)} is {int(targets.target_BT[position])}; accepted are 0 to "
            f"{shard.vocab_size - 1}: mend the token or give it LM weight 0."
        )


def _check_dtype(name: str, value: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in accepted:
        names = ", ".join(str(dtype) for dtype in accepted)
        raise TypeError(f"{name} has dtype {value.dtype}; expected {names}.")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)}.")
