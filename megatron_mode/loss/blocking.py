"""Turn the blocking policy of the config into the op's rule."""

from __future__ import annotations

import math
from fractions import Fraction

from megatron_mode.config.fields import BlockingConfig
from megatron_mode.kernels.mode_loss import Blocking

# Makes floor(cap * tokens) exact for caps of up to nine decimals: 0.29 * 100 is below 29 in floats.
CAP_DENOMINATOR_MAX = 10**9
# Whether a blocked token loses its LM loss, and whether its mode loss, by policy.
BLOCKED_LOSSES = {
    "none": (False, False),
    "lm": (True, False),
    "mode": (False, True),
    "both": (True, True),
}


def blocked_losses(config: BlockingConfig) -> tuple[bool, bool]:
    """Tell whether a blocked token loses its LM loss, and whether its mode loss."""
    return BLOCKED_LOSSES[config.policy]


def blocking_of(config: BlockingConfig, *, active: bool) -> Blocking | None:
    """Return the blocking that the op applies; None for policy `none` or while not active."""
    if config.policy == "none" or not active:
        return None
    lm, mode = blocked_losses(config)
    cap = Fraction(str(config.cap)).limit_denominator(CAP_DENOMINATOR_MAX)
    return Blocking(
        threshold=math.log(config.tau) - math.log1p(-config.tau),
        watch_mode1=config.direction in ("mode1_as_mode2", "both"),
        watch_mode2=config.direction in ("mode2_as_mode1", "both"),
        cap=(cap.numerator, cap.denominator),
        lm=lm,
        mode=mode,
    )
