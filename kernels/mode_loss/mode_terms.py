"""Compute the mode terms in torch: logit, cross-entropy, gradient, blocking.

Letters: B rows, T row length, N = B*T tokens, R tokens of a piece, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_mode.kernels.mode_loss.arguments import Blocking
from megatron_mode.kernels.mode_loss.tokens import (
    Choices,
    LmTokens,
    TokenGrid,
    TokenLosses,
    TokenTargets,
    accumulation_dtype,
)

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


def mode_terms(
    hidden_ND: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
    targets: TokenTargets,
    choices: Choices,
) -> ModeTerms:
    """Return the mode terms; zeros without a head."""
    if mode_weight_D is None or mode_bias is None:
        return no_mode_terms(targets)
    logit_N = mode_logit(hidden_ND, mode_weight_D, mode_bias)
    label_N, weight_N = targets.mode_label_N, targets.mode_weight_N
    counted_N = weight_N != 0
    blocked_N = torch.zeros_like(counted_N)
    if choices.blocking is not None:
        blocked_N = blocked_tokens(logit_N, targets, choices.blocking, choices.grid)
        if choices.blocking.mode:
            counted_N = counted_N & ~blocked_N
    bce_N = binary_cross_entropy_with_logits(logit_N, label_N, reduction="none")
    bce_N = torch.where(counted_N, bce_N, 0)
    dlogit_N = torch.where(counted_N, weight_N * (logit_N.sigmoid() - label_N), 0)
    return ModeTerms((weight_N * bce_N).sum(), logit_N, bce_N, dlogit_N, blocked_N)


def no_mode_terms(targets: TokenTargets) -> ModeTerms:
    """Return the terms of a model without a mode head."""
    zero_N = torch.zeros_like(targets.mode_weight_N)
    return ModeTerms(zero_N.sum(), zero_N, zero_N.clone(), zero_N.clone(), zero_N.bool())


def mode_logit(hidden_ND: Tensor, mode_weight_D: Tensor, mode_bias: Tensor) -> Tensor:
    """Return the mode logit z of each token, in fp32 (fp64 for fp64 hidden states)."""
    dtype = accumulation_dtype(hidden_ND)
    weight_D, logit_N = mode_weight_D.to(dtype), mode_bias.to(dtype).repeat(len(hidden_ND))
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


def blocked_tokens(
    logit_N: Tensor, targets: TokenTargets, blocking: Blocking, grid: TokenGrid
) -> Tensor:
    """Return the mask of the confidently wrong tokens that lose a loss.

    A valid token (mode weight above 0) is a candidate where the logit of the wrong mode exceeds
    the threshold. Labels of 0.5 and above are Mode 2.
    """
    is_mode2_N = targets.mode_label_N >= 0.5
    wrong_N = torch.where(is_mode2_N, -logit_N, logit_N)
    watched_N = torch.where(is_mode2_N, blocking.watch_mode2, blocking.watch_mode1)
    candidate_N = (targets.mode_weight_N > 0) & (wrong_N > blocking.threshold) & watched_N
    return cap_candidates(candidate_N, logit_N, targets, blocking, grid)


def cap_candidates(
    candidate_N: Tensor, logit_N: Tensor, targets: TokenTargets, blocking: Blocking, grid: TokenGrid
) -> Tensor:
    """Return the candidates that the cap leaves blocked.

    A row blocks at most floor(cap * its valid tokens) of its candidates, the largest excess first,
    ties to the lower position.
    """
    if not blocking.capped:
        return candidate_N
    numerator, denominator = blocking.cap
    allowed_B = (grid.rows(targets.mode_weight_N) > 0).sum(1) * numerator // denominator
    wrong_N = torch.where(targets.mode_label_N >= 0.5, -logit_N, logit_N)
    # Ordering by the logit is ordering by the excess over the one threshold, without rounding.
    score_BT = grid.rows(torch.where(candidate_N, wrong_N, -torch.inf))
    order_BT = score_BT.sort(dim=1, descending=True, stable=True).indices
    rank_BT = order_BT.argsort(dim=1)
    return candidate_N & grid.flatten(rank_BT < allowed_B[:, None])


def effective_lm_weight(targets: TokenTargets, blocked_N: Tensor, choices: Choices) -> Tensor:
    """Return the LM weights after blocking."""
    if choices.blocking is None or not choices.blocking.lm:
        return targets.lm_weight_N
    return targets.lm_weight_N.masked_fill(blocked_N, 0)


def token_losses(
    tokens: LmTokens, nll_n: Tensor, lse_n: Tensor, mode: ModeTerms, choices: Choices
) -> TokenLosses:
    """Return sums and token losses from the statistics of the LM tokens and the mode terms.

    Tokens of weight 0 stand among the others where the host does not know the masks: they report 0.
    """
    nll_n = torch.where(tokens.weight_n != 0, nll_n, 0)
    z_loss_sum = (choices.z_weight * tokens.weight_n * lse_n.square()).sum()
    return TokenLosses(
        (tokens.weight_n * nll_n).sum() + z_loss_sum,
        mode.mode_sum,
        z_loss_sum,
        tokens.spread(nll_n, len(mode.logit_N)),
        mode.bce_N,
        mode.logit_N,
        mode.blocked_N,
    )
