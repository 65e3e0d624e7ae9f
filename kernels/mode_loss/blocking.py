"""Pick the confidently wrong tokens that lose a loss (design.md section 6).

Letters: B rows, T row length, N = B*T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import Blocking
from megatron_mode.kernels.mode_loss.layout import TokenGrid


def blocked_tokens(
    logit_BT: Tensor, label_BT: Tensor, weight_BT: Tensor, blocking: Blocking
) -> Tensor:
    """Return the mask of blocked tokens; [N] inputs count as one row.

    A valid token (mode weight above 0) is a candidate where the logit of the wrong mode exceeds
    the threshold. A row blocks at most floor(cap * its valid tokens) of its candidates, the largest
    excess first, ties to the lower position. Labels of 0.5 and above are Mode 2.
    """
    if logit_BT.dim() == 1:
        return blocked_tokens(logit_BT[None], label_BT[None], weight_BT[None], blocking)[0]
    is_mode2_BT = label_BT >= 0.5
    candidate_BT = (weight_BT > 0) & (wrong_logit(logit_BT, label_BT) > blocking.threshold)
    if not blocking.watch_mode1:
        candidate_BT = candidate_BT & is_mode2_BT
    if not blocking.watch_mode2:
        candidate_BT = candidate_BT & ~is_mode2_BT
    return cap_candidates(candidate_BT, logit_BT, label_BT, weight_BT, blocking)


def cap_candidates(
    candidate_BT: Tensor, logit_BT: Tensor, label_BT: Tensor, weight_BT: Tensor, blocking: Blocking
) -> Tensor:
    """Return the candidates that the cap leaves blocked."""
    if not blocking.capped:
        return candidate_BT
    numerator, denominator = blocking.cap
    allowed_B = (weight_BT > 0).sum(1) * numerator // denominator
    # Ordering by the logit is ordering by the excess over the one threshold, without rounding.
    score_BT = torch.where(candidate_BT, wrong_logit(logit_BT, label_BT), -torch.inf)
    order_BT = score_BT.sort(dim=1, descending=True, stable=True).indices
    ranks_BT = torch.arange(order_BT.shape[1], device=order_BT.device).expand_as(order_BT)
    rank_BT = torch.empty_like(order_BT).scatter_(1, order_BT, ranks_BT)
    return candidate_BT & (rank_BT < allowed_B[:, None])


def wrong_logit(logit_BT: Tensor, label_BT: Tensor) -> Tensor:
    """Return how far the logit stands on the side of the wrong mode."""
    return torch.where(label_BT >= 0.5, -logit_BT, logit_BT)


def blocked_in_token_order(
    logit_N: Tensor, label_N: Tensor, weight_N: Tensor, blocking: Blocking, grid: TokenGrid
) -> Tensor:
    """Return the mask of blocked tokens in the order of hidden_ND."""
    blocked_BT = blocked_tokens(
        grid.unflatten(logit_N), grid.unflatten(label_N), grid.unflatten(weight_N), blocking
    )
    return grid.flatten(blocked_BT)
