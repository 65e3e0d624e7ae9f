"""What each rank does in the test of blocked shares: take three steps and log none of them."""

from __future__ import annotations

import equality_rank
import gate_rank
import torch

BLOCKING = {
    "policy": "both",
    "direction": "both",
    "tau": 0.51,
    "cap": 1.0,
    "warmup_tokens": 0,
    "renormalise": True,
}


def train_unlogged(process, sizes, left_out):
    """Return for each step the sums of weights and of blocked weights here, shares and scales."""
    from megatron_mode.engine.build import build_mesh, join_group

    join_group(process, 1)
    config = equality_rank.make_config(*sizes[:2], 2, True, sizes[2])
    layout = build_mesh(config, process.world_size)
    sections = {"loss": {"mode_weight": 0.3, "blocking": BLOCKING}}
    engine, batches = gate_rank.make_engine(sections, layout, leave_out_steps=left_out)
    found = []
    for step, micro_batches in enumerate(batches):
        result = engine.train_step(step, micro_batches)
        sums = torch.zeros(4, dtype=torch.float64)
        for batch, loss in result.outputs:
            for index, weight_BT in enumerate((batch.lm_weight_BT, batch.mode_weight_BT)):
                sums[2 * index] += weight_BT.double().sum()
                sums[2 * index + 1] += weight_BT[loss.blocked_BT].double().sum()
        found.append((sums.numpy(), engine.blocked_shares, engine.step_loss.scales))
    return found
