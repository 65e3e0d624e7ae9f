"""End a run in which nothing moves any more, with the stacks of every rank that can still speak.

A rank that hangs, or is stopped, leaves its peers in a collective for ever. Each rank therefore has
a thread that counts the seconds without a beat of its training loop. The first whose patience ends
calls the others by a file; all that run write their stacks, and a rank that has written none, or is
behind, has not arrived. Uses files: the rank that hosts the group's store may be the one that hung.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_mode.config.fields import HealthConfig
from megatron_mode.errors import StallError

STACKS_NAME = "stacks"
MOST_NAMED = 8


class Arrival(NamedTuple):
    """Say how far a rank has come: its beats, and what it began with the last."""

    beats: int
    doing: str
    is_long: bool = False


class Watchdog:
    """Watch over this rank of a run; use it as a context on all ranks at once.

    `health.stall_seconds` 0 watches nothing. Where the run stalls, one rank calls `report` with a
    sentence (each does where the disk does not let them meet), and the processes end with the
    status of StallError.
    """

    def __init__(
        self, folder: Path, health: HealthConfig, report: Callable[[str], object] = print
    ) -> None:
        """Write below `folder`/stacks; the start is watched with `health.start_stall_seconds`."""
        self.report = report
        self._stacks, self._health = folder / STACKS_NAME, health
        self._interval_seconds = min(max(health.stall_seconds / 10, 0.05), 10.0)
        # A called rank looks for the file once an interval; network file systems show it late.
        self._grace_seconds = min(max(health.stall_seconds / 10, 2.0), 60.0)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._at = Arrival(0, "the start", is_long=True)
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str, *, is_long: bool = False) -> None:
        """Note that this rank begins `doing`; a long one may take `health.start_stall_seconds`."""
        self._at = Arrival(self._at.beats + 1, doing, is_long)

    def __enter__(self) -> Watchdog:
        # Files of a stall before this start stay: this start's have its number.
        number = [f"{time.time_ns()}"]
        dist.broadcast_object_list(number, src=0)
        self._number = number[0]
        self._call = self._stacks / f"stall-{self._number}"
        if self._health.stall_seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        # The first to end tears the others out of their collectives: their errors say nothing.
        if kind is not None and self._is_called():
            self._end_run()

    def _watch(self) -> None:
        seen, idle_seconds, before = self._at, 0.0, time.monotonic()
        while not self._ended.wait(self._interval_seconds):
            now = time.monotonic()
            # While the process itself is stopped it does not wait for anybody: a laptop may sleep.
            idle_seconds += min(now - before, 2 * self._interval_seconds)
            before = now
            if self._at is not seen:
                seen, idle_seconds = self._at, 0.0
            if idle_seconds >= self._patience()[0] or self._is_called():
                self._end_run()

    def _is_called(self) -> bool:
        """Tell whether a rank has called the others; a file system that fails has not."""
        with contextlib.suppress(OSError):
            return self._call.exists()
        return False

    def _patience(self) -> tuple[float, str]:
        """Return how long the work in hand may take, and the key that says so."""
        of_step = (self._health.stall_seconds, "stall_seconds")
        of_start = (self._health.start_stall_seconds, "start_stall_seconds")
        return max(of_start, of_step) if self._at.is_long else of_step

    def _end_run(self) -> None:
        """Write the stacks, wait for those of the others, name who is missing, and exit."""
        with self._ending:
            arrived = {self._rank: self._at}
            try:
                # A disk may be the reason of the stall: the sentence comes all the same.
                with contextlib.suppress(OSError):
                    self._write_stacks()
                with contextlib.suppress(OSError):
                    arrived |= self._wait_for_others()
                if self._rank == min(arrived):
                    self.report(self._sentence(arrived))
                    sys.stderr.flush()
            finally:
                os._exit(StallError.exit_status)

    def _write_stacks(self) -> None:
        self._stacks.mkdir(parents=True, exist_ok=True)
        self._call.touch()
        path = self._stacks / f"rank-{self._rank:05d}.txt"
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            beats, doing, _ = self._at
            head = f"run {self._number} rank {self._rank} beats {beats} in {doing}"
            print(head, file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
        unfinished.replace(path)

    def _wait_for_others(self) -> dict[int, Arrival]:
        """Return which ranks have written their stacks after the time of grace."""
        deadline = time.monotonic() + self._grace_seconds
        head = re.compile(rf"run {self._number} rank (\d+) beats (\d+) in (.*)\n")
        found: dict[int, Arrival] = {}
        while len(found) < self._ranks and time.monotonic() < deadline:
            for path in self._stacks.glob("rank-*.txt"):
                with path.open(encoding="utf-8") as file:
                    if match := head.match(file.readline()):
                        found[int(match[1])] = Arrival(int(match[2]), match[3])
            time.sleep(0.05)
        return found

    def _sentence(self, arrived: dict[int, Arrival]) -> str:
        furthest = max(arrived.values(), default=self._at)
        here = {rank for rank, at in arrived.items() if at.beats == furthest.beats}
        late = [str(rank) for rank in range(self._ranks) if rank not in here]
        named = ", ".join(late[:MOST_NAMED])
        if len(late) > MOST_NAMED:
            named += f" and {len(late) - MOST_NAMED} more"
        who = "all ranks are inside it"
        if late:
            who = f"{f'ranks {named} have' if len(late) > 1 else f'rank {named} has'} not arrived"
        seconds, key = self._patience()
        return (
            f"no progress for {seconds:g} s (health.{key}) in {furthest.doing}: {who}; "
            f"{self._stacks} holds the stacks of those that run. Mend the cause and start the run "
            "again: it resumes from its newest checkpoint"
        )
