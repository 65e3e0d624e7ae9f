"""Describe a checkpoint in a file of its own, sealed by its SHA-256.

`manifest.json` names every other file of the folder with size and digest, and is the last to be
written; `manifest.json.sha256` beside it holds its own digest in the form of `sha256sum`. Files are
compared with it before anything is read from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import PositiveInt, TypeAdapter, ValidationError

from megatron_mode.atomic import write_whole
from megatron_mode.checkpoint.files import (
    UNREADABLE,
    FileRecord,
    differences,
    fair_share,
    unlisted,
)
from megatron_mode.config import Config
from megatron_mode.errors import CheckpointError, DamagedError

FORMAT = 2
MANIFEST_NAME = "manifest.json"
SEAL_NAME = "manifest.json.sha256"
TOKENIZER_NAME = "tokenizer.model"
MOST_NAMED = 4
# A corpus by Megatron's own tools has no tokenizer; its user may put one there.
NOT_LISTED = (MANIFEST_NAME, SEAL_NAME, TOKENIZER_NAME)


@dataclass(frozen=True)
class Manifest:
    """State what a checkpoint holds; every field is JSON but `files`, which becomes so."""

    step: int
    tokens_seen: int
    config: dict[str, Any]
    layout: dict[str, PositiveInt]
    precision: str
    order: dict[str, Any]
    order_digest: str
    recent_digests: list[tuple[int, str]]
    blocked_shares: tuple[float, float]
    versions: dict[str, str]
    probe: dict[str, Any]
    skips: list[int] = field(default_factory=list)
    """Steps whose updates were left out, by `health`; the order's digest holds them too."""
    recent_losses: list[float] = field(default_factory=list)
    """What `health` judges the next steps by."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    format: int = FORMAT

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """Return the manifest that names these files."""
        return replace(self, files=dict(sorted(files.items())))


_ADAPTER = TypeAdapter(Manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its seal, durably."""
    write_sealed(folder, asdict(manifest))


def write_sealed(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write a manifest's fields and their seal, durably."""
    text = json.dumps(fields, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_whole(folder / SEAL_NAME, f"{digest}  {MANIFEST_NAME}\n")
    write_whole(folder / MANIFEST_NAME, text)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest; CheckpointError when it is missing, damaged or not ours."""
    path = folder / MANIFEST_NAME
    data = read_sealed(folder)
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is not a manifest of format {FORMAT}: it was written by another version; "
                "start a new run.dir or use that version"
            )
        return _checked(_ADAPTER.validate_json(data, strict=True))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        what = str(error)
    raise DamagedError(f"{path} is damaged ({what}): name another checkpoint or delete this one")


def read_sealed(folder: Path) -> bytes:
    """Read a manifest's text; CheckpointError where it is missing or not as sealed."""
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
        seal = (folder / SEAL_NAME).read_bytes()
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise DamagedError(
            f"{folder} holds no {missing}: name a finished checkpoint folder such as "
            "RUN/checkpoints/step-00000100"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): let it be read, or name another checkpoint"
        ) from None
    if seal != f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_NAME}\n".encode():
        raise DamagedError(
            f"{path} is damaged: its SHA-256 is not the one in {SEAL_NAME}; name another "
            "checkpoint or delete this one"
        )
    return data


def _checked(manifest: Manifest) -> Manifest:
    """Raise ValueError for what the fields' types do not say."""
    if sorted(manifest.layout) != ["data", "pipeline", "tensor"]:
        raise ValueError(f"layout names {', '.join(manifest.layout) or 'nothing'}")
    if not {"lm_loss", "mode_loss", "conditions"} <= manifest.probe.keys():
        raise ValueError(f"probe names {', '.join(manifest.probe) or 'nothing'}")
    if not manifest.recent_digests or manifest.recent_digests[-1][0] != manifest.step:
        raise ValueError(f"recent_digests do not end with step {manifest.step}")
    return manifest


def saved_config(manifest: Manifest, folder: Path) -> Config:
    """Return the config of the run that saved a checkpoint."""
    try:
        return Config.model_validate(manifest.config)
    except ValueError as error:
        raise CheckpointError(
            f"the manifest of {folder} holds no config of this version ({type(error).__name__}): "
            "name another checkpoint or use the version that wrote it"
        ) from None


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
