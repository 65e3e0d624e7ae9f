"""Turn a checkpoint into a universal folder beside it, from which any layout can go on.

`step-NNNNNNNN-universal` is written under a `.partial` name, sealed by a manifest with the digest
of every file, and renamed: a kill leaves nothing that is taken for one. It names the digest of the
manifest it was made from and is used for no other. The checkpoint itself is only read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mode.atomic import rename_durably
from megatron_mode.checkpoint.files import FileRecord, describe, differences
from megatron_mode.checkpoint.folders import PARTIAL, remove, universal_of
from megatron_mode.checkpoint.manifest import MANIFEST_NAME, Manifest, read_sealed, write_sealed
from megatron_mode.checkpoint.native import NativeCheckpoint
from megatron_mode.checkpoint.universal import (
    Records,
    share_of,
    sync_folders,
    write_common,
    write_parameters,
)
from megatron_mode.config import Config
from megatron_mode.engine.parameter_names import checkpoint_parameters
from megatron_mode.engine.step import Engine
from megatron_mode.engine.topology import Layout
from megatron_mode.errors import CheckpointError
from megatron_mode.model.sharding import Cut, Whole

FORMAT = "universal 1"

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


def universal_manifest(source: Path) -> UniversalManifest | None:
    """Return the manifest of a checkpoint's universal folder; None where there is none of it.

    A folder that is damaged or was made from another checkpoint of the same step is none.
    """
    folder = universal_of(source)
    try:
        fields = read_sealed(folder)
        parameters = {
            name: Whole(tuple(shape), None if cut is None else Cut(*cut))
            for name, (shape, cut) in fields["parameters"].items()
        }
        files = {name: FileRecord(**record) for name, record in fields["files"].items()}
        found = UniversalManifest(**{**fields, "parameters": parameters, "files": files})
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError):
        return None
    made_from = (FORMAT, describe(source / MANIFEST_NAME).sha256)
    return found if (found.format, found.source_digest) == made_from else None


def open_native(source: Path, manifest: Manifest, tensor: int) -> NativeCheckpoint:
    """Open a checkpoint for reading by name; `tensor` is this process's tensor-parallel size."""
    config = Config.model_validate(manifest.config)
    wholes = checkpoint_parameters(config.model, tensor)
    return NativeCheckpoint(source, Layout(**manifest.layout), wholes)


def reshard(source: Path, native: NativeCheckpoint, threads: int, report: Report) -> Path:
    """Make the universal folder in this process alone; `report(1)` after each parameter.

    Raises CheckpointError where files do not hold what the manifest says, OSError where the disk
    is full.
    """
    partial = begin(source)
    try:
        records = write_common(native, partial)
        for written in write_parameters(native, partial, native.names, threads):
            records |= written
            report(1)
        return finish(partial, source, native, records)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def reshard_together(engine: Engine, source: Path, manifest: Manifest) -> Path:
    """Make the universal folder with all ranks, each writing a share; all ranks call it.

    Raises CheckpointError on every rank where it fails on one.
    """
    made: list[Path] = []
    partial = universal_of(source).with_name(universal_of(source).name + PARTIAL)
    with agreed(partial):
        if engine.rank == 0:
            begin(source)
    records: Records = {}
    native: NativeCheckpoint | None = None
    with agreed(partial):
        native = open_native(source, manifest, engine.layout.tensor)
        mine = share_of(native.names, engine.rank, engine.layout.world_size)
        if engine.rank == 0:
            records |= write_common(native, partial)
        for written in write_parameters(native, partial, mine, threads=1):
            records |= written
    shares: list[Records] = [{} for _ in range(engine.layout.world_size)]
    dist.all_gather_object(shares, records)
    with agreed(partial):
        if engine.rank == 0 and native is not None:
            together = {name: record for share in shares for name, record in share.items()}
            made.append(finish(partial, source, native, together))
    return universal_of(source)


def begin(source: Path) -> Path:
    """Make the folder to write into, and clear away what an earlier attempt left."""
    folder = universal_of(source)
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def finish(partial: Path, source: Path, native: NativeCheckpoint, records: Records) -> Path:
    """Seal what was written and give it its name."""
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
