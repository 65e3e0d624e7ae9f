"""Stand in for DeepSpeed's checkpoint engine: copy each state aside, write it on a thread.

DeepSpeed hands every file it would write to `save` and every file it reads to `load`. `save`
returns as soon as the state is copied; `load` takes nothing but tensors and plain values. The
copies use buffers that are kept from one checkpoint to the next: touching new memory takes several
times as long as copying into it (0.93 s against 0.16 s for 512 MB on two cores).
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from torch import Tensor

from megatron_mode.checkpoint.files import FileRecord, save_tensors
from megatron_mode.checkpoint.reshard.universal import universal_loading
from megatron_mode.checkpoint.unpickle import load_tensors, weights_only
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError
from megatron_mode.process.failures import is_torn

Finish = Callable[[dict[str, FileRecord], Exception | None], None]


class Snapshots:
    """Copy nested states into kept buffers, page-locked where they come from a GPU.

    A buffer is named by the state's name and the tensor's place in it, so that the states of the
    next checkpoint find the buffers of the last.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._taken = 0

    def take(self, name: str, state: Any) -> Any:
        """Return the state with every tensor copied; a view is copied alone, not its storage.

        On a GPU the copies are in flight until the device is synchronised.
        """
        self._taken = 0
        return self._copy(name, state)

    def _copy(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(name, value)
        if isinstance(value, dict):
            found = copy.copy(value)  # keeps an OrderedDict what it is
            for key, inner in value.items():
                found[key] = self._copy(name, inner)
            return found
        if type(value) in (list, tuple, set):
            return type(value)(self._copy(name, inner) for inner in value)
        return copy.deepcopy(value)

    def _copy_tensor(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        place = (name, self._taken)
        self._taken += 1
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
            )
            self._buffers[place] = buffer
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)


class CheckpointWriter(CheckpointEngine):
    """Write this rank's files of one checkpoint at a time, in the background."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "megatron_mode"
        self._snapshots = Snapshots()
        self._pending: list[tuple[Path, Any]] = []
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a checkpoint."""
        self._pending = []

    def save(self, state_dict: Any, path: str) -> None:
        """Copy a state; `write` writes it."""
        target = Path(path)
        self._pending.append((target, self._snapshots.take(target.name, state_dict)))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file; CheckpointError names one that holds more than tensors and plain values."""
        return load_tensors(Path(path), map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Leave the states to `write`."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """Spare DeepSpeed's own copies: a snapshot holds a view without its storage."""
        return False

    def write(self, finish: Finish) -> None:
        """Write the states saved since `create` on the thread, then call `finish` there.

        `finish` gets the records of all files, and the error that stopped the writing or None.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pending, self._pending = self._pending, []
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        self._jobs.put(lambda: _write_all(pending, finish))

    def _run(self) -> None:
        while True:
            self._jobs.get()()


def use_writer(engine: Engine) -> CheckpointWriter:
    """Return the engine's writer; DeepSpeed's own is replaced the first time."""
    found = engine.deepspeed.checkpoint_engine
    if not isinstance(found, CheckpointWriter):
        found = engine.deepspeed.checkpoint_engine = CheckpointWriter()
    return found


def _write_all(pending: list[tuple[Path, Any]], finish: Finish) -> None:
    records: dict[str, FileRecord] = {}
    failure: Exception | None = None
    try:
        for path, state in pending:
            records[path.name] = save_tensors(state, path)
    except Exception as error:  # told by the training loop, which asks for it
        failure = error
    finish(records, failure)


def _refuse_by_name(folder: Path) -> None:
    """Raise CheckpointError naming the first file of a folder that is not safe to load."""
    with weights_only():
        for path in sorted(folder.rglob("*.pt")):
            load_tensors(path, mmap=True)


def restore(engine: Engine, folder: Path, *, universal: bool = False) -> None:
    """Load every rank's share of a checkpoint, weights, optimizer and generators.

    `universal` says that the folder is one that no layout cuts.
    """
    use_writer(engine)
    try:
        with weights_only(), universal_loading(engine) if universal else nullcontext():
            path, client_state = engine.deepspeed.load_checkpoint(
                str(folder.parent), tag=folder.name
            )
    except CheckpointError:
        raise
    except Exception as error:
        if is_torn(error):
            raise  # a peer is gone; the files are not to blame
        if isinstance(error, UnpicklingError):
            _refuse_by_name(folder)  # DeepSpeed reads universal files by itself
        raise CheckpointError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}): its files do not belong "
            "to this model and layout; name another checkpoint"
        ) from error
    if path is None:
        raise CheckpointError(f"{folder} could not be loaded: name a finished checkpoint folder")
    torch.set_rng_state(client_state["cpu_generator"])
    if torch.cuda.is_available() and "cuda_generator" in client_state:
        torch.cuda.set_rng_state(client_state["cuda_generator"])
