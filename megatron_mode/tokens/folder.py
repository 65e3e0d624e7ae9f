"""Make a folder appear at once: everything is written beside it and renamed at the end."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from megatron_mode.errors import DataError
from megatron_mode.tokens.vocabulary import INFO_FILE, MODEL_FILE

LOCK_FILE = ".lock"
PREVIOUS = ".previous"
SOURCE_SUFFIX = re.compile(r"(\.bin|\.idx|\.flags\.bin|\.docs\.arrow|\.json|\.rows\.\d+\.bin)$")


class PartialFolder:
    """Hold a partial folder until `publish`; leaving the context before that removes it.

    A mount point cannot be renamed: there the partial folder lies inside it, and `publish` renames
    file by file, tokenizer.json last, without which no source opens.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        self._is_mount = os.path.ismount(self.target)
        self._made_parents: list[Path] = []
        self.path = Path()
        self._lock_descriptor = -1

    def __enter__(self) -> PartialFolder:
        check_replaceable(self.target)
        parent = self.target if self._is_mount else self.target.parent
        prefix = f".{self.target.name}.partial-"
        missing = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            for folder in reversed(missing):
                folder.mkdir()
                self._made_parents.append(folder)
            remove_abandoned(self.target, parent, prefix)
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            # The lock says that this run is alive; the system drops it however the run ends.
            self._lock_descriptor = os.open(self.path / LOCK_FILE, os.O_CREAT | os.O_RDWR)
            lock(self._lock_descriptor)
        except BaseException:
            self._clean()
            raise
        return self

    def publish(self) -> None:
        """Put the folder in the place of the target."""
        if self._is_mount:
            self._publish_files()
            return
        mask = os.umask(0)
        os.umask(mask)
        self.path.chmod(0o777 & ~mask)
        self._made_parents = []
        previous = self.path.with_name(f"{self.path.name}{PREVIOUS}")
        if self.target.exists():
            os.rename(self.target, previous)
        try:
            os.rename(self.path, self.target)
        except BaseException:
            if previous.exists():
                os.rename(previous, self.target)
            raise
        (self.target / LOCK_FILE).unlink()
        shutil.rmtree(previous, ignore_errors=True)

    def _publish_files(self) -> None:
        (self.target / INFO_FILE).unlink(missing_ok=True)
        for path in prepared_files(self.target):
            path.unlink()
        names = {path.name for path in self.path.iterdir()} - {INFO_FILE, LOCK_FILE}
        for name in [*sorted(names), INFO_FILE]:
            os.rename(self.path / name, self.target / name)

    def _clean(self) -> None:
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
        if self.path.name:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in reversed(self._made_parents):
            try:
                folder.rmdir()
            except OSError:
                return  # somebody put something there meanwhile

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean()


def lock(descriptor: int) -> bool:
    """Take an exclusive lock without waiting; False when another holds it or none are offered."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_abandoned(target: Path, parent: Path, prefix: str) -> None:
    """Remove partial folders of runs that were killed: those whose lock is free.

    A run killed between its two renames leaves the former target aside: it is put back.
    """
    for path in parent.glob(f"{prefix}*"):
        if path.name.endswith(PREVIOUS):
            if target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, target)
            continue
        try:
            descriptor = os.open(path / LOCK_FILE, os.O_RDWR)
        except OSError:
            continue
        try:
            if lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def prepared_files(folder: Path) -> list[Path]:
    """List the files in a folder that an earlier preparation wrote."""
    names = {path.stem for path in folder.glob("*.idx") if path.with_suffix(".json").exists()}
    files = []
    for path in folder.iterdir():
        ours = path.name in (MODEL_FILE, INFO_FILE)
        if path.is_file() and (ours or SOURCE_SUFFIX.sub("", path.name) in names):
            files.append(path)
    return files


def check_replaceable(target: Path) -> None:
    """Raise DataError when the target holds anything that no preparation wrote."""
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"--out {target} is a file; name a folder that is new, empty or prepared.")
    known = {path.name for path in prepared_files(target)}
    ignored = re.compile(r"\..*\.partial-.*|\.lock|lost\+found")
    foreign = sorted(
        path.name
        for path in target.iterdir()
        if path.name not in known and not ignored.fullmatch(path.name)
    )
    if foreign:
        raise DataError(
            f"--out {target} holds {foreign[0]}, which `megatron-mode prepare` did not write and "
            "would delete; name a folder that is new, empty or prepared."
        )


def disk_error(error: OSError, target: Path) -> DataError:
    """Say in one sentence why writing to the target failed."""
    reasons = {
        errno.ENOSPC: "the disk is full; free space (about three times the tokenised size is "
        "needed for a while) or name another --out",
        errno.EDQUOT: "the disk quota is used up; free space or name another --out",
        errno.EROFS: "the file system is read-only; name another --out or mount it writable",
        errno.EACCES: "permission is denied; name another --out or mend its permissions",
    }
    default = f"{error.strerror or error}; name another --out or mend the disk"
    return DataError(f"--out {target} cannot be written: {reasons.get(error.errno or 0, default)}.")
