"""Scale the sums of one micro-batch so that the step's loss is that of the global batch.

    loss = sum(a * nll) / A + mode_weight * sum(c * bce) / C

with A and C the weights of the global batch. The engine averages the losses of the
micro-batches and of the data-parallel ranks; the scale undoes both averages.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockedShares(NamedTuple):
    """Hold the shares of A and C that blocking took from the global batch of a step."""

    lm: float = 0.0
    mode: float = 0.0


class LossScales(NamedTuple):
    """Hold the factors of lm_sum and mode_sum."""

    lm: float
    mode: float


def loss_scales(
    lm_weight_total: float,
    mode_weight_total: float,
    *,
    mode_weight: float,
    gradient_accumulation_steps: int,
    data_parallel_size: int,
    previous_shares: BlockedShares | None = None,
) -> LossScales:
    """Return the scales for A = lm_weight_total and C = mode_weight_total of the global batch.

    `previous_shares`, the blocked shares of the step before, divides by A * (1 - lm) and
    C * (1 - mode); leave it out unless `loss.blocking.renormalise` is set. A total of 0 gives 0.
    """
    shares = previous_shares or BlockedShares()
    averages = gradient_accumulation_steps * data_parallel_size
    return LossScales(
        lm=_scale(lm_weight_total, shares.lm, averages),
        mode=mode_weight * _scale(mode_weight_total, shares.mode, averages),
    )


def scaled_loss(lm_sum: Tensor, mode_sum: Tensor, scales: LossScales) -> Tensor:
    """Return the micro-batch's loss as the engine takes it; the graph is kept at scale 0."""
    return lm_sum * scales.lm + mode_sum * scales.mode


def _scale(weight_total: float, blocked_share: float, averages: int) -> float:
    if weight_total == 0:
        return 0.0
    # A step whose tokens were all blocked leaves nothing to divide by: it rescales no other.
    unblocked_share = 1 - blocked_share if blocked_share < 1 else 1.0
    return averages / (weight_total * unblocked_share)
