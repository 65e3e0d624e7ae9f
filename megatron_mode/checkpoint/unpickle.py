"""Load checkpoints without running code: torch's weights-only unpickler and an allow-list."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from megatron_mode.errors import CheckpointError

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORCE_PICKLES = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Iterator[None]:
    """Make every torch.load inside refuse pickles, but for the three classes DeepSpeed saves."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # DeepSpeed asks torch for whole pickles; only the environment overrules what it asks for.
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
