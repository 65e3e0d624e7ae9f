"""Write and check the files of a checkpoint: each is hashed as it is written and read back.

The digest is of the bytes that were meant, taken before they reach the disk; reading the file back
past the page cache holds what the disk kept against it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import torch
from pydantic import Field, NonNegativeInt

HASHING_THREADS = 4
UNREADABLE = "cannot be read"
# torch's writers say a failed write so; the last where it fails while the file is closed.
TORN_FILE_SIGNS = ("PytorchStreamWriter", "inline_container", "iostream error")


@dataclass(frozen=True)
class FileRecord:
    """State the size and the SHA-256 of a file."""

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class HashingFile:
    """Pass writes on to a file and hash them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        self._hash.update(data)
        self._bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self._file.flush()

    @property
    def record(self) -> FileRecord:
        """Describe what was written so far."""
        return FileRecord(self._bytes, self._hash.hexdigest())


def save_tensors(state: Any, path: Path) -> FileRecord:
    """Write a state in torch's zip format, flush it to the disk and read it back.

    Raises OSError where the disk is full or kept other bytes than it was given.
    """
    # SHA-256 replaces the zip's own CRC-32, which takes longer than everything else together.
    torch.serialization.set_crc32_options(False)
    with path.open("wb") as file:
        stream = HashingFile(file)
        torch.save(state, cast(Any, stream))  # it needs no more of a file than write and flush
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = describe(path)
    if found != stream.record:
        raise OSError(f"the disk kept other bytes of {path} than were written")
    return stream.record


def is_write_failure(error: BaseException) -> bool:
    """Tell whether the disk refused a write; torch's own writer says so with a RuntimeError."""
    torn = isinstance(error, RuntimeError) and any(sign in str(error) for sign in TORN_FILE_SIGNS)
    return torn or isinstance(error, OSError)


def write_failure(folder: Path, error: BaseException, remedy: str) -> str:
    """Say that a folder cannot be written, why, and what to do."""
    if not is_write_failure(error):
        return f"{folder} cannot be written ({type(error).__name__}: {error}): {remedy}"
    reason, number = "a write failed", errno.ENOSPC  # torch does not say why
    if isinstance(error, OSError):
        reason, number = error.strerror or str(error), error.errno or 0
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{folder} cannot be written ({reason}): look at the disk and the folder, and {remedy}"
        )
    try:
        left = f"the disk has {shutil.disk_usage(folder.parent).free} bytes left"
    except OSError:
        left = "its folder is gone"
    return f"{folder} cannot be written ({reason}): {left}; free space and {remedy}"


def describe(path: Path) -> FileRecord:
    """Hash a file as it lies on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def copy_durably(source: Path, target: Path) -> FileRecord:
    """Copy a small file and flush it to the disk."""
    with target.open("wb") as file:
        stream = HashingFile(file)
        stream.write(source.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    return stream.record


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
