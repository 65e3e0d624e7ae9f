"""Compute the LM + mode loss with gradients taken in the forward pass, piece by piece.

The forward pass keeps the gradients of both sums for upstream 1 (dH, dW, dz, dw_mode); the
backward pass only scales them, so it computes nothing twice. It scales in place where the graph is
freed afterwards, and makes copies where `retain_graph` asks for another pass. The mode term of dH
is the outer product of dz and the mode weight: it is formed in the backward pass, after dH of the
LM term was summed over the shards.

Letters: N tokens, D hidden size, V columns of this shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import TokenTargets
from megatron_mode.kernels.mode_loss.lm_pass import lm_pass
from megatron_mode.kernels.mode_loss.mode_pass import (
    effective_lm_weight,
    mode_pass,
    mode_weight_gradient,
    token_losses,
)
from megatron_mode.kernels.mode_loss.plan import ModeHead, Plan, active_lm_tokens
from megatron_mode.kernels.mode_loss.results import (
    Gradients,
    Kept,
    TokenLosses,
    Upstream,
    accumulation_dtype,
)


def chunked_forward(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    head: ModeHead | None,
    targets: TokenTargets,
    plan: Plan,
) -> tuple[TokenLosses, Kept]:
    """Return the losses and the gradients for upstream 1."""
    mode = mode_pass(hidden_ND, head, targets, plan)
    weight_N = effective_lm_weight(targets, mode.blocked_N, plan)
    tokens = active_lm_tokens(hidden_ND, targets, weight_N)
    lm = lm_pass(tokens, lm_weight_VD, plan)

    empty = torch.empty(0, dtype=accumulation_dtype(hidden_ND), device=hidden_ND.device)
    hidden_gradient_ND = empty
    if lm.hidden_gradient_nD is not None:
        hidden_gradient_ND = tokens.spread(lm.hidden_gradient_nD, len(hidden_ND))
        if plan.shard.reduce is not None:
            hidden_gradient_ND = plan.shard.reduce(hidden_gradient_ND)
    mode_weight_gradient_D = empty.clone()
    if head is not None and plan.wants.mode_weight:
        mode_weight_gradient_D = mode_weight_gradient(
            hidden_ND, mode.dlogit_N, targets.mode_weight_N
        )
    kept = Kept(
        dlogit_N=mode.dlogit_N,
        lm_weight_N=weight_N,
        lse_N=empty.clone(),
        logits_nV=empty.clone(),
        hidden_gradient_ND=hidden_gradient_ND,
        lm_weight_gradient_VD=(
            empty.clone() if lm.lm_weight_gradient_VD is None else lm.lm_weight_gradient_VD
        ),
        mode_weight_gradient_D=mode_weight_gradient_D,
    )
    return token_losses(tokens, lm.nll_n, lm.lse_n, mode, plan), kept


def chunked_backward(
    kept: Kept,
    mode_weight_D: Tensor | None,
    up: Upstream,
    plan: Plan,
    *,
    in_place: bool,
    main_gradient_VD: Tensor | None,
) -> Gradients:
    """Return the gradients of the inputs.

    `in_place` spoils what was kept; a main gradient takes the LM weight's gradient instead.
    """
    wants = plan.wants
    hidden_ND, weight_VD, mode_D, bias = None, None, None, None
    if wants.hidden and up.lm is not None:
        hidden_ND = _scale(kept.hidden_gradient_ND, up.lm, in_place=in_place)
    if wants.lm_weight and up.lm is not None:
        if main_gradient_VD is not None:
            main_gradient_VD.addcmul_(kept.lm_weight_gradient_VD.to(main_gradient_VD.dtype), up.lm)
        else:
            weight_VD = _scale(kept.lm_weight_gradient_VD, up.lm, in_place=in_place)
    if mode_weight_D is not None and up.mode is not None:
        scaled_N = kept.dlogit_N * up.mode
        if wants.hidden:
            own_N = plan.shard.own_tokens(scaled_N)
            mode_weight_D = mode_weight_D.to(scaled_N.dtype)
            if hidden_ND is None:
                hidden_ND = torch.outer(own_N, mode_weight_D)
            else:
                hidden_ND = hidden_ND.addr_(own_N, mode_weight_D)
        if wants.mode_weight:
            mode_D = kept.mode_weight_gradient_D * up.mode
        if wants.mode_bias:
            bias = scaled_N.sum()
    return Gradients(hidden_ND, weight_VD, mode_D, bias)


def _scale(value: Tensor, up: Tensor, *, in_place: bool) -> Tensor:
    """Return the value times a scalar tensor, in the value's dtype."""
    return value.mul_(up) if in_place else (value * up).to(value.dtype)
