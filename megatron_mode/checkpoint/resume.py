"""Go on from the newest checkpoint of a run when it is sound and the past agrees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_mode.atomic import write_whole
from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.folders import (
    CHECKPOINTS_NAME,
    LATEST_NAME,
    candidates,
    set_aside,
    tag_of,
)
from megatron_mode.checkpoint.integrity import check_shared
from megatron_mode.checkpoint.manifest import Manifest, read_manifest, saved_config
from megatron_mode.checkpoint.order_record import OrderRecord, precision_name
from megatron_mode.checkpoint.probe import Probe, check_probe
from megatron_mode.checkpoint.replay import setting_differences
from megatron_mode.checkpoint.reshard.reshard import cut_of, saved_cut, universal_for
from megatron_mode.checkpoint.resumable import check_resumable
from megatron_mode.checkpoint.writer import restore
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError, DamagedError
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
    """Load the run's newest checkpoint into engine and record; return its step and notes to print.

    `at_most` takes the newest of so many steps. The step is 0 for a run without a checkpoint.
    Raises CheckpointError when the checkpoint belongs to another config or order, or while
    `checkpoint.reshard` is never to another layout, before anything is loaded, and when a file of
    it is not what was written or its probe differs; with `checkpoint.fallback` the ones before it
    are then tried. Once one of them is loaded those that failed are set aside, and notes say so.
    """
    failed: list[tuple[Path, DamagedError]] = []
    checkpoints = folder / CHECKPOINTS_NAME
    for candidate in from_rank_0(partial(candidates, checkpoints, at_most)):
        try:
            step, notes = _resume_from(engine, candidate, folder, record, order, probe)
        except DamagedError as error:
            if not engine.config.checkpoint.fallback:
                raise _with_way_out(error) from None
            failed.append((candidate, error))
            continue
        except CheckpointError as error:
            if not failed:
                raise
            raise CheckpointError(f"{error}; passed over before: {failed[0][1]}") from error
        if failed:
            aside = from_rank_0(partial(_set_aside, [path for path, _ in failed], candidate))
            warnings = [
                f"WARNING: {path.name} was set aside as {name}: {_what(error)}; {candidate.name} "
                "is taken instead"
                for name, (path, error) in zip(aside, failed, strict=True)
            ]
            notes = warnings + notes
        return step, notes
    if failed:
        raise CheckpointError(
            f"no checkpoint of {folder} is sound ({failed[0][1]}); all stay as they are: restore "
            "one, or start a new run.dir"
        )
    return 0, []


def _what(error: DamagedError) -> str:
    """Return what is wrong, without what to do about it."""
    return str(error).partition("; ")[0]


def _with_way_out(error: DamagedError) -> DamagedError:
    """Name the key that a run can be started with, where the sentence does not."""
    if "checkpoint.fallback" in str(error):
        return error
    return DamagedError(
        f"{_what(error)}; mend it, or set checkpoint.fallback=true to go on from the one before"
    )


def _resume_from(
    engine: Engine, newest: Path, folder: Path, record: OrderRecord, order: Order, probe: Probe
) -> tuple[int, list[str]]:
    manifest = from_rank_0(partial(_read, newest))
    check_shared(newest, manifest)
    config = engine.config
    differences = setting_differences(manifest, record.settings)
    check_resumable(manifest, config, precision_name(config), differences)
    record.restore(manifest, order, config.batch.global_rows)
    notes = _load(engine, newest, manifest, folder)
    found = probe.measure(engine)
    # Ranks on other machines than the one that wrote the manifest have other conditions.
    differs = engine.largest_over_ranks(found["conditions"] != manifest.probe["conditions"])
    check_probe(manifest.probe, found, manifest.precision, str(newest), exact=not differs)
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


def _set_aside(damaged: Sequence[Path], taken: Path) -> list[str]:
    """Rename what is not sound, and let `latest` name what was taken instead; return new names."""
    names = [set_aside(folder).name for folder in damaged]
    write_whole(taken.with_name(LATEST_NAME), f"{taken.name}\n")
    return names


def _load(engine: Engine, newest: Path, manifest: Manifest, run_dir: Path) -> list[str]:
    """Load a checkpoint, through its universal folder when its ranks held other parts."""
    saved = saved_cut(manifest)
    if saved == cut_of(engine):
        restore(engine, newest)
        return []
    folder = universal_for(engine, newest, manifest, run_dir)
    restore(engine, folder, universal=True)
    return [f"note: {newest.name} was saved at {saved} and is loaded from {folder.name}"]
