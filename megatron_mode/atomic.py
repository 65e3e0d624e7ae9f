"""Replace files and folders at once, so that a crash leaves the old or the new; hash, lock."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
from pathlib import Path
from typing import Any


class HashedFile(io.BufferedWriter):
    """Write a new file and hash it on the way."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.path = path
        self._hash, self._bytes = hashlib.sha256(), 0

    def write(self, data: Any, /) -> int:
        """Append all of a buffer."""
        self._hash.update(data)
        self._bytes += memoryview(data).nbytes
        return super().write(data)

    def sync(self) -> None:
        """Flush the file to the disk, and drop it from memory: what reads it back asks the disk."""
        self.flush()
        os.fsync(self.fileno())
        os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def description(self) -> dict[str, Any]:
        """Return the size and the SHA-256 of what was written so far."""
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def write_whole(path: Path, text: str) -> Path:
    """Replace a small file at once and durably: it holds the old text or the new."""
    if not path.name:  # "", "." and "/" name no file
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file or folder beside its place, so that the new name outlives a power cut."""
    source.rename(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names; file systems that cannot do it are passed over."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse folders, and keep names by themselves
        pass
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process; False where another holds it.

    None where the file system has no locks. The system drops the lock however the process ends.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True
