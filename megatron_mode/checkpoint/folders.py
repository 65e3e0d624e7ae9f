"""Name, find, publish, keep and remove the checkpoint folders of a run.

A checkpoint is written as `RUN/checkpoints/step-NNNNNNNN.partial` and renamed when it is complete,
so a folder without the suffix is finished. `latest` decides which one a run resumes from; a person
may edit it to go back. Removing renames to `.deleting` first. What a kill leaves under such a
suffix is never read, and the next start deletes it.

`publishing` tells a kill from an edit. It says "NEW OLD" from before a checkpoint NEW is renamed
until `latest` names NEW. If NEW is finished while `latest` still says OLD, a kill came between the
two and `latest` means NEW. Without the file, or where `latest` says something else, a person
chose.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_mode.atomic import rename_durably, write_whole
from megatron_mode.errors import CheckpointError

CHECKPOINTS_NAME, LATEST_NAME, PUBLISHING_NAME = "checkpoints", "latest", "publishing"
PARTIAL, DELETING, DAMAGED, ASIDE = ".partial", ".deleting", ".damaged", ".aside"
UNIVERSAL = "-universal"
MOST_NAMED = 8


def tag_of(step: int) -> str:
    """Return the folder name of the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the steps taken before a finished checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def universal_of(folder: Path) -> Path:
    """Return where the universal folder of a checkpoint is, if it has one."""
    return folder.with_name(folder.name + UNIVERSAL)


def finished_checkpoints(checkpoints: Path) -> list[Path]:
    """List the finished checkpoints of a run, oldest first; copies under other names are none."""
    ours = [path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted((path for path in ours if path.is_dir()), key=step_of)


def current_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint that `latest` means: the newest where there is no `latest`, or None.

    Raises CheckpointError where `latest` names none of those that are there.
    """
    finished = finished_checkpoints(checkpoints)
    by_name = {folder.name: folder for folder in finished}
    latest = checkpoints / LATEST_NAME
    named = _word(latest)
    new, _, old = _word(checkpoints / PUBLISHING_NAME).partition(" ")
    for name in (new if named == old else "", named):
        if name in by_name:
            return by_name[name]
    if latest.is_file():
        raise CheckpointError(
            f"{latest} names {named!r}, which is no finished checkpoint there: it may name "
            f"{_some_of(finished)}; correct it, or delete {latest} to take the newest"
        )
    return finished[-1] if finished else None


def find_step(checkpoints: Path, step: int, given: str) -> Path:
    """Return the checkpoint after `step` steps, which is `given`; CheckpointError lists all."""
    finished = finished_checkpoints(checkpoints)
    for folder in finished:
        if step_of(folder) == step:
            return folder
    raise CheckpointError(
        f"{given}, which is no finished checkpoint of {checkpoints}: it may name "
        f"{_some_of(finished)}; correct it or leave it out"
    )


def _some_of(finished: list[Path]) -> str:
    return ", ".join(path.name for path in finished[-MOST_NAMED:]) or "none, for there is none"


def _word(path: Path) -> str:
    """Read a file of one line, whether or not it ends with a newline; "" where it is missing."""
    try:
        return path.read_bytes().decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def publish(partial: Path) -> Path:
    """Rename a complete checkpoint to its name and let `latest` name it."""
    checkpoints = partial.parent
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    if folder.exists():
        # A copy under this name, made by hand: `latest` must never name what is being replaced.
        (checkpoints / LATEST_NAME).unlink(missing_ok=True)
        remove(folder)
    journal = checkpoints / PUBLISHING_NAME
    write_whole(journal, f"{folder.name} {_word(checkpoints / LATEST_NAME)}\n")
    rename_durably(partial, folder)
    write_whole(checkpoints / LATEST_NAME, folder.name + "\n")
    journal.unlink()
    return folder


def remove(folder: Path) -> None:
    """Take a checkpoint and what was made from it out of sight at once, then delete them."""
    for path in (universal_of(folder), folder):
        if path.exists():
            doomed = path.with_name(path.name + DELETING)
            _delete(doomed)
            rename_durably(path, doomed)
            _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a folder, or a file or link in its place; what cannot be deleted stays."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def candidates(checkpoints: Path, at_most: int | None, start: Path | None = None) -> list[Path]:
    """List what a run may resume from, newest first, up to `at_most` steps; clear up before.

    The first is `start`, else the one that `latest` means. Raises CheckpointError where there are
    only checkpoints that were set aside as damaged.
    """
    clear_unfinished(checkpoints)
    current = current_checkpoint(checkpoints)
    journal = checkpoints / PUBLISHING_NAME
    if current is not None and journal.exists():  # end what a kill interrupted
        write_whole(checkpoints / LATEST_NAME, f"{current.name}\n")
    journal.unlink(missing_ok=True)
    first = start or current
    limit = step_of(first) if first else 0
    limit = limit if at_most is None else min(limit, at_most)
    found = finished_checkpoints(checkpoints)[::-1]
    if not found and (aside := sorted(checkpoints.glob(f"step-*{DAMAGED}*"))):
        raise CheckpointError(
            f"{checkpoints} has no checkpoint to resume from but {aside[-1].name}, which was set "
            "aside as damaged: mend it and take the ending off its name, or start a new run.dir"
        )
    return [folder for folder in found if step_of(folder) <= limit]


def set_aside(taken: Path, endings: Mapping[Path, str]) -> dict[Path, str]:
    """Let `latest` name what was taken and rename others by adding an ending; return new names.

    They keep all they hold but count no more. What was made from one is renamed too: it may be all
    that is intact of that step.
    """
    write_whole(taken.with_name(LATEST_NAME), f"{taken.name}\n")
    names = {}
    for folder in sorted(endings, key=step_of, reverse=True):
        numbered = (f"{endings[folder]}-{number}" for number in itertools.count(2))
        for ending in itertools.chain([endings[folder]], numbered):
            names[folder] = folder.name + ending
            if not folder.with_name(names[folder]).exists():
                break
        for path in (universal_of(folder), folder):
            if path.exists():
                rename_durably(path, path.with_name(path.name + ending))
    return names


def forget_after(checkpoints: Path, step: int) -> None:
    """Remove the checkpoints of more than `step` steps, where there are others."""
    finished = finished_checkpoints(checkpoints)
    kept = [folder for folder in finished if step_of(folder) <= step]
    if kept and kept != finished:
        write_whole(checkpoints / LATEST_NAME, kept[-1].name + "\n")
        for folder in reversed(finished[len(kept) :]):
            remove(folder)


def prune(published: Path, keep: int, permanent_every_steps: int) -> None:
    """Delete all but the newest `keep` finished checkpoints and the permanent ones.

    The one just published, which was read back from the disk when it was written, always stays.
    """
    for folder in finished_checkpoints(published.parent)[:-keep]:
        is_permanent = permanent_every_steps and step_of(folder) % permanent_every_steps == 0
        if folder != published and not is_permanent:
            remove(folder)


def clear_unfinished(checkpoints: Path) -> None:
    """Delete what a killed run left half written or half deleted."""
    for suffix in (PARTIAL, DELETING):
        for path in checkpoints.glob(f"step-*{suffix}"):
            _delete(path)
