"""Turn the blocking policy of the config into the op's rule, and count what it took.

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
    cap = Fraction(str(config.cap)).limit_denominator(CAP_DENOMINATOR_MAX)
    return Blocking(
        threshold=math.log(config.tau) - math.log1p(-config.tau),
        watch_mode1=config.direction in ("mode1_as_mode2", "both"),
        watch_mode2=config.direction in ("mode2_as_mode1", "both"),
        cap=(cap.numerator, cap.denominator),
        lm=config.policy in ("lm", "both"),
        mode=config.policy in ("mode", "both"),
    )


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
