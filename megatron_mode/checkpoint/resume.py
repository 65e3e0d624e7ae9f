"""Resume a run if its checkpoint is intact and the past agrees; go back to an older one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.folders import (
    ASIDE,
    CHECKPOINTS_NAME,
    DAMAGED,
    candidates,
    current_checkpoint,
    finished_checkpoints,
    forget_after,
    named_in_config,
    set_aside,
    step_of,
    tag_of,
)
from megatron_mode.checkpoint.manifest import Manifest, check_shared, read_manifest, saved_config
from megatron_mode.checkpoint.order_record import OrderRecord, precision_name
from megatron_mode.checkpoint.probe import Probe
from megatron_mode.checkpoint.replay import setting_differences
from megatron_mode.checkpoint.reshard.reshard import cut_of, saved_cut, universal_for
from megatron_mode.checkpoint.resumable import check_resumable
from megatron_mode.checkpoint.writer import restore
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError, DamagedError, HealthError
from megatron_mode.loss.normalise import BlockedShares
from megatron_mode.mix.order import Order


def resume(
    engine: Engine,
    folder: Path,
    record: OrderRecord,
    order: Order,
    probe: Probe,
    *,
    at_most: int | None = None,
) -> tuple[int, list[str]]:
    """Load the run's checkpoint into engine and record; return its step and notes to print.

    It is the one that `latest` or run.resume_from names, or before it the newest of `at_most`
    steps; 0 for a run without one. With `checkpoint.fallback` a damaged one is passed over. After
    one is loaded, the damaged and the newer are renamed and notes say so. Raises CheckpointError
    where one belongs to another config or order, or to another layout while `checkpoint.reshard`
    is never; DamagedError where a file is not what was written or the probe differs.
    """
    checkpoints = folder / CHECKPOINTS_NAME
    failed: dict[Path, str] = {}
    step, notes = 0, list[str]()
    named = engine.config.run.resume_from if at_most is None else None
    for candidate in from_rank_0(partial(_choose, checkpoints, named, at_most)):
        try:
            step, notes = _load(engine, candidate, record, order, probe)
        except DamagedError as error:
            if not engine.config.checkpoint.fallback:
                raise _with_way_out(error) from None
            failed[candidate] = str(error).partition("; ")[0]
        except CheckpointError as error:
            passed = "".join(f"; passed over before: {what}" for what in failed.values())
            raise CheckpointError(f"{error}{passed}") from error
        else:
            aside = partial(_keep_aside, candidate, failed, with_newer=at_most is None)
            return step, from_rank_0(aside) + notes
    if failed:
        raise CheckpointError(
            f"no checkpoint of {folder} is intact ({next(iter(failed.values()))}); all stay as "
            "they are: restore one, or start a new run.dir"
        )
    return step, notes


def _choose(checkpoints: Path, named: str | None, at_most: int | None) -> list[Path]:
    """List the checkpoints to try, newest first.

    run.resume_from counts until a checkpoint is saved with it: later starts do not go back again.
    """
    start = None
    if named is not None:
        current = current_checkpoint(checkpoints)
        if current is None or _saved_with(current) != named:
            start = named_in_config(checkpoints, named)
    return candidates(checkpoints, at_most, start)


def _saved_with(folder: Path) -> str | None:
    """Return the run.resume_from of the run that saved a checkpoint; None also where unreadable."""
    try:
        name: str | None = read_manifest(folder).config["run"].get("resume_from")
    except (DamagedError, KeyError):
        return None
    return name


def _load(
    engine: Engine, folder: Path, record: OrderRecord, order: Order, probe: Probe
) -> tuple[int, list[str]]:
    """Load one checkpoint after every check that needs none of it; return its step and notes."""
    manifest = from_rank_0(partial(_read, folder))
    check_shared(folder, manifest)
    config, notes = engine.config, list[str]()
    differences = setting_differences(manifest, record.settings)
    check_resumable(manifest, config, precision_name(config), differences)
    record.restore(manifest, order, config.batch.global_rows)
    saved = saved_cut(manifest)
    if saved == cut_of(engine):
        restore(engine, folder)
    else:  # its ranks held other parts
        universal = universal_for(engine, folder, manifest, folder.parent.parent)
        restore(engine, universal, universal=True)
        notes = [f"note: {folder.name} was saved at {saved} and is loaded from {universal.name}"]
    probe.check(engine, manifest, folder)
    engine.blocked_shares = BlockedShares(*manifest.blocked_shares)
    engine.judge.restore(manifest.recent_losses, manifest.skips)
    return manifest.step, notes


def _read(folder: Path) -> Manifest:
    """Read a manifest that must be of this version and of the step in the folder's name."""
    manifest = read_manifest(folder)
    saved_config(manifest, folder)
    if folder.name != tag_of(manifest.step):
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {manifest.step}: accepted is "
            f"{tag_of(manifest.step)}, by which older ones are found; rename it"
        )
    return manifest


def _keep_aside(taken: Path, failed: dict[Path, str], *, with_newer: bool) -> list[str]:
    """Rename damaged checkpoints and those newer than the one that was chosen; say so."""
    endings = dict.fromkeys(failed, DAMAGED)
    if with_newer:
        finished = finished_checkpoints(taken.parent)
        newest = max(map(step_of, (taken, *failed)))
        endings |= {path: ASIDE for path in finished if step_of(path) > newest}
    names = set_aside(taken, endings) if endings else {}
    return [
        f"WARNING: {path.name} was set aside as {name}: {failed[path]}; {taken.name} is taken "
        "instead"
        if path in failed
        else f"note: {path.name} is newer than {taken.name}, which this run was asked to resume "
        f"from; it is kept as {name}"
        for path, name in names.items()
    ]


def _with_way_out(error: DamagedError) -> DamagedError:
    """Name the key that a run can be started with, where the sentence does not."""
    what = str(error).partition("; ")[0]
    if "checkpoint.fallback" in str(error):
        return error
    return DamagedError(
        f"{what}; mend it, or set checkpoint.fallback=true to resume from the one before"
    )


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
