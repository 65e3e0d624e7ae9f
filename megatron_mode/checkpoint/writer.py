"""Stand in for DeepSpeed's checkpoint engine: copy each state aside, write it on a thread.

DeepSpeed hands every file it would write to `save` and every file it reads to `load`. `save`
returns as soon as the state is copied; `load` takes nothing but tensors and plain values.
"""

from __future__ import annotations

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

from megatron_mode.checkpoint.files import FileRecord, save_tensors
from megatron_mode.checkpoint.reshard.universal import universal_loading
from megatron_mode.checkpoint.snapshot import Snapshots
from megatron_mode.checkpoint.unpickle import load_tensors, weights_only
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError
from megatron_mode.process.failures import is_torn

Finish = Callable[[dict[str, FileRecord], Exception | None], None]


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
