"""Make a folder appear at once, and keep what was finished when its making is cut short.

Work lies in .NAME.preparing beside the target (inside it where the target is a mount point, which
cannot be renamed). A lock tells living runs from killed ones; plan.json tells the same plan from
another one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_mode.atomic import try_lock, write_whole
from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.workers import UnfinishedError
from megatron_mode.tokens.vocabulary import INFO_FILE, MODEL_FILE

LOCK_FILE = ".lock"
PLAN_FILE = "plan.json"
RESULT_FOLDER = "result"
PREVIOUS = ".previous"
IN_MOTION_FILE = "publishing.json"
LEFT_BY_PACK = r"\..*\.rows\.\d+\.bin\.(first|begin|length|partial)|\..*\.json\.partial"
SOURCE_SUFFIX = re.compile(r"(\.bin|\.idx|\.flags\.bin|\.docs\.arrow|\.json|\.rows\.\d+\.bin)$")
# After these the same command continues: Ctrl-C, SIGTERM, a worker that died.
KEPT_AFTER = (KeyboardInterrupt, SystemExit, UnfinishedError)


def work_parent(target: Path) -> Path:
    """Return the folder that holds the work folders of a target."""
    return target if os.path.ismount(target) else target.parent


def work_name(target: Path) -> str:
    """Return the name of a target's work folder."""
    return f".{target.name}.preparing"


class WorkFolder:
    """Hold the work folder of a target, locked.

    Leaving the context removes it after `publish` and after an error; it stays when the run was
    stopped, and after `keep`. At a mount point `publish` renames file by file, tokenizer.json
    last, without which no source opens.
    """

    def __init__(self, target: Path, suffix: str = "", *, lasts: bool = False) -> None:
        """Name the folder; one that lasts stays after an error too."""
        self.target = Path(os.path.realpath(target))
        self._is_mount = os.path.ismount(self.target)
        self.path = work_parent(self.target) / f"{work_name(self.target)}{suffix}"
        self._made_parents: list[Path] = []
        self._lock = -1
        self._lasts, self._keeps = lasts, lasts
        self._may_publish = not suffix

    def __enter__(self) -> WorkFolder:
        check_replaceable(self.target)
        try:
            for folder in reversed([p for p in self.path.parents if not p.exists()]):
                folder.mkdir()
                self._made_parents.append(folder)
            self._lock = locked_folder(self.path, self.target)
            if self._may_publish:
                restore_previous(self.target)
        except BaseException:
            self._remove_parents()
            raise
        return self

    @property
    def result(self) -> Path:
        """Return the folder that becomes the target."""
        return self.path / RESULT_FOLDER

    def begin(self, plan: dict[str, Any]) -> bool:
        """Tell whether a run of the same plan left work here; otherwise start with nothing."""
        path = self.path / PLAN_FILE
        try:
            if json.loads(path.read_text(encoding="utf-8")) == plan:
                self.result.mkdir(exist_ok=True)
                return True
        except (OSError, ValueError):
            pass
        path.unlink(missing_ok=True)
        for other in self.path.iterdir():
            if other.is_dir():
                shutil.rmtree(other)
            elif other.name != LOCK_FILE:
                other.unlink()
        self.result.mkdir()
        write_whole(path, json.dumps(plan))
        return False

    def keep(self) -> None:
        """Leave the folder where it is at the end."""
        self._keeps = True

    def release(self) -> None:
        """Let the folder be removed at the end."""
        self._keeps = self._lasts = False

    def publish(self) -> None:
        """Put the result in the place of the target."""
        for path in self.result.glob(".*"):
            path.unlink()  # a killed run's temporary files
        if self._is_mount:
            self._publish_files()
            return
        self._made_parents = []
        previous = previous_of(self.target)
        if self.target.exists():
            os.rename(self.target, previous)
        try:
            os.rename(self.result, self.target)
        except BaseException:
            if previous.exists():
                os.rename(previous, self.target)
            raise
        shutil.rmtree(previous, ignore_errors=True)

    def _publish_files(self) -> None:
        former = {path.name for path in prepared_files(self.target)} | names_in_motion(self.target)
        names = {path.name for path in self.result.iterdir()} - {INFO_FILE}
        write_whole(self.path / IN_MOTION_FILE, json.dumps(sorted(former | names)))
        for name in [INFO_FILE, *sorted(former)]:
            (self.target / name).unlink(missing_ok=True)
        for name in [*sorted(names), INFO_FILE]:
            os.rename(self.result / name, self.target / name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stays = self._keeps if error is None else self._lasts or isinstance(error, KEPT_AFTER)
        if not stays:
            # Marks first: a run killed in here must not be taken for one that is finished.
            for mark in self.path.glob("*.json"):
                mark.unlink(missing_ok=True)
            shutil.rmtree(self.path, ignore_errors=True)
            self._remove_parents()
        os.close(self._lock)

    def _remove_parents(self) -> None:
        for folder in reversed(self._made_parents):
            try:
                folder.rmdir()
            except OSError:
                return  # somebody put something there meanwhile


def previous_of(target: Path) -> Path:
    """Return where a target is moved while its successor takes its place."""
    return target.with_name(f"{work_name(target)}{PREVIOUS}")


def restore_previous(target: Path) -> None:
    """Put a former target back that a run killed between its two renames left aside."""
    previous = previous_of(target)
    if not previous.exists():
        return
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
    else:
        os.rename(previous, target)


def locked_folder(path: Path, target: Path) -> int:
    """Make a folder and lock it against other runs; return the lock's descriptor.

    The system drops the lock however the run ends. Where the file system offers none, none is held.
    """
    while True:
        path.mkdir(exist_ok=True)
        file = path / LOCK_FILE
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
        locked = try_lock(descriptor)
        if locked is False:
            os.close(descriptor)
            raise DataError(
                f"--out {target} is being prepared by another run, in {path}; wait for it or stop "
                "it, or name another --out."
            )
        if locked is None:
            return descriptor
        # The run before may have removed the folder between our two calls.
        if file.exists() and os.path.samestat(os.stat(file), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def names_in_motion(target: Path) -> set[str]:
    """Return the files that a run killed while it filled a mount point has or had there."""
    path = work_parent(target) / work_name(target) / IN_MOTION_FILE
    try:
        return set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


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
    known = {path.name for path in prepared_files(target)} | names_in_motion(target)
    ignored = re.compile(r"\..*\.preparing.*|lost\+found|" + LEFT_BY_PACK)
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
