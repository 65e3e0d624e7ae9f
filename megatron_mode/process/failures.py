"""Say once what went wrong in a run of many processes, and leave with one status.

The first process that fails speaks and leaves its exit status in the store that the group met at.
It tears the others out of their collectives, with errors of their own that say nothing: they keep
quiet and leave with the same status. The store ends with rank 0: where only rank 0 failed, the
others leave with 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from megatron_mode.errors import ExitStatus

COUNT_KEY, STATUS_KEY, EVENT_KEY = "failures", "failure status", "failure event"
OUTLAST_SECONDS = 5.0


def wait_to_speak(
    environment: Mapping[str, str], status: int, is_sent_away: Callable[[], bool]
) -> bool:
    """Wait for this process's turn to say what went wrong; False where a peer says it.

    Before the group is joined all processes meet the same mistake, and launchers end a run as soon
    as one leaves it: rank 0 speaks at once, the others stay, and after a while the first of each
    machine speaks, which may lack what rank 0 has; unless the launcher, which saw rank 0 leave, has
    sent this process away by SIGTERM. Afterwards the first that fails speaks: the mistake may be
    that of one process, such as a full disk.
    """
    if _is_joined():
        order = note_failure(status)
        return _is_rank_0(environment) if order is None else order == 1
    if _is_rank_0(environment):
        return True
    deadline = time.monotonic() + OUTLAST_SECONDS
    while time.monotonic() < deadline:
        if is_sent_away():
            return False
        time.sleep(0.02)
    return environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID")) == "0"


def note_failure(status: int) -> int | None:
    """Count this process among those that failed; return its place, None where rank 0 is gone."""
    if not _is_joined():
        return 1
    order = _add(COUNT_KEY, 1)
    if order == 1:
        _store().set(STATUS_KEY, str(status))
    return order


def peers_status(environment: Mapping[str, str]) -> int | None:
    """Return the status of the process that failed before this one; None where it is the first.

    This process counts as failed with a fault, which is also the answer where rank 0 is gone and
    nobody knows: launchers report the largest status, or that of the first to leave.
    """
    order = note_failure(ExitStatus.FAULT)
    if order == 1 or (order is None and _is_rank_0(environment)):
        return None
    try:
        _store().wait([STATUS_KEY], timedelta(seconds=OUTLAST_SECONDS))
        return int(_store().get(STATUS_KEY))
    except RuntimeError:
        return ExitStatus.FAULT


def is_torn(error: BaseException) -> bool:
    """Tell whether a collective failed because a peer is gone; gloo has no class for it."""
    from torch.distributed import DistError

    signs = ("third_party/gloo", "by peer")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def is_first_to_tell() -> bool:
    """Tell whether no other process has written down what ended the run."""
    return _add(EVENT_KEY, 1) in (1, None)


def outlast_peers(environment: Mapping[str, str]) -> None:
    """Let rank 0 stay until its peers have read what it holds for them, or some seconds."""
    if not _is_joined() or not _is_rank_0(environment):
        return
    deadline = time.monotonic() + OUTLAST_SECONDS
    world_size = int(environment["WORLD_SIZE"])
    while (_add(COUNT_KEY, 0) or world_size) < world_size and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_rank_0(environment: Mapping[str, str]) -> bool:
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def _is_joined() -> bool:
    torch = sys.modules.get("torch")  # not imported for this: a process without it is not joined
    return torch is not None and bool(torch.distributed.is_initialized())


def _add(key: str, count: int) -> int | None:
    """Add to a number of the group and return it; None where the store is gone."""
    try:
        return int(_store().add(key, count))
    except RuntimeError:
        return None


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
