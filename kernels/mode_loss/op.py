"""Open the one door to the LM + mode loss: layouts, autocast, checks, choice of implementation.

Letters: B rows, T row length, N = B*T tokens, D hidden size, V vocabulary columns of this shard.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import (
    Blocking,
    Implementation,
    Targets,
    VocabShard,
    validate_heads,
    validate_range,
    validate_targets,
)
from megatron_mode.kernels.mode_loss.chunked import ChunkedLoss
from megatron_mode.kernels.mode_loss.reference import reference_loss
from megatron_mode.kernels.mode_loss.tokens import (
    Choices,
    TokenGrid,
    TokenLosses,
    TokenTargets,
    Wants,
    accumulation_dtype,
)

FULL_VOCABULARY = VocabShard()


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


def mode_loss(
    hidden_TBD: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
    targets: Targets,
    *,
    shard: VocabShard = FULL_VOCABULARY,
    z_weight: float = 0.0,
    blocking: Blocking | None = None,
    implementation: Implementation = "chunked",
    keep_logits_bytes: int = 0,
    check_targets: bool = False,
) -> LossOutput:
    """Return the weighted LM sum and mode sum of hidden states [T, B, D] or [N, D].

    Targets are [B, T], or [N] beside [N, D]. The mode logit and all sums are in fp32 (fp64 for
    fp64 inputs). Without mode weight and bias there is no mode head, and the mode sum is 0.
    On a shard the gradients of `hidden` and of the mode head are complete, that of `lm_weight` is
    the shard's own. `triton` keeps logits of up to `keep_logits_bytes` for the backward pass
    instead of computing them again. `check_targets` checks the range of targets on a GPU too.
    Raises ValueError, TypeError for a shape, dtype or device, TargetRangeError for a target (CPU).
    """
    device_type = hidden_TBD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_TBD, lm_weight_VD = hidden_TBD.to(dtype), lm_weight_VD.to(dtype)
    heads = (lm_weight_VD, mode_weight_D, mode_bias)
    validate_heads(hidden_TBD, *heads, implementation)
    grid = TokenGrid.of(hidden_TBD, 1 if shard.gather is None else shard.ranks)
    validate_targets(targets, grid.shape, hidden_TBD.device)
    if check_targets or device_type == "cpu" or implementation == "reference":
        columns = shard.start + len(lm_weight_VD)
        validate_range(targets, columns if shard.vocab_size is None else shard.vocab_size)
    with_grad = torch.is_grad_enabled()
    wants = Wants(
        *(with_grad and one is not None and one.requires_grad for one in (hidden_TBD, *heads))
    )
    choices = Choices(grid, shard, wants, z_weight, blocking, keep_logits_bytes)
    hidden_ND = grid.flatten_hidden(hidden_TBD)
    tokens = TokenTargets.of(targets, grid, accumulation_dtype(hidden_ND))
    bias = None if mode_bias is None else mode_bias.reshape(())
    # The dtypes are chosen above: autocast would round the fp32 mode logit and statistics.
    with torch.autocast(device_type, enabled=False):
        losses = TokenLosses(
            *_function(implementation)(
                hidden_ND, lm_weight_VD, mode_weight_D, bias, tokens, choices
            )
        )
    return _output(losses, targets, grid)


def _function(implementation: Implementation) -> Callable[..., Any]:
    match implementation:
        case "triton":
            # Triton is imported where it is used: a machine without it has the other two.
            from megatron_mode.kernels.mode_loss.triton_loss import TritonLoss

            return TritonLoss.apply
        case "chunked":
            return ChunkedLoss.apply
        case "reference":
            return reference_loss


def _output(losses: TokenLosses, targets: Targets, grid: TokenGrid) -> LossOutput:
    mode_logit_BT = grid.unflatten(losses.mode_logit_N)
    return LossOutput(
        *losses[:3],
        nll_BT=grid.unflatten(losses.nll_N),
        bce_BT=grid.unflatten(losses.bce_N),
        mode_logit_BT=torch.where(targets.mode_weight_BT != 0, mode_logit_BT, 0),
        blocked_BT=grid.unflatten(losses.blocked_N),
    )


def why_no_triton(device_type: str) -> str | None:
    """Return why the Triton kernels cannot run on a device, or None where they can.

    On a CPU they run in Triton's interpreter, which is chosen before Triton is imported.
    """
    if importlib.util.find_spec("triton") is None:
        return "is not installed (pip install triton)"
    if device_type == "cuda":
        return None
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    return f"has no compiler for {device_type} (its interpreter runs under TRITON_INTERPRET=1)"
