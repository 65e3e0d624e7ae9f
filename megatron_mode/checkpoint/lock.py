"""Keep a second program out of a run's checkpoints: it would clear away what the first writes.

The lock is one of the file system (flock), so it goes with the process at the latest, however that
ends. Where a file system has none, nothing is checked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME
from megatron_mode.errors import CheckpointError
from megatron_mode.process.launch import Process

LOCK_NAME = ".lock"
# A run that was just killed may take a moment to go. A job that Slurm has put back in the queue
# comes from a node that may be dead, whose locks NFS keeps for a lease of ninety seconds.
PATIENCE_SECONDS, REQUEUED_PATIENCE_SECONDS = 10.0, 180.0


@contextlib.contextmanager
def run_lock(run_dir: Path, process: Process) -> Iterator[None]:
    """Hold a run's checkpoints inside; CheckpointError on all ranks where another program does."""
    patience_seconds = REQUEUED_PATIENCE_SECONDS if process.restarts else PATIENCE_SECONDS
    with contextlib.ExitStack() as stack:

        def take() -> None:
            (run_dir / CHECKPOINTS_NAME).mkdir(exist_ok=True)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            holder += f", job {process.job}" if process.job else ""
            stack.enter_context(held(run_dir / CHECKPOINTS_NAME, holder, patience_seconds))

        from_rank_0(take)
        yield


@contextlib.contextmanager
def held(checkpoints: Path, holder: str, patience_seconds: float) -> Iterator[None]:
    """Hold the checkpoints in this process; CheckpointError names the one that does."""
    try:
        descriptor: int | None = os.open(checkpoints / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        descriptor = None  # a disk that takes nothing: what is written there says so itself
    if descriptor is None:
        yield
        return
    with os.fdopen(descriptor, "r+b", buffering=0):
        _wait(descriptor, checkpoints, patience_seconds)
        _note(descriptor, holder)
        try:
            yield
        finally:
            _note(descriptor, "")


def _wait(descriptor: int, checkpoints: Path, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    told = patience_seconds <= PATIENCE_SECONDS
    while not _is_locked(descriptor):
        by = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{checkpoints} is in use by {by}: accepted is one run a folder; wait for its end, "
                "or choose another run.dir"
            )
        if not told:
            print(f"note: waits up to {patience_seconds:g} s for {by}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)


def _note(descriptor: int, holder: str) -> None:
    """Write who holds the lock, for those who find it taken; a full disk locks as well."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)


def _is_locked(descriptor: int) -> bool:
    """Try to lock; True also where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
