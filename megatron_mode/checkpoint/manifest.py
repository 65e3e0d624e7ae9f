"""Describe a checkpoint in a file of its own, sealed by its SHA-256.

`manifest.json` names every other file of the folder with size and digest, and is the last to be
written; `manifest.json.sha256` beside it holds its own digest in the form of `sha256sum`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_mode.atomic import write_whole
from megatron_mode.checkpoint.files import FileRecord
from megatron_mode.config import Config
from megatron_mode.errors import CheckpointError

FORMAT = 2
MANIFEST_NAME = "manifest.json"
SEAL_NAME = "manifest.json.sha256"
TOKENIZER_NAME = "tokenizer.model"


@dataclass(frozen=True)
class Manifest:
    """State what a checkpoint holds; every field is JSON but `files`, which becomes so."""

    step: int
    tokens_seen: int
    config: dict[str, Any]
    layout: dict[str, int]
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
    fields = read_sealed(folder)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a manifest of format {FORMAT}: it was written by another version; "
            "start a new run.dir or use that version"
        )
    try:
        fields["recent_digests"] = [tuple(pair) for pair in fields["recent_digests"]]
        fields["blocked_shares"] = tuple(fields["blocked_shares"])
        fields["files"] = {name: FileRecord(**entry) for name, entry in fields["files"].items()}
        return _checked(Manifest(**fields))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): name another checkpoint or delete this one"
        ) from None


def read_sealed(folder: Path) -> Any:
    """Read the fields of a manifest; CheckpointError where they are missing or not as sealed."""
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
        fields = json.loads(data)
        seal = (folder / SEAL_NAME).read_bytes()
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise CheckpointError(
            f"{folder} holds no {missing}: name a finished checkpoint folder such as "
            "RUN/checkpoints/step-00000100"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): name another checkpoint or delete this one"
        ) from None
    if seal != f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_NAME}\n".encode():
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {SEAL_NAME}; name another "
            "checkpoint or delete this one"
        )
    return fields


def _checked(manifest: Manifest) -> Manifest:
    """Raise ValueError for fields of other kinds and for links that do not end in this step."""
    kinds = {
        "step": int,
        "config": dict,
        "layout": dict,
        "order": dict,
        "order_digest": str,
        "probe": dict,
        "skips": list,
        "recent_losses": list,
    }
    for name, kind in kinds.items():
        if not isinstance(getattr(manifest, name), kind):
            raise ValueError(f"{name} is {getattr(manifest, name)!r}")
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
