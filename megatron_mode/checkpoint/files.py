"""Write, check and read the files of a checkpoint.

Each file is hashed as it is written and read back: the digest is of the bytes that were meant,
taken before they reach the disk; reading past the page cache compares it with what the disk kept.
Reading runs no code: torch's weights-only unpickler takes tensors, plain values and an allow-list.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeInt

from megatron_mode.atomic import HashedFile
from megatron_mode.checkpoint.collective import gather
from megatron_mode.errors import CheckpointError

HASHING_THREADS = 4
UNREADABLE = "cannot be read"
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORCE_PICKLES = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
UNLISTED = "is not among those of manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """State the size and the SHA-256 of a file."""

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


Records = dict[str, FileRecord]


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


def copy_durably(source: Path, target: Path) -> FileRecord:
    """Copy a small file and flush it to the disk."""
    with HashedFile(target) as file:
        file.write(source.read_bytes())
        file.sync()
    return FileRecord(**file.description)


def describe(path: Path) -> FileRecord:
    """Hash a file as it is on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def differences(
    folder: Path, files: Mapping[str, FileRecord], names: Collection[str]
) -> dict[str, str]:
    """Return what is wrong with the named files of a folder; several are hashed at a time."""
    with ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="digest") as pool:
        found = pool.map(lambda name: _difference(folder / name, files.get(name)), names)
        return {name: what for name, what in zip(names, found, strict=True) if what}


def shared_differences(folder: Path, files: Mapping[str, FileRecord]) -> dict[str, str]:
    """Return what is wrong with all files of a folder: each rank hashes a share, all get it all."""
    largest_first = sorted(files, key=lambda name: (-files[name].bytes, name))
    mine = differences(folder, files, largest_first[dist.get_rank() :: dist.get_world_size()])
    return {name: what for found in gather(mine) for name, what in found.items()}


def _difference(path: Path, expected: FileRecord | None) -> str:
    if expected is None:
        return UNLISTED
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


@contextmanager
def weights_only() -> Iterator[None]:
    """Make every torch.load inside refuse pickles, but for the three classes DeepSpeed saves."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # DeepSpeed asks torch for any pickle; only the environment overrules what it asks for.
    before = {name: os.environ.pop(name, None) for name in (FORCE_WEIGHTS_ONLY, FORCE_PICKLES)}
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        # Python before 3.11.4 pickles a member of an enum as getattr(class, name).
        classes = [LossScaler, ZeroStageEnum, fragment_address, (_enum_member, "builtins.getattr")]
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        del os.environ[FORCE_WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def load_tensors(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """Read a checkpoint file of tensors and plain values; CheckpointError names any other.

    Inside `weights_only` it may hold the classes allowed there. With `mmap` a tensor is read from
    the disk when it is used.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the checkpoint is not complete; name another"
        ) from None
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, and reading it could "
            f"run code ({_first_sentence(error)}); name a checkpoint that this program wrote"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}): the file is damaged; name another "
            "checkpoint"
        ) from error


def _first_sentence(error: Exception) -> str:
    """Return what the unpickler met, of its message of many lines."""
    for line in str(error).splitlines():
        if "GLOBAL" in line or "Unsupported" in line:
            return line.strip().split(" was not an allowed")[0]
    return type(error).__name__


def _enum_member(owner: object, name: str) -> Enum:
    """Stand in for getattr inside a checkpoint, where it may only name a member of an enum.

    Raises UnpicklingError for anything else.
    """
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner.__members__[name]
    raise UnpicklingError(f"a checkpoint asks for {name!r} of {owner!r}")
