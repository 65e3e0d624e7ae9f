"""Go back to a checkpoint in the middle of a run."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME, forget_after
from megatron_mode.checkpoint.probe import Probe
from megatron_mode.checkpoint.record import OrderRecord
from megatron_mode.checkpoint.resume import resume
from megatron_mode.engine.health import Verdict
from megatron_mode.engine.step import Engine
from megatron_mode.errors import HealthError
from megatron_mode.mix.order import Order


def roll_back(
    engine: Engine, folder: Path, record: OrderRecord, order: Order, probe: Probe, verdict: Verdict
) -> int:
    """Load the newest checkpoint from before what a verdict leaves out; return its step.

    Newer ones hold what is to be left out: they are removed, and written again when the run comes
    there. Raises HealthError where no checkpoint is old enough. All ranks call it.
    """
    step, found = verdict.first_left_out, [True]
    if engine.rank == 0:
        found = [forget_after(folder / CHECKPOINTS_NAME, step) is not None]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        raise HealthError(
            f"step {step} is to be left out, but {folder} has no checkpoint from before it to roll "
            f"back to: set health.leave_out_steps to [{step}], or start with a smaller "
            "checkpoint.every_steps"
        )
    first_step, _ = resume(engine, folder, record, order, probe)
    return first_step
