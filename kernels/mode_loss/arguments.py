"""Describe and check what the LM + mode loss takes: targets, vocabulary shard, blocking.

Letters: B rows, T row length, N = B*T tokens, D hidden size, V vocabulary columns of this shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = FLOAT_DTYPES[1:]
Implementation = Literal["triton", "chunked", "reference"]


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
    lm_rows_n: Tensor | None = None
    """Indices b * T + t of the tokens with an LM weight, int64, from the loader, which knows the
    masks on the host. On a GPU the others then cost no FLOPs; None computes all, because finding
    them there would make the host wait. A CPU looks for itself."""


@dataclass(frozen=True)
class VocabShard:
    """Place the local rows of the LM head in the vocabulary; the default is all of it.

    The shard holds columns [start, start + rows of lm_weight); those at or beyond `vocab_size` are
    padding and stay out of the softmax.
    """

    start: int = 0
    """First vocabulary column of the shard."""
    vocab_size: int | None = None
    """Columns of the full vocabulary without padding; None: the local rows end it."""
    ranks: int = 1
    """Shards of the vocabulary; sets the chunk size, which must be equal on all of them."""
    merge: Callable[[Tensor], Tensor] | None = None
    """Partial (maximum, sum of exponentials, target logit) [3, n] of this shard to that of all
    shards, with the same bits on every rank; None: there is one shard."""
    reduce: Callable[[Tensor], Tensor] | None = None
    """Gradient of the hidden states [N, D] of this shard to that of all shards; under sequence
    parallelism only this rank's tokens [N / ranks, D] of it. None: there is one shard."""
    gather: Callable[[Tensor], Tensor] | None = None
    """Hidden states [N / ranks, D] of this rank's tokens to all of them [N, D]; None: they are
    replicated. Tokens are cut along T, so hidden states [T / ranks, B, D] are in order T, B."""
    own_share: int | None = None
    """Which of `ranks` equal parts of the tokens is this rank's under sequence parallelism; None:
    all of them."""

    def all_tokens(self, own_ND: Tensor) -> Tensor:
        """Return the hidden states of all tokens."""
        return own_ND if self.gather is None else self.gather(own_ND)

    def own_tokens(self, value_N: Tensor) -> Tensor:
        """Return the values of this rank's tokens."""
        return value_N if self.own_share is None else value_N.chunk(self.ranks)[self.own_share]

    def real_columns(self, local_columns: int) -> int:
        """Count the columns of the shard that are not padding."""
        if self.vocab_size is None:
            return local_columns
        return min(max(self.vocab_size - self.start, 0), local_columns)


@dataclass(frozen=True)
class Blocking:
    """Say which tokens lose which loss; their effective weight becomes 0.

    A blocked token is found on the device and saves no FLOPs on a GPU.
    """

    threshold: float
    """Logit of the wrong mode, log(tau / (1 - tau)), above which a token is a candidate."""
    watch_mode1: bool
    """Watch Mode 1 tokens that the head calls Mode 2."""
    watch_mode2: bool
    """Watch Mode 2 tokens (label of 0.5 and above) that the head calls Mode 1."""
    cap: tuple[int, int]
    """Largest blocked share of a row's valid tokens, as numerator and denominator."""
    lm: bool
    """Blocked tokens lose the LM loss."""
    mode: bool
    """Blocked tokens lose the mode loss."""

    @property
    def capped(self) -> bool:
        """Return whether the cap can spare a candidate."""
        return self.cap[0] < self.cap[1]


class TargetRangeError(ValueError):
    """Report a target outside the vocabulary at a token whose LM weight is not zero."""


def validate_heads(
    hidden_TBD: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
    implementation: str,
) -> None:
    """Check the implementation, and shapes, dtypes and devices of hidden states and heads.

    Raises ValueError for a name, shape or device and TypeError for a dtype, naming argument,
    value, expectation.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation is {implementation!r}; expected triton, chunked or reference."
        )
    device, dtype = hidden_TBD.device, hidden_TBD.dtype
    _check(
        "hidden", hidden_TBD, device, TRITON_DTYPES if implementation == "triton" else FLOAT_DTYPES
    )
    if hidden_TBD.dim() not in (2, 3):
        _refuse_shape("hidden", hidden_TBD, "[T, B, D] or [N, D]")
    hidden_size = hidden_TBD.shape[-1]
    _check("lm_weight", lm_weight_VD, device, (dtype,), ("V", hidden_size))
    if mode_weight_D is None or mode_bias is None:
        if mode_weight_D is not None or mode_bias is not None:
            raise ValueError("mode_weight and mode_bias: expected both, or None for both.")
        return
    _check("mode_weight", mode_weight_D, device, FLOAT_DTYPES, (hidden_size,))
    _check("mode_bias", mode_bias, device, FLOAT_DTYPES)
    if mode_bias.numel() != 1:
        _refuse_shape("mode_bias", mode_bias, "one element")


def validate_targets(targets: Targets, shape: tuple[int, ...], device: torch.device) -> None:
    """Check shapes, dtypes and devices of the targets against the tokens of the hidden states.

    Raises ValueError for a shape or device, TypeError for a dtype.
    """
    _check("target", targets.target_BT, device, (torch.int64, torch.int32), shape)
    _check("lm_weight of the tokens", targets.lm_weight_BT, device, None, shape)
    _check("mode_label", targets.mode_label_BT, device, None, shape)
    _check("mode_weight of the tokens", targets.mode_weight_BT, device, None, shape)
    lm_rows_n, tokens = targets.lm_rows_n, math.prod(shape)
    if lm_rows_n is None:
        return
    _check("lm_rows", lm_rows_n, device, (torch.int64,), ("n",))
    if device.type == "cpu" and len(lm_rows_n):  # a GPU checks an index where it is used
        first, last = int(lm_rows_n.min()), int(lm_rows_n.max())
        if first < 0 or last >= tokens:
            raise ValueError(f"lm_rows holds {first} to {last}; accepted are 0 to {tokens - 1}.")


def validate_range(targets: Targets, vocab_size: int) -> None:
    """Raise TargetRangeError for the first target outside the vocabulary whose weight is not 0.

    On a GPU the check runs on the device (`torch._assert_async`), so that the host does not wait:
    the process ends with a CUDA assertion at a later call.
    """
    target_BT = targets.target_BT
    outside_BT = ((target_BT < 0) | (target_BT >= vocab_size)) & (targets.lm_weight_BT != 0)
    if target_BT.device.type != "cpu":
        torch._assert_async(~outside_BT.any(), f"a target is not within 0 to {vocab_size - 1}")
    elif bool(outside_BT.any()):
        index = outside_BT.nonzero()[0].tolist()
        raise TargetRangeError(
            f"target{index} is {int(target_BT[tuple(index)])}; accepted are 0 to "
            f"{vocab_size - 1}: mend the token or give it LM weight 0."
        )


def _check(
    name: str,
    value: Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] | None,
    shape: tuple[int | str, ...] | None = None,
) -> None:
    """Check a tensor; a letter in `shape` stands for any size."""
    if dtypes is not None and value.dtype not in dtypes:
        accepted = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}; expected {accepted}.")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; expected {device}, where hidden is.")
    if shape is not None and (
        value.dim() != len(shape)
        or any(
            isinstance(size, int) and size != n for size, n in zip(shape, value.shape, strict=True)
        )
    ):
        _refuse_shape(name, value, f"[{', '.join(map(str, shape))}]")


def _refuse_shape(name: str, value: Tensor, expected: str) -> NoReturn:
    raise ValueError(f"{name} has shape {list(value.shape)}; expected {expected}.")
