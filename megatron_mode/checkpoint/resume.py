"""Resume a run if its checkpoint is intact and the past agrees; go back to an older one."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch

from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.files import load_tensors, weights_only
from megatron_mode.checkpoint.folders import (
    ASIDE,
    DAMAGED,
    candidates,
    current_checkpoint,
    find_step,
    finished_checkpoints,
    forget_after,
    set_aside,
    step_of,
    tag_of,
)
from megatron_mode.checkpoint.manifest import Manifest, check_shared, read_manifest, saved_config
from megatron_mode.checkpoint.reshard.universal import (
    cut_of,
    saved_cut,
    universal_for,
    universal_loading,
)
from megatron_mode.checkpoint.resumable import check_resumable, setting_differences
from megatron_mode.checkpoint.save import Checkpoints, precision_name
from megatron_mode.checkpoint.writer import use_writer
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError, DamagedError, HealthError
from megatron_mode.loss.normalise import BlockedShares
from megatron_mode.process.failures import is_torn

WAY_OUT = "mend that, or set checkpoint.fallback=true to resume from the one before"


def resume(run: Checkpoints, at_most: int | None = None) -> tuple[int, list[str]]:
    """Load a run's checkpoint into engine and record; return its step and notes to print.

    It is the one that `latest` or run.resume_from names, or before it the newest of `at_most`
    steps; 0 for a run without one. With `checkpoint.fallback` a damaged one is passed over. After
    one is loaded, the damaged and the newer are renamed and notes say so. Raises CheckpointError
    where one belongs to another config or order, or to another layout while `checkpoint.reshard`
    is never; DamagedError where a file is not what was written or the probe differs.
    """
    config = run.engine.config
    failed: dict[Path, str] = {}
    named = config.run.resume_from if at_most is None else None
    for candidate in from_rank_0(lambda: _choose(run.folder, named, at_most)):
        try:
            step, notes = _load(run, candidate)
        except DamagedError as error:
            what = str(error).partition("; ")[0]
            if not config.checkpoint.fallback:
                raise DamagedError(f"{what}; {WAY_OUT}") from None
            failed[candidate] = what
        except CheckpointError as error:
            passed = "".join(f"; passed over before: {what}" for what in failed.values())
            raise CheckpointError(f"{error}{passed}") from error
        else:
            aside = partial(_keep_aside, candidate, failed, with_newer=at_most is None)
            return step, from_rank_0(aside) + notes
    if failed:
        raise CheckpointError(
            f"no checkpoint of {run.folder.parent} is intact ({next(iter(failed.values()))}); all "
            "stay as they are: restore one, or start a new run.dir"
        )
    return 0, []


def _choose(checkpoints: Path, named: str | None, at_most: int | None) -> list[Path]:
    """List the checkpoints to try, newest first.

    run.resume_from counts until a checkpoint is saved with it: later starts do not go back again.
    """
    start = None
    if named is not None:
        saved_with = None
        with suppress(DamagedError, KeyError):
            if current := current_checkpoint(checkpoints):
                saved_with = read_manifest(current).config["run"].get("resume_from")
        if saved_with != named:
            step = int(named.removeprefix("step-"))
            start = find_step(checkpoints, step, f"run.resume_from is {named}")
    return candidates(checkpoints, at_most, start)


def _load(run: Checkpoints, folder: Path) -> tuple[int, list[str]]:
    """Load one checkpoint after every check that needs none of it; return its step and notes."""
    manifest = from_rank_0(lambda: _read(folder))
    check_shared(folder, manifest)
    engine, config, notes = run.engine, run.engine.config, list[str]()
    differences = setting_differences(manifest, run.record.settings)
    check_resumable(manifest, config, precision_name(config), differences)
    run.record.restore(manifest, run.order, config.batch.global_rows)
    saved = saved_cut(manifest)
    if saved == cut_of(engine):
        restore(engine, folder)
    else:  # its ranks held other parts
        universal = universal_for(engine, folder, manifest)
        restore(engine, universal, universal=True)
        notes = [f"note: {folder.name} was saved at {saved} and is loaded from {universal.name}"]
    run.probe.check(engine, manifest, folder)
    engine.blocked_shares = BlockedShares(*manifest.blocked_shares)
    engine.judge.restore(manifest.recent_losses, manifest.skips)
    return manifest.step, notes


def _read(folder: Path) -> Manifest:
    """Read a manifest that must be of this version and of the step in the folder's name."""
    manifest = read_manifest(folder)
    saved_config(manifest, folder)
    if folder.name != tag_of(manifest.step):
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {manifest.step}: rename it to "
            f"{tag_of(manifest.step)}, by which older ones are found"
        )
    return manifest


def restore(engine: Engine, folder: Path, *, universal: bool = False) -> None:
    """Load every rank's share of a checkpoint, weights, optimizer and generators.

    `universal` says that the folder is one that no layout cuts.
    """
    use_writer(engine)
    try:
        with weights_only(), universal_loading(engine) if universal else nullcontext():
            path, client_state = engine.deepspeed.load_checkpoint(
                str(folder.parent), tag=folder.name
            )
    except CheckpointError:
        raise
    except Exception as error:
        if is_torn(error):
            raise  # a peer is gone; the files are not to blame
        if isinstance(error, UnpicklingError):  # DeepSpeed reads universal files by itself
            with weights_only():
                for file in sorted(folder.rglob("*.pt")):
                    load_tensors(file, mmap=True)  # refuses the first by name
        raise CheckpointError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}): its files do not belong "
            "to this model and layout; name another checkpoint"
        ) from error
    if path is None:
        raise CheckpointError(f"{folder} could not be loaded: name a finished checkpoint folder")
    torch.set_rng_state(client_state["cpu_generator"])
    if torch.cuda.is_available() and "cuda_generator" in client_state:
        torch.cuda.set_rng_state(client_state["cuda_generator"])


def _keep_aside(taken: Path, failed: dict[Path, str], *, with_newer: bool) -> list[str]:
    """Rename damaged checkpoints and those newer than the one that was chosen; say so."""
    endings = dict.fromkeys(failed, DAMAGED)
    if with_newer:
        newest = max(map(step_of, (taken, *failed)))
        finished = finished_checkpoints(taken.parent)
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


def roll_back(run: Checkpoints, first: int, last: int) -> tuple[int, list[str]]:
    """Load the newest checkpoint from before steps `first` to `last`, which are left out.

    Returns the checkpoint's step and notes to print. Newer checkpoints hold what is to be left out:
    once the older one is loaded they are removed, and written again when the run comes there.
    Raises HealthError where no checkpoint is old enough. All ranks call it.
    """
    finished = from_rank_0(lambda: finished_checkpoints(run.folder))
    if not any(step_of(folder) <= first for folder in finished):
        planned = run.engine.config.health.leave_out_steps
        left_out = sorted({*planned, *run.record.skips, *range(first, last + 1)})
        without = f"delete {run.folder}, " if finished else ""
        raise HealthError(
            f"step {first} is to be left out, but {run.folder.parent} has no checkpoint from "
            f"before it to roll back to: {without}set health.leave_out_steps="
            f"[{','.join(map(str, left_out))}] and start the run again from its first step; a "
            "smaller checkpoint.every_steps or larger checkpoint.keep would have left one"
        )
    step, notes = resume(run, at_most=first)
    from_rank_0(lambda: forget_after(run.folder, step))
    return step, notes
