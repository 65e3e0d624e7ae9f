"""Go on from the newest checkpoint of a run when it is sound and the past agrees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_mode.checkpoint.agreement import check_resumable
from megatron_mode.checkpoint.folders import (
    CHECKPOINTS_NAME,
    DAMAGED,
    clear_unfinished,
    newest_checkpoint,
    set_aside,
)
from megatron_mode.checkpoint.manifest import Manifest, read_manifest
from megatron_mode.checkpoint.probe import Probe, check_probe
from megatron_mode.checkpoint.record import OrderRecord, precision_name
from megatron_mode.checkpoint.reshard import cut_of, saved_cut, universal_for
from megatron_mode.checkpoint.sound import check_shared
from megatron_mode.checkpoint.together import from_rank_0
from megatron_mode.checkpoint.verify import setting_differences
from megatron_mode.checkpoint.writer import restore
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError
from megatron_mode.loss.normalise import BlockedShares
from megatron_mode.mix.order import Order


def resume(
    engine: Engine, folder: Path, record: OrderRecord, order: Order, probe: Probe
) -> tuple[int, list[str]]:
    """Load the run's newest checkpoint into engine and record; return its step and notes to print.

    The step is 0 for a run without a checkpoint. Raises CheckpointError when the checkpoint belongs
    to another config or order, or while `checkpoint.reshard` is never to another layout, before
    anything is loaded, and when a file of it is not what was written or its probe differs; with
    `checkpoint.fallback` the ones before it are then tried, and a note says so.
    """
    notes: list[str] = []
    while (newest := from_rank_0(partial(_choose, folder / CHECKPOINTS_NAME))) is not None:
        try:
            manifest = from_rank_0(partial(read_manifest, newest))
            check_shared(newest, manifest)
        except CheckpointError as error:
            notes.append(_fall_back(engine, newest, error))
            continue
        config = engine.config
        differences = setting_differences(manifest, record.settings)
        check_resumable(manifest, config, precision_name(config), differences)
        record.restore(manifest, order, config.batch.global_rows)
        notes += _load(engine, newest, manifest, folder)
        engine.blocked_shares = BlockedShares(*manifest.blocked_shares)
        engine.judge.restore(manifest.recent_losses, manifest.skips)
        try:
            found = probe.measure(engine)
            check_probe(manifest.probe, found, manifest.precision, str(newest))
        except CheckpointError as error:
            notes.append(_fall_back(engine, newest, error))
            continue
        return manifest.step, notes
    if notes:
        raise CheckpointError(
            f"no checkpoint of {folder} is left to go on from ({notes[-1]}); restore one, or start "
            "a new run.dir"
        )
    return 0, []


def _load(engine: Engine, newest: Path, manifest: Manifest, run_dir: Path) -> list[str]:
    """Load a checkpoint, through its universal folder when its ranks held other parts."""
    saved = saved_cut(manifest)
    if saved == cut_of(engine):
        restore(engine, newest)
        return []
    folder = universal_for(engine, newest, manifest, run_dir)
    restore(engine, folder, universal=True)
    return [f"note: {newest.name} was saved at {saved} and is loaded from {folder.name}"]


def _choose(checkpoints: Path) -> Path | None:
    """Clear up and return the newest checkpoint."""
    clear_unfinished(checkpoints)
    return newest_checkpoint(checkpoints)


def _fall_back(engine: Engine, folder: Path, error: CheckpointError) -> str:
    """Set a checkpoint aside that is not sound and return the note; raise where that is not asked.

    All ranks come here together: what one of them finds wrong, all of them raise.
    """
    if not engine.config.checkpoint.fallback:
        raise error
    dist.barrier()
    if engine.rank == 0:
        set_aside(folder)
    dist.barrier()
    return f"WARNING: {folder.name} was set aside as {folder.name}{DAMAGED}: {error}"
