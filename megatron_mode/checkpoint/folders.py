"""Name, find, publish, keep and remove the checkpoint folders of a run.

A checkpoint is written as `RUN/checkpoints/step-NNNNNNNN.partial` and renamed when it is whole, so
a folder without the suffix is finished. `latest` names the newest. Removing renames to `.deleting`
first. What a kill leaves under such a suffix is never read, and cleared away at the next start.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_mode.atomic import rename_durably, write_whole
from megatron_mode.errors import CheckpointError

CHECKPOINTS_NAME = "checkpoints"
LATEST_NAME = "latest"
PARTIAL = ".partial"
DELETING = ".deleting"
DAMAGED = ".damaged"
UNIVERSAL = "-universal"


def tag_of(step: int) -> str:
    """Return the folder name of the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the steps taken before a finished checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def universal_of(folder: Path) -> Path:
    """Return where the universal folder of a checkpoint lies, if it has one."""
    return folder.with_name(folder.name + UNIVERSAL)


def finished_checkpoints(checkpoints: Path) -> list[Path]:
    """List the finished checkpoints of a run, oldest first; copies under other names are none."""
    ours = [path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted((path for path in ours if path.is_dir()), key=step_of)


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest finished checkpoint of a run, or None when it never had one.

    A run killed between renaming a checkpoint and rewriting `latest` leaves `latest` on an older
    one. Raises CheckpointError where it names none of those that are there.
    """
    finished = finished_checkpoints(checkpoints)
    latest = checkpoints / LATEST_NAME
    if latest.is_file():
        named = latest.read_bytes()
        if named not in [f"{path.name}\n".encode() for path in finished]:
            newest = f"the newest here is {finished[-1].name}" if finished else "there is none here"
            raise CheckpointError(
                f"{latest} names {named.decode(errors='replace').strip()!r}, which is no finished "
                f"checkpoint beside it ({newest}): bring that folder back, or delete {latest} to "
                "do without it"
            )
    return finished[-1] if finished else None


def publish(partial: Path) -> Path:
    """Rename a whole checkpoint to its name and let `latest` name it."""
    checkpoints = partial.parent
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    if folder.exists():
        # Written once more, after a roll-back: `latest` must never name what is being replaced.
        (checkpoints / LATEST_NAME).unlink(missing_ok=True)
        remove(folder)
    rename_durably(partial, folder)
    write_whole(checkpoints / LATEST_NAME, folder.name + "\n")
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


def candidates(checkpoints: Path, at_most: int | None = None) -> list[Path]:
    """List what a run may go on from, newest first, up to `at_most` steps; clear up before.

    Raises CheckpointError where all that is there was set aside: nobody means to begin anew then.
    """
    clear_unfinished(checkpoints)
    newest_checkpoint(checkpoints)
    found = finished_checkpoints(checkpoints)[::-1]
    if not found and (aside := sorted(checkpoints.glob(f"step-*{DAMAGED}*"))):
        raise CheckpointError(
            f"{checkpoints} has no checkpoint to go on from but {aside[-1].name}, which was set "
            "aside as damaged: mend it and take the ending off its name, or start a new run.dir"
        )
    return [folder for folder in found if at_most is None or step_of(folder) <= at_most]


def forget_after(checkpoints: Path, step: int) -> Path | None:
    """Remove the checkpoints of more than `step` steps; return the newest of the others."""
    finished = finished_checkpoints(checkpoints)
    kept = [folder for folder in finished if step_of(folder) <= step]
    if kept and kept != finished:
        write_whole(checkpoints / LATEST_NAME, kept[-1].name + "\n")
        for folder in reversed(finished[len(kept) :]):
            remove(folder)
    return kept[-1] if kept else None


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, which keeps it but counts it no more; return its new name.

    What was made from it is renamed too: it may be all that is whole of that step.
    """
    (folder.parent / LATEST_NAME).unlink(missing_ok=True)
    (free,) = itertools.islice(
        (end for end in _damaged_endings() if not folder.with_name(folder.name + end).exists()), 1
    )
    for path in (universal_of(folder), folder):
        if path.exists():
            rename_durably(path, path.with_name(path.name + free))
    return folder.with_name(folder.name + free)


def _damaged_endings() -> Iterator[str]:
    """Yield .damaged, .damaged-2 and so on."""
    yield DAMAGED
    yield from (f"{DAMAGED}-{number}" for number in itertools.count(2))


def prune(published: Path, keep: int, permanent_every_steps: int) -> list[Path]:
    """Delete all but the newest `keep` finished checkpoints and the permanent ones.

    The one just published, which was read back from the disk when it was written, always stays.
    """
    dropped = [
        folder
        for folder in finished_checkpoints(published.parent)[:-keep]
        if folder != published
        and (not permanent_every_steps or step_of(folder) % permanent_every_steps)
    ]
    for folder in dropped:
        remove(folder)
    return dropped


def clear_unfinished(checkpoints: Path) -> list[Path]:
    """Delete what a killed run left half written or half deleted."""
    left = [p for suffix in (PARTIAL, DELETING) for p in checkpoints.glob(f"step-*{suffix}")]
    for path in left:
        _delete(path)
    return sorted(left)
