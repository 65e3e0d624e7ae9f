"""A step whose loss or gradient is not finite on any rank changes nothing on any rank."""

from __future__ import annotations

import math

import gate_rank
import gloo_world
import pytest

BF16 = {"run": {"precision": "bf16"}}
PLAIN = {"parallel": {"zero_stage": 0}}
WORLDS = {
    "tensor2-pipeline2": (
        (2, 2, 1),
        [
            # The second tensor rank's loss is a copy that nobody reports; its gradient counts.
            ("loss", 3, {}, "non_finite_gradient", "DeepSpeedZeroOptimizer"),
            ("loss", 2, {}, "non_finite_loss", "DeepSpeedZeroOptimizer"),
            ("gradient", 1, {}, "non_finite_gradient", "DeepSpeedZeroOptimizer"),
            ("gradient", 1, PLAIN, "non_finite_gradient", "AdamW"),
            ("gradient", 1, BF16, "non_finite_gradient", "BF16_Optimizer"),
        ],
    ),
    "data2": (
        (1, 1, 2),
        [
            ("loss", 1, {}, "non_finite_loss", "DeepSpeedZeroOptimizer"),
            ("gradient", 0, {}, "non_finite_gradient", "DeepSpeedZeroOptimizer"),
            ("loss", 1, PLAIN, "non_finite_loss", "AdamW"),
            ("loss", 0, BF16, "non_finite_loss", "BF16_Optimizer"),
        ],
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", WORLDS)
def test_a_step_that_is_not_finite_leaves_every_bit_as_it_was(name):
    layout, cases = WORLDS[name]
    size = math.prod(layout)
    told = gloo_world.run_world(size, gate_rank.run_cases, layout, [case[:3] for case in cases])
    for number, (*_, kind, optimizer) in enumerate(cases):
        for rank, found in enumerate(results[number] for results in told):
            where = (number, rank, found)
            assert found["optimizer"] == optimizer, where
            assert [v.action for v in found["verdicts"]] == ["apply", "skip", "apply"], where
            assert found["verdicts"][1].kind == kind, where
            assert [v.kind for v in found["planned"]] == [None] * 3, where
            assert [v.action for v in found["planned"]] == ["apply", "skip", "apply"], where
            assert found["changed"] == [], where
            assert found["moved"] > 0, where
            assert found["against_planned"] == [], where
            assert found["losses"][0] == found["losses"][1], where
            assert math.isnan(found["bad_norm"]), where
