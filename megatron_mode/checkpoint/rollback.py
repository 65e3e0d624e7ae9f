"""Go back to a checkpoint in the middle of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.folders import (
    CHECKPOINTS_NAME,
    finished_checkpoints,
    forget_after,
    step_of,
)
from megatron_mode.checkpoint.order_record import OrderRecord
from megatron_mode.checkpoint.probe import Probe
from megatron_mode.checkpoint.resume import resume
from megatron_mode.engine.step import Engine
from megatron_mode.errors import HealthError
from megatron_mode.mix.order import Order


def roll_back(
    engine: Engine,
    folder: Path,
    record: OrderRecord,
    order: Order,
    probe: Probe,
    *,
    first: int,
    last: int,
) -> tuple[int, list[str]]:
    """Load the newest checkpoint from before steps `first` to `last`, which are left out.

    Returns the checkpoint's step and notes to print. Newer checkpoints hold what is to be left out:
    once the older one is loaded they are removed, and written again when the run comes there.
    Raises HealthError where no checkpoint is old enough. All ranks call it.
    """
    checkpoints = folder / CHECKPOINTS_NAME
    finished = from_rank_0(partial(finished_checkpoints, checkpoints))
    if not any(step_of(folder) <= first for folder in finished):
        left_out = sorted({*engine.config.health.leave_out_steps, *record.skips,
                           *range(first, last + 1)})  # fmt: skip
        without = f"delete {checkpoints}, " if finished else ""
        raise HealthError(
            f"step {first} is to be left out, but {folder} has no checkpoint from before it to "
            f"roll back to: {without}set health.leave_out_steps=[{','.join(map(str, left_out))}] "
            "and start the run again from its first step; a smaller checkpoint.every_steps or "
            "larger checkpoint.keep would have left one"
        )
    step, notes = resume(engine, folder, record, order, probe, at_most=first)
    from_rank_0(partial(forget_after, checkpoints, step))
    return step, notes
