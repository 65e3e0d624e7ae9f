"""Pick the confidently wrong tokens that lose a loss (design.md section 6).

Letters: B rows, T row length.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from megatron_mode.config.fields import BlockingConfig
from megatron_mode.kernels.mode_loss import Blocking, Targets

# Makes floor(cap * tokens) exact for caps of up to nine decimals: 0.29 * 100 is below 29 in floats.
CAP_DENOMINATOR_MAX = 10**9


def blocking_of(config: BlockingConfig, *, active: bool) -> Blocking | None:
    """Return the blocking that the op applies; None for policy `none` or while not active."""
    if config.policy == "none" or not active:
        return None

    def select(logit_BT: Tensor, label_BT: Tensor, weight_BT: Tensor) -> Tensor:
        return blocked_tokens(logit_BT, label_BT, weight_BT, config)

    return Blocking(
        select, lm=config.policy in ("lm", "both"), mode=config.policy in ("mode", "both")
    )


def blocked_tokens(
    logit_BT: Tensor, label_BT: Tensor, weight_BT: Tensor, config: BlockingConfig
) -> Tensor:
    """Return the mask of blocked tokens; [N] inputs count as one row.

    A valid token (mode weight above 0) is a candidate where the logit of the wrong mode exceeds
    log(tau / (1 - tau)). A row blocks at most floor(cap * its valid tokens) of its candidates, the
    largest excess first, ties to the lower position. Labels of 0.5 and above are Mode 2.
    """
    if logit_BT.dim() == 1:
        row = (logit_BT[None], label_BT[None], weight_BT[None])
        return blocked_tokens(*row, config)[0]
    threshold = math.log(config.tau) - math.log1p(-config.tau)
    valid_BT = weight_BT > 0
    is_mode2_BT = label_BT >= 0.5
    wrong_logit_BT = torch.where(is_mode2_BT, -logit_BT, logit_BT)
    candidate_BT = valid_BT & (wrong_logit_BT > threshold)
    if config.direction == "mode1_as_mode2":
        candidate_BT &= ~is_mode2_BT
    elif config.direction == "mode2_as_mode1":
        candidate_BT &= is_mode2_BT

    cap = Fraction(str(config.cap)).limit_denominator(CAP_DENOMINATOR_MAX)
    allowed_B = valid_BT.sum(1) * cap.numerator // cap.denominator
    # Ordering by the logit is ordering by the excess over the one threshold, without rounding.
    score_BT = torch.where(candidate_BT, wrong_logit_BT, -torch.inf)
    order_BT = score_BT.sort(dim=1, descending=True, stable=True).indices
    ranks_BT = torch.arange(order_BT.shape[1], device=order_BT.device).expand_as(order_BT)
    rank_BT = torch.empty_like(order_BT).scatter_(1, order_BT, ranks_BT)
    return candidate_BT & (rank_BT < allowed_B[:, None])


def blocked_weight_sums(
    blocked_BT: Tensor, targets: Targets, config: BlockingConfig
) -> tuple[Tensor, Tensor]:
    """Return the (LM weight, mode weight) that blocking took away, for the shares of a step."""
    zero = torch.zeros((), device=blocked_BT.device)
    lm = torch.where(blocked_BT, targets.lm_weight_BT, 0).sum()
    mode = torch.where(blocked_BT, targets.mode_weight_BT, 0).sum()
    return (
        lm if config.policy in ("lm", "both") else zero,
        mode if config.policy in ("mode", "both") else zero,
    )
