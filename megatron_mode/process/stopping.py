"""Stop a run early without losing a step: on a signal, or before a time limit.

SIGTERM, SIGUSR1 and SIGHUP only set a flag. After each step all ranks agree on the largest reason
that one of them has, by an all-reduce of one number, and so stop at the same step, save and exit
with status 75. A signal during an evaluation or a save waits for its end, and a second one changes
nothing. Every start takes at least one step while there is one, so that a run which is stopped
again and again still moves on.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:  # the program listens for signals before it imports what takes time
    from megatron_mode.config.fields import RunConfig

# A save that is under way in the background must end before the last one begins.
SAVE_FACTOR = 2.0
REMEMBERED = 8

Work = Literal["step", "step with evaluation"]


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
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            signal.signal(number, self._note)
            # System calls of libraries go on where they were, rather than fail with EINTR.
            signal.siginterrupt(number, False)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = max(self.reason, Reason[signal.Signals(number).name])


class Durations:
    """Learn how long work takes: the longest of the newest few of its kind."""

    def __init__(self) -> None:
        self._seconds: dict[Work, deque[float]] = {}

    def note(self, work: Work, seconds: float) -> None:
        """Remember one more."""
        self._seconds.setdefault(work, deque(maxlen=REMEMBERED)).append(seconds)

    def longest(self, *kinds: Work) -> float:
        """Return the longest of these kinds; 0 before any was seen."""
        return max((s for work in kinds for s in self._seconds.get(work, ())), default=0.0)


@dataclass(frozen=True)
class TimeLimit:
    """Say when the process is ended, on the clock of time.monotonic, and what stays free."""

    end_seconds: float
    margin_seconds: float

    @classmethod
    def of(cls, run: RunConfig, request: StopRequest) -> TimeLimit:
        """Take the earlier of `run.time_limit_seconds` and the end of the job."""
        ends = [float("inf")]
        if run.time_limit_seconds is not None:
            ends.append(request.began_seconds + run.time_limit_seconds)
        if request.job_end_seconds is not None:
            ends.append(time.monotonic() + request.job_end_seconds - time.time())
        return cls(min(ends), run.time_margin_seconds)

    def is_near(self, now_seconds: float, ahead_seconds: float, save_seconds: float) -> bool:
        """Tell whether the work ahead and a save after it might not end before the limit."""
        needed_seconds = ahead_seconds + SAVE_FACTOR * save_seconds + self.margin_seconds
        return self.end_seconds - now_seconds < needed_seconds


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
        request = request or StopRequest()
        self.limit = TimeLimit.of(run, request)
        self.durations = Durations()
        self._request, self._run = request, run
        self._largest_over_ranks = largest_over_ranks
        self._finish_factor = finish_factor
        self._since_seconds = time.monotonic()

    def after_step(self, done: int, save_seconds: float) -> Reason:
        """Return why the run stops after step `done`, evaluation included, or NONE.

        `save_seconds` is how long the last checkpoint took until it was whole, 0 before the first.
        """
        now = time.monotonic()
        self.durations.note(self._kind(done), now - self._since_seconds)
        self._since_seconds = now
        return self._agreed(self.limit.is_near(now, self._ahead_seconds(done), save_seconds))

    def after_save(self, stop: Reason) -> Reason:
        """Return why the run stops at the checkpoint just begun, `stop` where that is known.

        A signal that came meanwhile is met by it: it needs no further step and save.
        """
        self._since_seconds = time.monotonic()
        return stop or self._agreed(is_time_up=False)

    def begin_step(self) -> None:
        """Start the clock of the coming step: a resume or a rollback before it is no part of it."""
        self._since_seconds = time.monotonic()

    def in_the_end(self) -> Reason:
        """Return why a run that has taken and saved all steps leaves before its report is written.

        All ranks call it.
        """
        return self._agreed(is_time_up=False)

    def sentence(self, reason: Reason, done: int) -> str:
        """Say what happened and what to do."""
        return (
            f"stopped after step {done} of {self._run.steps} ({reason.name}) and saved in "
            f"{self._run.dir}: start the same command again and it goes on from there"
        )

    def _agreed(self, is_time_up: bool) -> Reason:
        mine = max(self._request.reason, Reason.TIME_LIMIT if is_time_up else Reason.NONE)
        return Reason(self._largest_over_ranks(mine))

    def _ahead_seconds(self, done: int) -> float:
        """Expect how long it takes until the run can next stop after step `done`."""
        if done == self._run.steps:
            longest = self.durations.longest("step", "step with evaluation")
            return self._finish_factor * longest
        kind = self._kind(done + 1)
        return self.durations.longest("step", kind)

    def _kind(self, done: int) -> Work:
        every_steps = self._run.eval_every_steps
        return "step with evaluation" if every_steps and done % every_steps == 0 else "step"
