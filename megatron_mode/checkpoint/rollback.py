"""Go back to a checkpoint in the middle of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME, forget_after
from megatron_mode.checkpoint.probe import Probe
from megatron_mode.checkpoint.record import OrderRecord
from megatron_mode.checkpoint.resume import resume
from megatron_mode.checkpoint.together import from_rank_0
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
    step = verdict.first_left_out
    if from_rank_0(partial(forget_after, folder / CHECKPOINTS_NAME, step)) is None:
        raise HealthError(
            f"step {step} is to be left out, but {folder} has no checkpoint from before it to roll "
            f"back to: set health.leave_out_steps to [{step}], or start with a smaller "
            "checkpoint.every_steps"
        )
    first_step, _ = resume(engine, folder, record, order, probe)
    return first_step
