"""Stop a run early without losing a step: on a signal, or before a time limit.

SIGTERM, SIGUSR1 and SIGHUP only set a flag. After each step all ranks agree on the largest reason
that one of them has, by an all-reduce of one number, and so stop at the same step, save and exit
with status 75. A signal during an evaluation or a save waits for its end, and a second one changes
nothing. Every start takes at least one step while there is one, so a run that is stopped again and
again still makes progress.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # the program listens for signals before it imports what takes time
    from megatron_mode.config.fields import RunConfig

# A save that is under way in the background must end before the last one begins.
SAVE_FACTOR = 2.0
REMEMBERED = 8


class Reason(IntEnum):
    """Name why a run stops early; where ranks have several, the largest is what all of them say."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGHUP = 3
    SIGTERM = 4


class StopRequest:
    """Hold what asks this process to stop: the signals it got, the end of its job."""

    def __init__(self, job_end_seconds: float | None = None) -> None:
        """Begin; `job_end_seconds` is Unix time, None where nobody has set an end."""
        self.began_seconds = time.monotonic()
        self.job_end_seconds = job_end_seconds
        self.reason = Reason.NONE

    def listen(self) -> Self:
        """Let signals set the flag instead of ending the process; `nohup` keeps its meaning."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)
                # System calls of libraries resume where they were, rather than fail with EINTR.
                signal.siginterrupt(number, False)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = max(self.reason, Reason[signal.Signals(number).name])


def end_seconds(run: RunConfig, request: StopRequest) -> float:
    """Return the earlier of `run.time_limit_seconds` and the job's end, on time.monotonic."""
    ends = [float("inf")]
    if run.time_limit_seconds is not None:
        ends.append(request.began_seconds + run.time_limit_seconds)
    if request.job_end_seconds is not None:
        ends.append(time.monotonic() + request.job_end_seconds - time.time())
    return min(ends)


class Stopping:
    """Decide after each step whether the run stops there; every rank makes the same calls."""

    def __init__(
        self,
        request: StopRequest | None,
        run: RunConfig,
        largest_over_ranks: Callable[[int], int],
        *,
        finish_factor: float,
    ) -> None:
        """Begin; ending a run takes `finish_factor` times an evaluation."""
        self._request, self._run = request or StopRequest(), run
        self._largest_over_ranks, self._finish_factor = largest_over_ranks, finish_factor
        self._end_seconds = end_seconds(run, self._request)
        self._steps = deque([0.0], maxlen=REMEMBERED)
        """Seconds of the newest steps without an evaluation; 0 before the first."""
        self._evaluations = deque([0.0], maxlen=REMEMBERED)
        """Seconds of the newest steps with one."""
        self.begin_step()

    def begin_step(self) -> None:
        """Start the clock of the coming step: a resume or a rollback before it is no part of it."""
        self._since_seconds = time.monotonic()

    def after_step(self, done: int, save_seconds: float) -> Reason:
        """Return why the run stops after step `done`, evaluation included, or NONE.

        `save_seconds` is how long the last checkpoint took until it was complete, 0 before the
        first. The run stops where the work ahead and a save might not end before the limit.
        """
        now = time.monotonic()
        durations = self._evaluations if self._evaluates(done) else self._steps
        durations.append(now - self._since_seconds)
        self._since_seconds = now
        ahead_seconds = max(self._steps)
        if done == self._run.steps:
            ahead_seconds = self._finish_factor * max(ahead_seconds, *self._evaluations)
        elif self._evaluates(done + 1):
            ahead_seconds = max(ahead_seconds, *self._evaluations)
        margin_seconds = SAVE_FACTOR * save_seconds + self._run.time_margin_seconds
        return self.agree(self._end_seconds - now < ahead_seconds + margin_seconds)

    def after_save(self, stop: Reason) -> Reason:
        """Return why the run stops at the checkpoint just begun, `stop` where that is known.

        A signal that came meanwhile is met by it: it needs no further step and save.
        """
        self.begin_step()
        return stop or self.agree()

    def agree(self, is_time_up: bool = False) -> Reason:
        """Return the largest reason that a rank has to stop now; all ranks call it."""
        mine = max(self._request.reason, Reason.TIME_LIMIT if is_time_up else Reason.NONE)
        return Reason(self._largest_over_ranks(mine))

    def sentence(self, reason: Reason, done: int) -> str:
        """Say what happened and what to do."""
        return (
            f"stopped after step {done} of {self._run.steps} ({reason.name}) and saved in "
            f"{self._run.dir}: start the same command again and it continues from there"
        )

    def _evaluates(self, done: int) -> bool:
        every_steps = self._run.eval_every_steps
        return every_steps > 0 and done % every_steps == 0
