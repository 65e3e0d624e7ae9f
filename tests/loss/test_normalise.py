"""Check that scaled micro-batch losses, averaged as the engine does, are the global loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.loss.normalise import BlockedShares, LossScales, loss_scales, scaled_loss


@given(
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    mode_weight=st.floats(0, 2),
    seed=st.integers(0, 100),
)
def test_the_engine_average_is_the_loss_of_the_global_batch(ranks, accumulation, mode_weight, seed):
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(4, ranks, accumulation, 5, generator=draw, dtype=torch.float64)
    a, nll, c, bce = weights
    scales = loss_scales(
        float(a.sum()),
        float(c.sum()),
        mode_weight=mode_weight,
        gradient_accumulation_steps=accumulation,
        data_parallel_size=ranks,
    )
    micro_losses = scaled_loss((a * nll).sum(-1), (c * bce).sum(-1), scales)
    expected = (a * nll).sum() / a.sum() + mode_weight * (c * bce).sum() / c.sum()
    assert float(micro_losses.mean()) == pytest.approx(float(expected), rel=1e-12)


def test_no_weight_at_all_gives_zero_with_the_graph():
    scales = loss_scales(
        0.0, 0.0, mode_weight=0.1, gradient_accumulation_steps=2, data_parallel_size=2
    )
    assert scales == LossScales(0.0, 0.0)
    lm_sum = torch.zeros((), requires_grad=True)
    loss = scaled_loss(lm_sum, torch.zeros(()), scales)
    loss.backward()
    assert loss == 0
    assert lm_sum.grad == 0


def test_renormalise_divides_by_the_unblocked_share_of_the_step_before():
    def scales(shares):
        return loss_scales(
            8.0,
            4.0,
            mode_weight=0.5,
            gradient_accumulation_steps=1,
            data_parallel_size=1,
            previous_shares=shares,
        )

    assert scales(None) == LossScales(1 / 8, 0.5 / 4)
    assert scales(BlockedShares(lm=0.5, mode=0.75)) == LossScales(1 / 4, 0.5)
    assert scales(BlockedShares(lm=1.0, mode=0.0)) == scales(None)
