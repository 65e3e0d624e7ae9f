"""Open the one door to the LM + mode loss: layouts, autocast, checks, blocking, implementation.

Letters: B rows, T row length, N = B*T tokens, D hidden size, V vocabulary columns of this shard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import (
    Blocking,
    Targets,
    TokenTargets,
    VocabShard,
    check_heads,
    check_targets,
)
from megatron_mode.kernels.mode_loss.chunked import chunked_loss, chunked_mode_logit
from megatron_mode.kernels.mode_loss.reference import reference_loss, reference_mode_logit
from megatron_mode.kernels.mode_loss.results import TokenLosses, accumulation_dtype

Implementation = Literal["chunked", "reference"]
WHOLE_VOCABULARY = VocabShard()


@dataclass(frozen=True)
class LossOutput:
    """Hold both sums, each with its own gradient, and the losses of each token, detached.

    A token whose effective weight is 0 reports 0, so sum(a * nll) is lm_sum - z_loss_sum and
    sum(c * bce) is mode_sum, with or without blocking.
    """

    lm_sum: Tensor
    """sum a_i * (nll_i + z_weight * lse_i^2), differentiable."""
    mode_sum: Tensor
    """sum c_i * bce_i, differentiable."""
    z_loss_sum: Tensor
    """The part of lm_sum that is the z-loss."""
    nll_BT: Tensor
    """Negative log-likelihood of the target; 0 where the token has no LM loss."""
    bce_BT: Tensor
    """Cross-entropy of the mode; 0 where the token has no mode loss."""
    mode_logit_BT: Tensor
    """Mode logit z of every token that was given a mode weight, blocked or not; else 0."""
    blocked_BT: Tensor
    """Tokens that lost a loss to the blocking policy, bool."""


def mode_loss(
    hidden_TBD: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor,
    mode_bias: Tensor,
    targets: Targets,
    *,
    shard: VocabShard = WHOLE_VOCABULARY,
    z_weight: float = 0.0,
    blocking: Blocking | None = None,
    implementation: Implementation = "chunked",
    logits_bytes: int | None = None,
) -> LossOutput:
    """Return the weighted LM sum and mode sum of hidden states [T, B, D] or [N, D].

    Targets are [B, T], or [N] beside [N, D]; hidden states that are contiguous in either order of
    T and B are not copied. The mode logit and all sums are in fp32 (fp64 for fp64 inputs).
    `logits_bytes` bounds the logits buffer of `chunked`. With a sharded vocabulary the hidden
    states are replicated, the gradient of `hidden` and of the mode head are complete on every
    rank, and that of `lm_weight` is the shard's own.
    Raises ValueError or TypeError for a shape or dtype, TargetRangeError for a target (CPU).
    """
    device_type = hidden_TBD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_TBD, lm_weight_VD = hidden_TBD.to(dtype), lm_weight_VD.to(dtype)
    check_heads(hidden_TBD, lm_weight_VD, mode_weight_D, mode_bias)
    layout = _Layout.of(hidden_TBD)
    if shard.vocab_size is None:
        shard = replace(shard, vocab_size=shard.start + len(lm_weight_VD))
    check_targets(targets, layout.target_shape, shard)

    heads = (layout.flatten_hidden(hidden_TBD), lm_weight_VD, mode_weight_D, mode_bias)
    # The dtypes are chosen above: autocast would round the fp32 mode logit and statistics.
    with torch.autocast(device_type, enabled=False):
        blocked_BT = _blocked(heads, targets, blocking, implementation, layout)
        tokens = _effective_targets(targets, blocked_BT, blocking, layout, heads[0])
        if implementation == "reference":
            losses = reference_loss(*heads, tokens, shard=shard, z_weight=z_weight)
        else:
            losses = chunked_loss(
                *heads, tokens, shard=shard, z_weight=z_weight, logits_bytes=logits_bytes
            )
    return _output(losses, targets, blocked_BT, layout)


@dataclass(frozen=True)
class _Layout:
    """Map [T, B] tokens of the hidden states to N and back without copying the hidden states."""

    target_shape: tuple[int, ...]
    rows_first: bool
    """Token order is (B, T) rather than (T, B)."""

    @classmethod
    def of(cls, hidden_TBD: Tensor) -> _Layout:
        if hidden_TBD.dim() == 2:
            return cls(tuple(hidden_TBD.shape[:1]), rows_first=True)
        length, rows, _ = hidden_TBD.shape
        rows_first = not hidden_TBD.is_contiguous() and hidden_TBD.transpose(0, 1).is_contiguous()
        return cls((rows, length), rows_first)

    def flatten_hidden(self, hidden_TBD: Tensor) -> Tensor:
        if hidden_TBD.dim() == 2:
            return hidden_TBD
        ordered = hidden_TBD.transpose(0, 1) if self.rows_first else hidden_TBD
        return ordered.reshape(-1, hidden_TBD.shape[-1])

    def flatten(self, value_BT: Tensor) -> Tensor:
        return (value_BT if self.rows_first else value_BT.T).reshape(-1)

    def unflatten(self, value_N: Tensor) -> Tensor:
        if self.rows_first:
            return value_N.view(self.target_shape)
        return value_N.view(self.target_shape[::-1]).T


def _blocked(
    heads: tuple[Tensor, Tensor, Tensor, Tensor],
    targets: Targets,
    blocking: Blocking | None,
    implementation: Implementation,
    layout: _Layout,
) -> Tensor:
    """Return the mask of blocked tokens; costs one more product with the mode weight."""
    if blocking is None:
        return torch.zeros_like(targets.target_BT, dtype=torch.bool)
    mode_logit = reference_mode_logit if implementation == "reference" else chunked_mode_logit
    with torch.no_grad():
        logit_BT = layout.unflatten(mode_logit(heads[0], heads[2], heads[3]))
        return blocking.select(logit_BT, targets.mode_label_BT, targets.mode_weight_BT)


def _effective_targets(
    targets: Targets,
    blocked_BT: Tensor,
    blocking: Blocking | None,
    layout: _Layout,
    hidden_ND: Tensor,
) -> TokenTargets:
    dtype = accumulation_dtype(hidden_ND)
    lm_weight_BT, mode_weight_BT = targets.lm_weight_BT, targets.mode_weight_BT
    if blocking is not None and blocking.lm:
        lm_weight_BT = lm_weight_BT.masked_fill(blocked_BT, 0)
    if blocking is not None and blocking.mode:
        mode_weight_BT = mode_weight_BT.masked_fill(blocked_BT, 0)
    return TokenTargets(
        target_N=layout.flatten(targets.target_BT).long(),
        lm_weight_N=layout.flatten(lm_weight_BT).detach().to(dtype),
        mode_label_N=layout.flatten(targets.mode_label_BT).detach().to(dtype),
        mode_weight_N=layout.flatten(mode_weight_BT).detach().to(dtype),
    )


def _output(
    losses: TokenLosses, targets: Targets, blocked_BT: Tensor, layout: _Layout
) -> LossOutput:
    mode_logit_BT = layout.unflatten(losses.mode_logit_N)
    return LossOutput(
        lm_sum=losses.lm_sum,
        mode_sum=losses.mode_sum,
        z_loss_sum=losses.z_loss_sum,
        nll_BT=layout.unflatten(losses.nll_N),
        bce_BT=layout.unflatten(losses.bce_N),
        mode_logit_BT=torch.where(targets.mode_weight_BT != 0, mode_logit_BT, 0),
        blocked_BT=blocked_BT,
    )
