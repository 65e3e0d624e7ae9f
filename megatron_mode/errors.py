"""Raise these for a user's mistake: a message names field, value, what is accepted and the fix."""

from __future__ import annotations

import contextlib
import errno
import shutil
from enum import IntEnum
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class ExitStatus(IntEnum):
    """Name every status with which a program of ours ends by itself."""

    DONE = 0
    FAULT = 1
    """A bug of ours, with a traceback; also where nobody knows which peer failed first."""
    MISTAKE = 2
    """Bad input, or a disk or folder that refuses: one sentence says what to mend."""
    UNHEALTHY = 3
    """A policy of `health` stopped the run."""
    STALLED = 4
    """A rank never joined, or nothing moved any more."""
    STOPPED = 75
    """Stopped early and saved: EX_TEMPFAIL of sysexits.h."""
    INTERRUPTED = 130
    """Ctrl-C."""
    BROKEN_PIPE = 141
    """Nobody reads the answer of a verb."""
    TERMINATED = 143
    """SIGTERM."""


class MegatronModeError(Exception):
    """Report what a user can mend; programs print one sentence and leave with `exit_status`."""

    exit_status = ExitStatus.MISTAKE


class ConfigError(MegatronModeError):
    """Report a configuration or a command line that cannot run."""


class DataError(MegatronModeError):
    """Report input text, a tokenizer or a prepared source that cannot be used."""


class CheckpointError(MegatronModeError):
    """Report a checkpoint that is missing, damaged or belongs to another run."""


class DamagedError(CheckpointError):
    """Report a checkpoint that is not what was written; `checkpoint.fallback` passes it over."""


class StallError(MegatronModeError):
    """Raised when a rank never joins or stops responding; the watchdog ends a run alike."""

    exit_status = ExitStatus.STALLED


class HealthError(MegatronModeError):
    """Report that training ended because a step cannot be right (a policy of `health`)."""

    exit_status = ExitStatus.UNHEALTHY


def refusal(
    path: Path | None, error: OSError, remedy: str, *, option: str = "", verb: str = "written"
) -> str:
    """Say that the system refuses a path, why, and what to do; of a full disk what is left.

    `option` is the one that names the path; the path is None where nobody knows it.
    """
    reason, mend = error.strerror or str(error), "mend that"
    if error.errno in _FULL:
        mend = "free space"
        if path is not None:
            with contextlib.suppress(OSError):
                mend = f"the disk has {shutil.disk_usage(path.parent).free} bytes left; {mend}"
    what = f"{option} {path or 'the target'}".lstrip()
    return f"{what} cannot be {verb} ({reason}): {mend} and {remedy}"
