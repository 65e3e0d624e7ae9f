"""Describe and check what the LM + mode loss takes: targets, vocabulary shard, blocking.

Letters: B rows, T row length, N = B*T tokens, D hidden size, V vocabulary columns of this shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)
Naming = Callable[[int], list[int]]
"""The index of a token in hidden_ND to its index in the targets, for messages."""


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
    lm_rows_n: Tensor | None = None
    """Indices b * T + t of the tokens with an LM weight, int64, from the loader, which knows the
    masks on the host. On a GPU the others then cost no FLOPs; None computes all, because finding
    them there would make the host wait. A CPU looks for itself."""


@dataclass(frozen=True)
class TokenTargets:
    """Hold the targets in the token order of hidden_ND, weights in the accumulation dtype."""

    target_N: Tensor
    lm_weight_N: Tensor
    mode_label_N: Tensor
    mode_weight_N: Tensor
    lm_rows_n: Tensor | None


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
    reduce: Callable[[Tensor], Tensor] | None = None
    """Gradient of the hidden states [N, D] of this shard to that of all shards; under sequence
    parallelism only this rank's tokens [N / ranks, D] of it. None: the shard is whole."""
    gather: Callable[[Tensor], Tensor] | None = None
    """Hidden states [N / ranks, D] of this rank's tokens to all of them [N, D]; None: they are
    replicated. Tokens are cut along T, so hidden states [T / ranks, B, D] are in order T, B."""
    own_share: int | None = None
    """Which of `ranks` equal parts of the tokens is this rank's under sequence parallelism; None:
    all of them."""

    @property
    def whole(self) -> bool:
        """Tell whether no other rank holds a part."""
        return self.merge is None and self.reduce is None and self.gather is None

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
        """Tell whether the cap can spare a candidate."""
        return self.cap[0] < self.cap[1]


def check_heads(
    hidden_TBD: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
) -> None:
    """Check shapes, dtypes and devices of the hidden states and of both heads.

    Raises ValueError for a shape or device and TypeError for a dtype, naming argument, value,
    expectation.
    """
    _check_dtype("hidden", hidden_TBD, FLOAT_DTYPES)
    _check_dtype("lm_weight", lm_weight_VD, (hidden_TBD.dtype,))
    _check_device("lm_weight", lm_weight_VD, hidden_TBD.device)
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
    if mode_weight_D is None or mode_bias is None:
        if mode_weight_D is not None or mode_bias is not None:
            raise ValueError("mode_weight and mode_bias: expected both, or None for both.")
        return
    for name, value in (("mode_weight", mode_weight_D), ("mode_bias", mode_bias)):
        _check_dtype(name, value, FLOAT_DTYPES)
        _check_device(name, value, hidden_TBD.device)
    _check_shape("mode_weight", mode_weight_D, (hidden_size,))
    if mode_bias.numel() != 1:
        raise ValueError(f"mode_bias has shape {list(mode_bias.shape)}; expected one element.")


def check_targets(targets: Targets, shape: tuple[int, ...], device: torch.device) -> None:
    """Check shapes, dtypes and devices of the targets against the tokens of the hidden states.

    Raises ValueError for a shape or device, TypeError for a dtype.
    """
    _check_dtype("target", targets.target_BT, INDEX_DTYPES)
    _check_shape("target", targets.target_BT, shape)
    _check_shape("lm_weight of the tokens", targets.lm_weight_BT, shape)
    _check_shape("mode_label", targets.mode_label_BT, shape)
    _check_shape("mode_weight of the tokens", targets.mode_weight_BT, shape)
    for name in ("target", "lm_weight", "mode_label", "mode_weight"):
        _check_device(name, getattr(targets, f"{name}_BT"), device)
    if targets.lm_rows_n is not None:
        _check_dtype("lm_rows", targets.lm_rows_n, (torch.int64,))
        _check_device("lm_rows", targets.lm_rows_n, device)
        if targets.lm_rows_n.dim() != 1:
            raise ValueError(f"lm_rows has shape {list(targets.lm_rows_n.shape)}; expected [n].")
        _check_rows(targets.lm_rows_n, math.prod(shape))


def check_choices(
    implementation: str,
    hidden_TBD: Tensor,
    lm_weight_VD: Tensor,
    main_gradient_VD: Tensor | None,
) -> None:
    """Check the implementation against the inputs, and the buffer of the main gradient.

    Raises ValueError or TypeError naming argument, value, expectation.
    """
    if implementation not in ("triton", "chunked", "reference"):
        raise ValueError(
            f"implementation is {implementation!r}; expected triton, chunked or reference."
        )
    if implementation == "triton":
        _check_dtype("hidden", hidden_TBD, TRITON_DTYPES)
    if main_gradient_VD is None:
        return
    if implementation == "reference":
        raise ValueError("main_gradient is given to reference; expected triton or chunked.")
    _check_dtype("main_gradient", main_gradient_VD, (torch.float32,))
    _check_shape("main_gradient", main_gradient_VD, tuple(lm_weight_VD.shape))
    _check_device("main_gradient", main_gradient_VD, hidden_TBD.device)


def check_range(target_N: Tensor, lm_weight_N: Tensor, vocab_size: int, names: Naming) -> None:
    """Raise TargetRangeError for the first target outside the vocabulary whose weight is not 0.

    On a GPU the check runs on the device (`torch._assert_async`), so that the host does not wait:
    the process ends with a CUDA assertion at a later call.
    """
    outside_N = ((target_N < 0) | (target_N >= vocab_size)) & (lm_weight_N != 0)
    if target_N.device.type != "cpu":
        torch._assert_async(~outside_N.any(), f"a target lies outside 0 to {vocab_size - 1}")
    elif bool(outside_N.any()):
        index = int(outside_N.nonzero()[0])
        raise TargetRangeError(
            f"target{names(index)} is {int(target_N[index])}; accepted are 0 to "
            f"{vocab_size - 1}: mend the token or give it LM weight 0."
        )


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; expected {device}, where hidden is.")


def _check_rows(lm_rows_n: Tensor, tokens: int) -> None:
    """Check the range of the indices on a CPU; a GPU's own checks of an index hold there."""
    if lm_rows_n.device.type != "cpu" or torch.compiler.is_compiling() or not len(lm_rows_n):
        return
    first, last = int(lm_rows_n.min()), int(lm_rows_n.max())
    if first < 0 or last >= tokens:
        raise ValueError(f"lm_rows holds {first} to {last}; accepted are 0 to {tokens - 1}.")


def _check_dtype(name: str, value: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in accepted:
        names = ", ".join(str(dtype) for dtype in accepted)
        raise TypeError(f"{name} has dtype {value.dtype}; expected {names}.")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)}.")
