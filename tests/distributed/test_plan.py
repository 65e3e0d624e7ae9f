"""What the plan says of a rank is what a rank of a real world holds and writes."""

from __future__ import annotations

import equality_rank
import gloo_world
import plan_rank
import pytest

from megatron_mode.cost.ranks import checkpoint_files
from megatron_mode.cost.ranks import plan_rank as plan_of
from megatron_mode.cost.topology import Layout

FP32, BF16 = {}, {"run": {"precision": "bf16"}}
PLAIN = {"parallel": {"zero_stage": 0}}


@pytest.mark.distributed
def test_a_saved_checkpoint_and_the_bytes_of_ranks_are_as_planned(tmp_path):
    layout = Layout(tensor=2, pipeline=2, data=2)
    variants = [(True, FP32), (False, FP32), (True, BF16), (False, PLAIN)]
    results = gloo_world.run_world(
        layout.world_size, plan_rank.train_and_save, tuple(layout), variants, str(tmp_path)
    )
    for index, (tied, changes) in enumerate(variants):
        config = equality_rank.make_config(2, 2, 1, tied, 2, **changes)
        bf16 = changes is BF16
        everyones = []
        for rank, result in enumerate(results):
            written, parameters, held = result[index]
            plan = plan_of(config, layout, rank, bf16=bf16)
            assert sorted(written) == sorted(checkpoint_files(config, layout, rank, bf16=bf16))
            assert parameters == plan.parameters
            assert held == (plan.weights_bytes, plan.gradients_bytes, plan.optimizer_bytes), rank
            everyones += written
        found = {path.name for path in (tmp_path / f"v{index}").iterdir()}
        assert sorted(everyones) == sorted(found - {"zero_to_fp32.py"})
