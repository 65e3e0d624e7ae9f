"""Write and check the files of a checkpoint: each is hashed as it is written and read back.

The digest is of the bytes that were meant, taken before they reach the disk; reading the file back
past the page cache holds what the disk kept against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt

from megatron_mode.atomic import HashedFile

HASHING_THREADS = 4
UNREADABLE = "cannot be read"


@dataclass(frozen=True)
class FileRecord:
    """State the size and the SHA-256 of a file."""

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def save_tensors(state: Any, path: Path) -> FileRecord:
    """Write a state in torch's zip format, flush it to the disk and read it back.

    Raises OSError where the disk is full or kept other bytes than it was given.
    """
    # SHA-256 replaces the zip's own CRC-32, which takes longer than everything else together.
    torch.serialization.set_crc32_options(False)
    with HashedFile(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # what the system said
                raise error.__context__ from None
            raise
        file.sync()
    record = FileRecord(**file.description)
    if describe(path) != record:
        raise OSError(f"the disk kept other bytes of {path} than were written")
    return record


def describe(path: Path) -> FileRecord:
    """Hash a file as it lies on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def copy_durably(source: Path, target: Path) -> FileRecord:
    """Copy a small file and flush it to the disk."""
    with HashedFile(target) as file:
        file.write(source.read_bytes())
        file.sync()
    return FileRecord(**file.description)


def fair_share(files: Mapping[str, FileRecord], index: int, count: int) -> Sequence[str]:
    """Deal files out to `count` processes, largest first, in turns."""
    by_size = sorted(files, key=lambda name: (-files[name].bytes, name))
    return by_size[index::count]


def differences(
    folder: Path, files: Mapping[str, FileRecord], names: Iterable[str]
) -> dict[str, str]:
    """Return what is wrong with the named files of a folder; several are hashed at a time."""
    with ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="digest") as pool:
        chosen = list(names)
        found = pool.map(lambda name: _difference(folder / name, files[name]), chosen)
        return {name: what for name, what in zip(chosen, found, strict=True) if what}


def unlisted(folder: Path, files: Mapping[str, FileRecord], known: Iterable[str]) -> list[str]:
    """Name what lies in a checkpoint's folder without standing in its manifest."""
    return sorted({path.name for path in folder.iterdir()} - set(files) - set(known))


def _difference(path: Path, expected: FileRecord) -> str:
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"has {size} bytes instead of {expected.bytes}"
        found = describe(path).sha256
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"{UNREADABLE} ({error.strerror})"
    if found != expected.sha256:
        return f"has SHA-256 {found[:12]} instead of {expected.sha256[:12]}"
    return ""
