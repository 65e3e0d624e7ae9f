"""Keep a second program out of a run's checkpoints: it would clear away what the first writes.

The lock is one of the file system (flock), so it goes with the process, however that ends. Where a
file system has none, nothing is checked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME
from megatron_mode.checkpoint.together import from_rank_0
from megatron_mode.errors import CheckpointError

LOCK_NAME = ".lock"
# A run that was just killed may take a moment to go.
PATIENCE_SECONDS = 10.0


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run's checkpoints inside; CheckpointError on all ranks where another program does."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            (run_dir / CHECKPOINTS_NAME).mkdir(exist_ok=True)
            stack.enter_context(held(run_dir / CHECKPOINTS_NAME))

        from_rank_0(take)
        yield


@contextlib.contextmanager
def held(checkpoints: Path) -> Iterator[None]:
    """Hold the checkpoints in this process; CheckpointError names the one that does."""
    try:
        file = (checkpoints / LOCK_NAME).open("a+b", buffering=0)
    except OSError:  # a disk that takes nothing: what is written there says so itself
        yield
        return
    with file:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _is_locked(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                raise CheckpointError(
                    f"{checkpoints} is in use by {holder}: accepted is one run a folder; wait for "
                    "its end, or choose another run.dir"
                )
            time.sleep(0.1)
        job = os.environ.get("SLURM_JOB_ID")
        where = f"process {os.getpid()} on {socket.gethostname()}"
        with contextlib.suppress(OSError):  # a full disk locks as well
            file.truncate(0)
            file.write(f"{where}, job {job}".encode() if job else where.encode())
        try:
            yield
        finally:
            file.truncate(0)


def _is_locked(descriptor: int) -> bool:
    """Try to lock; True also where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
