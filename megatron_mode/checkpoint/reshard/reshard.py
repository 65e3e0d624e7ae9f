"""Turn a checkpoint into a universal folder beside it, from which any layout can go on.

`step-NNNNNNNN-universal` is written under a `.partial` name, sealed by a manifest with the digest
of every file, and renamed: a kill leaves nothing that is taken for one. It names the digest of the
manifest it was made from and is used for no other. The checkpoint itself is only read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from pydantic import TypeAdapter

from megatron_mode.atomic import rename_durably
from megatron_mode.checkpoint.collective import agreed, from_rank_0
from megatron_mode.checkpoint.files import (
    FileRecord,
    describe,
    differences,
    fair_share,
)
from megatron_mode.checkpoint.folders import PARTIAL, remove, universal_of
from megatron_mode.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    read_sealed,
    saved_config,
    write_sealed,
)
from megatron_mode.checkpoint.reshard.native import NativeCheckpoint
from megatron_mode.checkpoint.reshard.universal import (
    Records,
    check_parameters,
    files_of_parameters,
    share_of,
    sync_folders,
    write_common,
    write_parameters,
)
from megatron_mode.cost.topology import Layout
from megatron_mode.engine.pipeline import checkpoint_parameters
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError, refusal
from megatron_mode.model.sharding import Whole

FORMAT = "universal 1"
# Of each rank where all share the work: one reads while the other writes.
SHARED_THREADS = 2

Report = Callable[[int], object]


@dataclass(frozen=True)
class UniversalManifest:
    """State what a universal folder holds and what it was made from."""

    source: str
    source_digest: str
    layout: dict[str, int]
    parameters: dict[str, Whole]
    files: dict[str, FileRecord]
    format: str = FORMAT


_ADAPTER = TypeAdapter(UniversalManifest)


def cut_of(engine: Engine) -> str:
    """Name what decides which parts a rank of this run holds: the layout and the schedule."""
    return f"{engine.layout} ({engine.config.parallel.schedule})"


def saved_cut(manifest: Manifest) -> str:
    """Name the same of the run that saved a checkpoint."""
    schedule = manifest.config["parallel"].get("schedule", "1f1b")
    return f"{Layout(**manifest.layout)} ({schedule})"


def universal_manifest(source: Path) -> UniversalManifest | None:
    """Return the manifest of a checkpoint's universal folder; None where there is none of it.

    A folder that is damaged or was made from another checkpoint of the same step is none.
    """
    folder = universal_of(source)
    try:
        found = _ADAPTER.validate_json(read_sealed(folder), strict=True)
    except (CheckpointError, ValueError, RecursionError):
        return None
    if not files_of_parameters(found.parameters) <= found.files.keys():
        return None
    made_from = (FORMAT, describe(source / MANIFEST_NAME).sha256)
    return found if (found.format, found.source_digest) == made_from else None


def open_native(source: Path, manifest: Manifest, tensor: int) -> NativeCheckpoint:
    """Open a checkpoint for reading by name; `tensor` is this process's tensor-parallel size."""
    wholes = checkpoint_parameters(saved_config(manifest, source).model, tensor)
    return NativeCheckpoint(source, Layout(**manifest.layout), wholes)


def reshard(source: Path, native: NativeCheckpoint, threads: int, report: Report) -> Path:
    """Make the universal folder from opened parameters in this process; `report(1)` after each.

    Raises CheckpointError where files do not hold what the manifest says or the disk is full.
    """
    partial = begin(source)
    try:
        records = write_common(native, partial)
        for written in write_parameters(native, partial, native.names, threads):
            records |= written
            report(1)
        return finish(source, native, records)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(told(source, error)) from error
        raise


def reshard_together(engine: Engine, source: Path, manifest: Manifest) -> None:
    """Make the universal folder with all ranks, each writing a share; all ranks call it.

    Raises CheckpointError on every rank where it fails on one.
    """
    rank, ranks = engine.rank, engine.layout.world_size
    with _agreed(source):
        if rank == 0:
            begin(source)
    records: Records = {}
    with _agreed(source):
        native = open_native(source, manifest, engine.layout.tensor)
        mine = share_of(native.names, rank, ranks)
        native.open(mine)
        if rank == 0:
            records |= write_common(native, partial_of(source))
        for written in write_parameters(native, partial_of(source), mine, SHARED_THREADS):
            records |= written
    shares: list[Records] = [{} for _ in range(ranks)]
    dist.all_gather_object(shares, records)
    with _agreed(source):
        if rank == 0:
            finish(source, native, {name: of for share in shares for name, of in share.items()})


def universal_for(engine: Engine, source: Path, manifest: Manifest, run_dir: Path) -> Path:
    """Return a sound universal folder of a checkpoint whose ranks held other parts.

    All ranks call it. One that is there is checked and taken; else `checkpoint.reshard` decides.
    Raises CheckpointError naming both layouts and the command that makes one.
    """
    folder, found = universal_of(source), from_rank_0(partial(universal_manifest, source))
    if found is None or not _is_sound(folder, found):
        if engine.config.checkpoint.reshard == "never":
            to = f"tensor={engine.layout.tensor},pipeline={engine.layout.pipeline}"
            raise CheckpointError(
                f"{source} was saved at {saved_cut(manifest)}, this run is at {cut_of(engine)}: "
                "accepted is the saved layout while checkpoint.reshard is never; set "
                "checkpoint.reshard=auto, or make it fit with `megatron-mode reshard "
                f"{run_dir} --to {to}`"
            )
        reshard_together(engine, source, manifest)
        found = from_rank_0(partial(universal_manifest, source))
    if found is None:
        raise CheckpointError(f"{folder} was just made and is not sound: check the disk")
    check_parameters(engine, found.parameters, folder)
    return folder


def partial_of(source: Path) -> Path:
    """Return the folder that becomes the universal folder of a checkpoint."""
    folder = universal_of(source)
    return folder.with_name(folder.name + PARTIAL)


def begin(source: Path) -> Path:
    """Make the folder to write into, and clear away what an earlier attempt left."""
    partial = partial_of(source)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def finish(source: Path, native: NativeCheckpoint, records: Records) -> Path:
    """Seal what was written and give it its name."""
    partial = partial_of(source)
    manifest = UniversalManifest(
        source=source.name,
        source_digest=describe(source / MANIFEST_NAME).sha256,
        layout=native.layout._asdict(),
        parameters=dict(native.wholes),
        files=dict(sorted(records.items())),
    )
    sync_folders(partial)
    write_sealed(partial, asdict(manifest))
    folder = universal_of(source)
    if folder.exists():
        remove(folder)
    rename_durably(partial, folder)
    return folder


def _is_sound(folder: Path, manifest: UniversalManifest) -> bool:
    """Check every file of a folder, each rank its share; the same answer on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    answers: list[dict[str, str]] = [{} for _ in range(ranks)]
    mine = differences(folder, manifest.files, fair_share(manifest.files, rank, ranks))
    dist.all_gather_object(answers, mine)
    return not any(answers)


@contextmanager
def _agreed(source: Path) -> Iterator[None]:
    """Raise on every rank what is raised on one inside, and clear away what was written."""
    try:
        with agreed(partial(told, source)):
            yield
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial_of(source), ignore_errors=True)
        raise


def told(source: Path, error: OSError) -> str:
    """Say in a sentence why a checkpoint could not be rewritten."""
    return refusal(universal_of(source), error, f"try again, {source.name} is as it was")
