"""Compute the LM + mode loss with gradients taken in the forward pass, piece by piece.

The forward pass keeps the gradients of both sums for upstream 1 (dH, dW, dz, dw_mode); the
backward pass only scales them, so it computes nothing twice. It scales in place where the graph is
freed afterwards, and makes copies where `retain_graph` asks for another pass. The mode term of dH
is the outer product of dz and the mode weight: it is formed in the backward pass, after dH of the
LM term was summed over the shards.

Letters: N tokens, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mode.kernels.mode_loss.lm_pass import lm_pass
from megatron_mode.kernels.mode_loss.mode_terms import (
    effective_lm_weight,
    mode_terms,
    mode_weight_gradient,
    token_losses,
)
from megatron_mode.kernels.mode_loss.tokens import Choices, LmTokens, TokenLosses, TokenTargets


class ChunkedLoss(torch.autograd.Function):
    """Join the forward and backward passes of `chunked`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        lm_weight_VD: Tensor,
        mode_weight_D: Tensor | None,
        mode_bias: Tensor | None,
        targets: TokenTargets,
        choices: Choices,
    ) -> TokenLosses:
        """Return the losses; `hidden_ND` holds this rank's tokens under sequence parallelism."""
        shard = choices.shard
        all_ND = shard.all_tokens(hidden_ND)
        mode = mode_terms(all_ND, mode_weight_D, mode_bias, targets, choices)
        weight_N = effective_lm_weight(targets, mode.blocked_N, choices)
        tokens = active_tokens(all_ND, targets, weight_N)
        lm = lm_pass(tokens, lm_weight_VD, choices)
        lm_hidden_ND, head_D = None, None
        if lm.hidden_gradient_nD is not None:
            lm_hidden_ND = tokens.spread(lm.hidden_gradient_nD, len(all_ND))
            if shard.reduce is not None:
                lm_hidden_ND = shard.reduce(lm_hidden_ND)
        if choices.wants.mode_weight:
            head_D = mode_weight_gradient(all_ND, mode.dlogit_N, targets.mode_weight_N)
        ctx.choices = choices
        ctx.save_for_backward(
            mode.dlogit_N, lm_hidden_ND, lm.lm_weight_gradient_VD, head_D, mode_weight_D
        )
        losses = token_losses(tokens, lm.nll_n, lm.lse_n, mode, choices)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*losses[2:])
        return losses

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, lm_up: Tensor | None, mode_up: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first four arguments; autograd casts them to their dtypes."""
        dlogit_N, lm_hidden_ND, lm_weight_VD, head_D, mode_weight_D = ctx.saved_tensors
        wants, shard = ctx.choices.wants, ctx.choices.shard
        hidden_ND, weight_VD, mode_D, bias = None, None, None, None
        if lm_up is not None:
            hidden_ND, weight_VD = _scale(lm_hidden_ND, lm_up), _scale(lm_weight_VD, lm_up)
        if mode_weight_D is not None and mode_up is not None:
            scaled_N = dlogit_N * mode_up
            if wants.hidden:
                factors = shard.own_tokens(scaled_N), mode_weight_D.to(scaled_N.dtype)
                hidden_ND = (
                    torch.outer(*factors) if hidden_ND is None else hidden_ND.addr_(*factors)
                )
            mode_D = head_D * mode_up if wants.mode_weight else None
            bias = scaled_N.sum() if wants.mode_bias else None
        return hidden_ND, weight_VD, mode_D, bias, None, None


def active_tokens(hidden_ND: Tensor, targets: TokenTargets, weight_N: Tensor) -> LmTokens:
    """Return the tokens with a weight; a CPU looks for them, a GPU would have to wait."""
    if weight_N.device.type != "cpu":
        return targets.lm_tokens(hidden_ND, weight_N)
    rows_n = weight_N.nonzero().squeeze(1)
    everything = len(rows_n) == len(weight_N)
    return LmTokens.of(hidden_ND, targets.target_N, weight_N, None if everything else rows_n)


def _scale(value: Tensor | None, up: Tensor) -> Tensor | None:
    """Return the value times a scalar tensor, in the value's dtype."""
    if value is None:
        return None
    # What was kept may be spoilt where no other backward pass of this graph follows.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return (value * up).to(value.dtype)
    return value.mul_(up)
