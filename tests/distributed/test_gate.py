"""A step whose loss or gradient is not finite on any rank changes nothing on any rank."""

from __future__ import annotations

import math

import gate_rank
import gloo_world
import pytest

ZERO, BF16, PLAIN = {}, {"run": {"precision": "bf16"}}, {"parallel": {"zero_stage": 0}}
OPTIMIZERS = ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "AdamW")
LOSS, GRADIENT = "non_finite_loss", "non_finite_gradient"
# For each optimizer: what is NaN, on which rank, and what is found.
WORLDS = {
    # The second tensor rank's loss is a copy that nobody reports; its gradient counts.
    (2, 2, 1): [
        [("loss", 2, LOSS), ("loss", 3, GRADIENT), ("gradient", 1, GRADIENT)],
        [("gradient", 1, GRADIENT)],
        [("gradient", 1, GRADIENT)],
    ],
    (1, 1, 2): [
        [("loss", 1, LOSS), ("gradient", 0, GRADIENT)],
        [("loss", 0, LOSS)],
        [("loss", 1, LOSS)],
    ],
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", WORLDS, ids=["tensor2-pipeline2", "data2"])
def test_a_step_that_is_not_finite_leaves_every_bit_as_it_was(layout):
    cases = [[case[:2] for case in some] for some in WORLDS[layout]]
    told = gloo_world.run_world(
        math.prod(layout), gate_rank.run_cases, layout, [ZERO, BF16, PLAIN], cases
    )
    expected = [
        (optimizer, kind)
        for optimizer, some in zip(OPTIMIZERS, WORLDS[layout], strict=True)
        for *_, kind in some
    ]
    for of_rank in told:
        for (optimizer, kind), found in zip(expected, of_rank, strict=True):
            assert found["optimizer"] == optimizer, found
            assert [v.action for v in found["verdicts"]] == ["apply", "skip", "apply"], found
            assert found["verdicts"][1].kind == kind, found
            assert [v.action for v in found["planned"]] == ["apply", "skip", "apply"], found
            assert found["planned"][1].kind is None, found
            assert found["changed"] == [], found
            assert found["against_planned"] == [], found
            assert found["losses"] == found["planned_losses"], found
            assert found["losses"][0] != found["losses"][1], "the other steps do change weights"
            assert math.isnan(found["bad_norm"]), found
