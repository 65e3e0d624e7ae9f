"""Keep a second program out of a run's checkpoints: it would delete what the first one writes.

The lock is one of the file system (flock), so it goes with the process at the latest, however that
ends. Where the file system has no locks, a note says so, and a heartbeat file shows the other run:
its holder changes it every few seconds. Only changes count, as clocks of machines differ.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_mode.atomic import try_lock, write_whole
from megatron_mode.checkpoint.collective import from_rank_0
from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME
from megatron_mode.errors import CheckpointError
from megatron_mode.process.launch import Process

LOCK_NAME, HEARTBEAT_NAME = ".lock", ".heartbeat"
# A run that was just killed may take a moment to go. A job that Slurm has put back in the queue
# comes from a node that may be dead, whose locks NFS keeps for a lease of ninety seconds.
PATIENCE_SECONDS, REQUEUED_PATIENCE_SECONDS = 10.0, 180.0
BEAT_SECONDS, SILENT_BEATS = 5.0, 4


@contextlib.contextmanager
def run_lock(run_dir: Path, process: Process) -> Iterator[None]:
    """Hold a run's checkpoints inside; CheckpointError on all ranks where another program does."""
    checkpoints = run_dir / CHECKPOINTS_NAME
    patience_seconds = REQUEUED_PATIENCE_SECONDS if process.restarts else PATIENCE_SECONDS
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    holder += f", job {process.job}" if process.job else ""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            checkpoints.mkdir(exist_ok=True)
            stack.enter_context(held(checkpoints, holder, patience_seconds))

        from_rank_0(take)
        yield


@contextlib.contextmanager
def held(checkpoints: Path, holder: str, patience_seconds: float) -> Iterator[None]:
    """Hold the checkpoints in this process; CheckpointError names the one that does."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(checkpoints / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            # A disk that takes nothing: what is written there says so itself.
            if error.errno not in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
                raise
        else:
            stack.callback(os.close, descriptor)
            if not _wait(descriptor, checkpoints, patience_seconds):
                stack.enter_context(heartbeat(checkpoints, holder))
            _note(descriptor, holder)
            stack.callback(_note, descriptor, "")
        yield


def _wait(descriptor: int, checkpoints: Path, patience_seconds: float) -> bool:
    """Wait for the lock; return False where the file system has none."""
    deadline = time.monotonic() + patience_seconds
    noted = patience_seconds <= PATIENCE_SECONDS
    while (answer := try_lock(descriptor)) is False:
        by = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        if time.monotonic() > deadline:
            raise _in_use(checkpoints, by)
        if not noted:
            _say(f"waits up to {patience_seconds:g} s for {by}")
            noted = True
        time.sleep(0.1)
    return answer is not None


def _in_use(checkpoints: Path, by: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoints} is in use by {by}: only one run may use a folder; wait for its end, or "
        "choose another run.dir"
    )


@contextlib.contextmanager
def heartbeat(checkpoints: Path, holder: str) -> Iterator[None]:
    """Hold the checkpoints by a file that changes while this process runs.

    Raises CheckpointError where another process changes it. A file that a kill left stands still.
    """
    path, ended = checkpoints / HEARTBEAT_NAME, threading.Event()
    _say(f"locks do not work in {checkpoints}; {path.name} there shows whether another run uses it")

    def beat() -> bytes:
        text = f"{holder}\n{time.time_ns()}\n"
        with contextlib.suppress(OSError):  # a full disk: what is written there says so itself
            write_whole(path, text)
        return text.encode()

    def keep_beating() -> None:
        while not ended.wait(BEAT_SECONDS):
            beat()

    _refuse_change(checkpoints, path, _read(path), SILENT_BEATS * BEAT_SECONDS)
    _refuse_change(checkpoints, path, beat(), BEAT_SECONDS / 5)  # another may start just now
    thread = threading.Thread(target=keep_beating, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _refuse_change(checkpoints: Path, path: Path, before: bytes, seconds: float) -> None:
    """Raise CheckpointError where another process changes a heartbeat within so many seconds."""
    deadline = time.monotonic() + seconds
    while path.exists() and time.monotonic() < deadline:
        now = _read(path)
        if now and now != before:
            raise _in_use(checkpoints, now.decode(errors="replace").partition("\n")[0])
        time.sleep(BEAT_SECONDS / 25)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr, flush=True)


def _note(descriptor: int, holder: str) -> None:
    """Write who holds the lock, for those who find it taken; a full disk locks as well."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
