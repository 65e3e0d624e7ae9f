"""Open the one door to the LM + mode loss: layouts, autocast, checks, blocking, implementation.

Letters: B rows, T row length, N = B*T tokens, D hidden size, V vocabulary columns of this shard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import (
    Blocking,
    Targets,
    TokenTargets,
    VocabShard,
    check_choices,
    check_heads,
)
from megatron_mode.kernels.mode_loss.arguments import check_targets as check_targets_of
from megatron_mode.kernels.mode_loss.function import fused_loss
from megatron_mode.kernels.mode_loss.layout import TokenGrid
from megatron_mode.kernels.mode_loss.plan import Implementation, ModeHead, Plan, Wants
from megatron_mode.kernels.mode_loss.reference import reference_loss
from megatron_mode.kernels.mode_loss.results import TokenLosses, accumulation_dtype

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
    """Tokens that the blocking policy chose, bool."""


class Options(TypedDict, total=False):
    """Take the options of one implementation or device."""

    logits_bytes: int | None
    """Budget of the logits buffer of `chunked`; None: by device."""
    keep_logits_bytes: int
    """Largest logits that `triton` keeps for the backward pass; 0 by default."""
    check_targets: bool
    """Check the range of targets on a GPU too, on the device; off by default."""


def mode_loss(
    hidden_TBD: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
    targets: Targets,
    *,
    shard: VocabShard = WHOLE_VOCABULARY,
    z_weight: float = 0.0,
    blocking: Blocking | None = None,
    implementation: Implementation = "chunked",
    main_gradient_VD: Tensor | None = None,
    **options: Unpack[Options],
) -> LossOutput:
    """Return the weighted LM sum and mode sum of hidden states [T, B, D] or [N, D].

    Targets are [B, T], or [N] beside [N, D]. The mode logit and all sums are in fp32 (fp64 for
    fp64 inputs). Without mode weight and bias there is no mode head, and the mode sum is 0.
    On a shard the gradients of `hidden` and of the mode head are complete, that of `lm_weight` is
    the shard's own. A `main_gradient` [V, D] in fp32 takes the gradient of `lm_weight`, added in
    the backward pass; `lm_weight` itself then gets none.
    Raises ValueError, TypeError for a shape, dtype or device, TargetRangeError for a target (CPU).
    """
    device_type = hidden_TBD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_TBD, lm_weight_VD = hidden_TBD.to(dtype), lm_weight_VD.to(dtype)
    heads = (hidden_TBD, lm_weight_VD, mode_weight_D, mode_bias)
    check_heads(*heads)
    grid = TokenGrid.of(hidden_TBD, 1 if shard.gather is None else shard.ranks)
    if shard.vocab_size is None:
        shard = replace(shard, vocab_size=shard.start + len(lm_weight_VD))
    check_targets_of(targets, grid.shape, hidden_TBD.device)
    check_choices(implementation, hidden_TBD, lm_weight_VD, main_gradient_VD)
    wants = Wants(*(_wants_gradient(value) for value in heads))
    plan = Plan(implementation, grid, shard, wants, z_weight, blocking, **options)
    head, hidden_ND = _head(mode_weight_D, mode_bias), grid.flatten_hidden(hidden_TBD)
    tokens = _token_targets(targets, grid, accumulation_dtype(hidden_ND))
    # The dtypes are chosen above: autocast would round the fp32 mode logit and statistics.
    with torch.autocast(device_type, enabled=False):
        if implementation == "reference":
            losses = reference_loss(hidden_ND, lm_weight_VD, head, tokens, plan)
        else:
            losses = fused_loss(hidden_ND, lm_weight_VD, head, tokens, plan, main_gradient_VD)
    return _output(losses, targets, grid)


def _wants_gradient(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad and torch.is_grad_enabled()


def _head(mode_weight_D: Tensor | None, mode_bias: Tensor | None) -> ModeHead | None:
    if mode_weight_D is None or mode_bias is None:
        return None
    return ModeHead(mode_weight_D, mode_bias)


def _token_targets(targets: Targets, grid: TokenGrid, dtype: torch.dtype) -> TokenTargets:
    # Contiguous: the kernels walk them by index, and a slice or an expanded value has its stride.
    rows_n = targets.lm_rows_n
    return TokenTargets(
        target_N=grid.flatten(targets.target_BT).long().contiguous(),
        lm_weight_N=grid.flatten(targets.lm_weight_BT).detach().to(dtype).contiguous(),
        mode_label_N=grid.flatten(targets.mode_label_BT).detach().to(dtype).contiguous(),
        mode_weight_N=grid.flatten(targets.mode_weight_BT).detach().to(dtype).contiguous(),
        lm_rows_n=None if rows_n is None else grid.flatten_rows(rows_n),
    )


def _output(losses: TokenLosses, targets: Targets, grid: TokenGrid) -> LossOutput:
    mode_logit_BT = grid.unflatten(losses.mode_logit_N)
    return LossOutput(
        lm_sum=losses.lm_sum,
        mode_sum=losses.mode_sum,
        z_loss_sum=losses.z_loss_sum,
        nll_BT=grid.unflatten(losses.nll_N),
        bce_BT=grid.unflatten(losses.bce_N),
        mode_logit_BT=torch.where(targets.mode_weight_BT != 0, mode_logit_BT, 0),
        blocked_BT=grid.unflatten(losses.blocked_N),
    )
