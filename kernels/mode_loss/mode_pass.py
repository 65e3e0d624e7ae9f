"""Compute the mode terms in torch: logit, cross-entropy, gradient, blocking.

Letters: N tokens, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_mode.kernels.mode_loss.arguments import TokenTargets
from megatron_mode.kernels.mode_loss.blocking import blocked_in_token_order
from megatron_mode.kernels.mode_loss.plan import LmTokens, ModeHead, Plan
from megatron_mode.kernels.mode_loss.results import TokenLosses, accumulation_dtype

# Half-precision rows are widened, and rows without a mode weight cleared, this many at a time:
# 2 MiB at D = 512.
MODE_ROWS = 1024


class ModeTerms(NamedTuple):
    """Hold the mode loss and what follows from the mode logit; all detached."""

    mode_sum: Tensor
    logit_N: Tensor
    bce_N: Tensor
    dlogit_N: Tensor
    """Gradient of mode_sum to the logit."""
    blocked_N: Tensor


def mode_pass(
    hidden_ND: Tensor, head: ModeHead | None, targets: TokenTargets, plan: Plan
) -> ModeTerms:
    """Return the mode terms; zeros without a head."""
    if head is None:
        return no_mode_terms(targets)
    logit_N = mode_logit(hidden_ND, head)
    label_N, weight_N = targets.mode_label_N, targets.mode_weight_N
    blocked_N = torch.zeros_like(weight_N, dtype=torch.bool)
    counted_N = weight_N != 0
    if plan.blocking is not None:
        blocked_N = blocked_in_token_order(logit_N, label_N, weight_N, plan.blocking, plan.grid)
        if plan.blocking.mode:
            counted_N = counted_N & ~blocked_N
    bce_N = binary_cross_entropy_with_logits(logit_N, label_N, reduction="none")
    bce_N = torch.where(counted_N, bce_N, 0)
    dlogit_N = torch.where(counted_N, weight_N * (logit_N.sigmoid() - label_N), 0)
    return ModeTerms((weight_N * bce_N).sum(), logit_N, bce_N, dlogit_N, blocked_N)


def no_mode_terms(targets: TokenTargets) -> ModeTerms:
    """Return the terms of a model without a mode head."""
    zero_N = torch.zeros_like(targets.mode_weight_N)
    return ModeTerms(
        zero_N.new_zeros(()),
        zero_N,
        zero_N.clone(),
        zero_N.clone(),
        torch.zeros_like(zero_N, dtype=torch.bool),
    )


def token_losses(
    tokens: LmTokens, nll_n: Tensor, lse_n: Tensor, mode: ModeTerms, plan: Plan
) -> TokenLosses:
    """Return sums and token losses from the statistics of the LM tokens and the mode terms.

    Tokens of weight 0 stand among the others where the host does not know the masks: they report 0.
    """
    nll_n = torch.where(tokens.weight_n != 0, nll_n, 0)
    z_loss_sum = (plan.z_weight * tokens.weight_n * lse_n.square()).sum()
    return TokenLosses(
        (tokens.weight_n * nll_n).sum() + z_loss_sum,
        mode.mode_sum,
        z_loss_sum,
        tokens.spread(nll_n, len(mode.logit_N)),
        mode.bce_N,
        mode.logit_N,
        mode.blocked_N,
    )


def mode_logit(hidden_ND: Tensor, head: ModeHead) -> Tensor:
    """Return the mode logit z of each token, in fp32 (fp64 for fp64 hidden states)."""
    dtype = accumulation_dtype(hidden_ND)
    weight_D = head.weight_D.to(dtype)
    logit_N = head.bias.to(dtype).reshape(()).repeat(len(hidden_ND))
    for begin in range(0, len(hidden_ND), MODE_ROWS):
        rows = slice(begin, begin + MODE_ROWS)
        logit_N[rows] += hidden_ND[rows].to(dtype) @ weight_D
    return logit_N


def mode_weight_gradient(hidden_ND: Tensor, dlogit_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return sum_i dlogit_i * hidden_i over the tokens with a weight (0 * NaN would be NaN)."""
    sum_D = dlogit_N.new_zeros(hidden_ND.shape[1])
    for begin in range(0, len(hidden_ND), MODE_ROWS):
        rows = slice(begin, begin + MODE_ROWS)
        hidden_RD = hidden_ND[rows].to(dlogit_N.dtype)
        hidden_RD = torch.where(weight_N[rows, None] != 0, hidden_RD, 0)
        sum_D += hidden_RD.T @ dlogit_N[rows]
    return sum_D


def effective_lm_weight(targets: TokenTargets, blocked_N: Tensor, plan: Plan) -> Tensor:
    """Return the LM weights after blocking."""
    if plan.blocking is None or not plan.blocking.lm:
        return targets.lm_weight_N.clone()
    return targets.lm_weight_N.masked_fill(blocked_N, 0)
