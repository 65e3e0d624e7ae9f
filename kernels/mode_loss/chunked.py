"""Compute the LM + mode loss with gradients taken in the forward pass, piece by piece.

The forward pass keeps the gradients of both sums for upstream 1 (dH, dW, dz, dw_mode); the
backward pass only scales them, so it computes nothing twice. It scales in place where the graph is
freed afterwards, and makes copies where `retain_graph` asks for another pass. The mode term of dH
is the outer product of dz and the mode weight: it is formed in the backward pass, after dH of the
LM term was summed over the shards.

Letters: N tokens, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mode.kernels.mode_loss.contract import (
    Choices,
    Gradients,
    ModeHead,
    TokenLosses,
    Upstream,
    end_backward,
    end_forward,
)
from megatron_mode.kernels.mode_loss.lm_pass import lm_pass
from megatron_mode.kernels.mode_loss.mode_terms import (
    effective_lm_weight,
    mode_terms,
    mode_weight_gradient,
    token_losses,
)
from megatron_mode.kernels.mode_loss.tokens import TokenTargets, active_tokens


class Kept(NamedTuple):
    """Hold the gradients for upstream 1, and the mode weight; None where not wanted."""

    dlogit_N: Tensor
    """Gradient of mode_sum to the mode logit."""
    hidden_ND: Tensor | None
    """Gradient of lm_sum, summed over the shards; this rank's tokens under sequence parallelism."""
    lm_weight_VD: Tensor | None
    mode_weight_gradient_D: Tensor | None
    mode_weight_D: Tensor | None


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
        head, shard = ModeHead.of(mode_weight_D, mode_bias), choices.shard
        all_ND = shard.all_tokens(hidden_ND)
        mode = mode_terms(all_ND, head, targets, choices)
        weight_N = effective_lm_weight(targets, mode.blocked_N, choices)
        tokens = active_tokens(all_ND, targets, weight_N)
        lm = lm_pass(tokens, lm_weight_VD, choices)
        lm_hidden_ND, head_D = None, None
        if lm.hidden_gradient_nD is not None:
            lm_hidden_ND = tokens.spread(lm.hidden_gradient_nD, len(all_ND))
            if shard.reduce is not None:
                lm_hidden_ND = shard.reduce(lm_hidden_ND)
        if head is not None and choices.wants.mode_weight:
            head_D = mode_weight_gradient(all_ND, mode.dlogit_N, targets.mode_weight_N)
        ctx.save_for_backward(
            *Kept(mode.dlogit_N, lm_hidden_ND, lm.lm_weight_gradient_VD, head_D, mode_weight_D)
        )
        losses = token_losses(tokens, lm.nll_n, lm.lse_n, mode, choices)
        return end_forward(
            ctx, choices, losses, (hidden_ND, lm_weight_VD, mode_weight_D, mode_bias)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first four arguments."""
        # What was kept may be spoilt where no other backward pass of this graph follows.
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        kept, up = Kept(*ctx.saved_tensors), Upstream(*gradients[:2])
        return end_backward(ctx, scaled_gradients(kept, up, ctx.choices, in_place=in_place))


def scaled_gradients(kept: Kept, up: Upstream, choices: Choices, *, in_place: bool) -> Gradients:
    """Return the gradients of the inputs; `in_place` spoils what was kept."""
    wants = choices.wants
    hidden_ND, weight_VD, mode_D, bias = None, None, None, None
    if up.lm is not None:
        hidden_ND = _scale(kept.hidden_ND, up.lm, in_place=in_place)
        weight_VD = _scale(kept.lm_weight_VD, up.lm, in_place=in_place)
    if kept.mode_weight_D is not None and up.mode is not None:
        scaled_N = kept.dlogit_N * up.mode
        if wants.hidden:
            own_N = choices.shard.own_tokens(scaled_N)
            mode_weight_D = kept.mode_weight_D.to(scaled_N.dtype)
            if hidden_ND is None:
                hidden_ND = torch.outer(own_N, mode_weight_D)
            else:
                hidden_ND = hidden_ND.addr_(own_N, mode_weight_D)
        if kept.mode_weight_gradient_D is not None:
            mode_D = kept.mode_weight_gradient_D * up.mode
        if wants.mode_bias:
            bias = scaled_N.sum()
    return Gradients(hidden_ND, weight_VD, mode_D, bias)


def _scale(value: Tensor | None, up: Tensor, *, in_place: bool) -> Tensor | None:
    """Return the value times a scalar tensor, in the value's dtype."""
    if value is None:
        return None
    return value.mul_(up) if in_place else (value * up).to(value.dtype)
