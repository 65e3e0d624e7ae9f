"""Make a prepared folder appear complete, and keep what was finished when its making is cut short.

Work is in .NAME.preparing beside the target (inside it where the target is a mount point, since a
file cannot be renamed to another file system). A lock tells living runs from killed ones; plan.json
tells the same plan from another one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_mode.atomic import sync_folder, try_lock, write_whole
from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.workers import UnfinishedError
from megatron_mode.tokens.vocabulary import INFO_FILE, MODEL_FILE

LOCK_FILE = ".lock"
PLAN_FILE = "plan.json"
RESULT_FOLDER = "result"
IN_MOTION_FILE = "publishing.json"
# The tokenizer, and what a killed `pack` left.
OURS = re.compile(
    rf"{MODEL_FILE}|{INFO_FILE}|"
    r"\..*\.rows\.\d+\.bin\.(first|begin|length|partial)|\..*\.json\.partial"
)
NO_OBSTACLE = re.compile(r"\..*\.preparing.*|lost\+found")
SOURCE_SUFFIX = re.compile(r"(\.bin|\.idx|\.flags\.bin|\.docs\.arrow|\.json|\.rows\.\d+\.bin)$")
# After these the same command continues: Ctrl-C, SIGTERM, a worker that died.
KEPT_AFTER = (KeyboardInterrupt, SystemExit, UnfinishedError)


def work_path(target: Path, suffix: str = "") -> Path:
    """Return the work folder of a target, or of one of its shards."""
    parent = target if os.path.ismount(target) else target.parent
    return parent / f".{target.name}.preparing{suffix}"


class WorkFolder:
    """Hold the work folder of a target, locked.

    Leaving the context removes it, unless `stays` is set or the run was stopped.
    """

    def __init__(self, target: Path, suffix: str = "") -> None:
        self.target = Path(os.path.realpath(target))
        self.path = work_path(self.target, suffix)
        self.result = self.path / RESULT_FOLDER
        self.stays = False
        self._made_parents: list[Path] = []
        self._lock = -1

    def __enter__(self) -> WorkFolder:
        check_replaceable(self.target)
        try:
            for folder in reversed([p for p in self.path.parents if not p.exists()]):
                folder.mkdir()
                self._made_parents.append(folder)
            self._lock = locked_folder(self.path, self.target)
        except BaseException:
            self._remove_parents()
            raise
        return self

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
            elif other.name not in (LOCK_FILE, IN_MOTION_FILE):
                other.unlink()
        self.result.mkdir()
        write_whole(path, json.dumps(plan))
        return False

    def publish(self) -> None:
        """Move the result to the target, tokenizer.json last, without which no source opens.

        A run killed meanwhile is continued: the names that may be there are on record before.
        """
        self.target.mkdir(exist_ok=True)
        former = {path.name for path in prepared_files(self.target)} | names_in_motion(self.target)
        names = {path.name for path in self.result.iterdir() if not path.name.startswith(".")}
        write_whole(self.path / IN_MOTION_FILE, json.dumps(sorted(former | names)))
        for name in [INFO_FILE, *sorted(former)]:
            (self.target / name).unlink(missing_ok=True)
        for name in sorted(names - {INFO_FILE}):
            os.rename(self.result / name, self.target / name)
        sync_folder(self.target)
        os.rename(self.result / INFO_FILE, self.target / INFO_FILE)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.stays and not isinstance(error, KEPT_AFTER):
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
                return  # it holds the target, or what somebody put there meanwhile


def locked_folder(path: Path, target: Path) -> int:
    """Make a folder and lock it against other runs; return the lock's descriptor.

    The system drops the lock however the run ends. Where the file system offers none, none is held.
    """
    while True:
        path.mkdir(exist_ok=True)
        file = path / LOCK_FILE
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
        locked = try_lock(descriptor)
        if locked is None:
            return descriptor
        # The run before may have removed the folder between our two calls.
        if locked and file.exists() and os.path.samestat(os.stat(file), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)
        if not locked:
            raise DataError(
                f"--out {target} is being prepared by another run, in {path}; wait for it or stop "
                "it, or name another --out."
            )


def names_in_motion(target: Path) -> set[str]:
    """Return the files that a run killed while it filled the target has or had there."""
    try:
        return set(json.loads((work_path(target) / IN_MOTION_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


def prepared_files(folder: Path) -> list[Path]:
    """List the files in a folder that an earlier preparation wrote."""
    names = {path.stem for path in folder.glob("*.idx") if path.with_suffix(".json").exists()}
    return [
        path
        for path in folder.iterdir()
        if path.is_file()
        and (OURS.fullmatch(path.name) or SOURCE_SUFFIX.sub("", path.name) in names)
    ]


def check_replaceable(target: Path) -> None:
    """Raise DataError when the target holds anything that no preparation wrote."""
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"--out {target} is a file; name a folder that is new, empty or prepared.")
    known = {path.name for path in prepared_files(target)} | names_in_motion(target)
    others = {path.name for path in target.iterdir()} - known
    foreign = sorted(name for name in others if not NO_OBSTACLE.fullmatch(name))
    if foreign:
        raise DataError(
            f"--out {target} holds {foreign[0]}, which `megatron-mode prepare` did not write and "
            "would delete; name a folder that is new, empty or prepared."
        )
