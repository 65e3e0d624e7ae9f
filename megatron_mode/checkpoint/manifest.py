"""Describe a checkpoint in a file of its own, sealed by its SHA-256.

`manifest.json` names every other file of the folder with size and digest, and is the last to be
written; `manifest.json.sha256` beside it holds its own digest in the form of `sha256sum`. Files are
compared with it before anything is read from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, TypeAdapter, ValidationError

from megatron_mode.atomic import write_whole
from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.files import (
    UNLISTED,
    UNREADABLE,
    Records,
    differences,
    shared_differences,
)
from megatron_mode.config import Config
from megatron_mode.errors import CheckpointError, DamagedError

FORMAT = 2
MANIFEST_NAME = "manifest.json"
SEAL_NAME = "manifest.json.sha256"
TOKENIZER_NAME = "tokenizer.model"
MOST_NAMED = 4


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
    files: Records = field(default_factory=dict)
    format: int = FORMAT


_ADAPTER = TypeAdapter(Manifest)


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
            f"{path} cannot be read ({error.strerror}): make it readable, or name another "
            "checkpoint"
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


def check_files(folder: Path, manifest: Manifest, names: Collection[str]) -> None:
    """Raise DamagedError naming those of the files that are not what the manifest says."""
    _refuse(folder, differences(folder, manifest.files, names))


def check_shared(folder: Path, manifest: Manifest) -> None:
    """Check all files of a checkpoint, each rank its share; every rank raises or none."""
    found = shared_differences(folder, manifest.files)
    # A corpus by Megatron's own tools has no tokenizer; its user may put one there.
    known = {*manifest.files, MANIFEST_NAME, SEAL_NAME, TOKENIZER_NAME}
    names = from_rank_0(lambda: {path.name for path in folder.iterdir()})
    _refuse(folder, found | dict.fromkeys(names - known, UNLISTED))


def _refuse(folder: Path, found: dict[str, str]) -> None:
    """Raise for what was found; what cannot be read may be intact, and is not called damaged."""
    if not found:
        return
    said = [f"{name} {what}" for name, what in sorted(found.items())]
    if len(said) > MOST_NAMED:
        said[MOST_NAMED:] = [f"and {len(said) - MOST_NAMED} more files"]
    if any(what.startswith(UNREADABLE) for what in found.values()):
        raise CheckpointError(
            f"{folder} cannot be checked: {', '.join(said)}; make its files readable, and start "
            "again"
        )
    raise DamagedError(
        f"{folder} is damaged: {', '.join(said)}; bring the files back or name another checkpoint"
    )
