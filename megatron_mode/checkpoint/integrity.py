"""Hold a checkpoint's files against its manifest before anything is read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_mode.checkpoint.files import UNREADABLE, differences, fair_share, unlisted
from megatron_mode.checkpoint.manifest import (
    MANIFEST_NAME,
    SEAL_NAME,
    TOKENIZER_NAME,
    Manifest,
)
from megatron_mode.errors import CheckpointError, DamagedError

MOST_NAMED = 4
# A corpus by Megatron's own tools has no tokenizer; its user may put one there.
NOT_LISTED = (MANIFEST_NAME, SEAL_NAME, TOKENIZER_NAME)


def check_files(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """Raise DamagedError naming those of the files that are not what the manifest says."""
    missing = [name for name in names if name not in manifest.files]
    found = dict.fromkeys(missing, f"is not among those of {MANIFEST_NAME}")
    known = [name for name in names if name in manifest.files]
    found |= differences(folder, manifest.files, known)
    _refuse(folder, found, "bring the files back or name another checkpoint")


def check_shared(folder: Path, manifest: Manifest) -> None:
    """Check all files of a checkpoint, each rank its share; every rank raises or none."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found = differences(folder, manifest.files, fair_share(manifest.files, rank, ranks))
    if rank == 0:
        extra = unlisted(folder, manifest.files, NOT_LISTED)
        found |= dict.fromkeys(extra, f"is not among those of {MANIFEST_NAME}")
    gathered: list[dict[str, str]] = [{} for _ in range(ranks)]
    dist.all_gather_object(gathered, found)
    _refuse(
        folder,
        {name: what for part in gathered for name, what in part.items()},
        "bring the files back, or set checkpoint.fallback=true to go on from the checkpoint before",
    )


def _refuse(folder: Path, found: dict[str, str], remedy: str) -> None:
    """Raise for what was found; what cannot be read may be whole, and is not called damaged."""
    if not found:
        return
    told = [f"{name} {what}" for name, what in sorted(found.items())[:MOST_NAMED]]
    if len(found) > MOST_NAMED:
        told.append(f"and {len(found) - MOST_NAMED} more files")
    if any(what.startswith(UNREADABLE) for what in found.values()):
        raise CheckpointError(
            f"{folder} cannot be checked: {', '.join(told)}; let its files be read, and start again"
        )
    raise DamagedError(f"{folder} is damaged: {', '.join(told)}; {remedy}")
