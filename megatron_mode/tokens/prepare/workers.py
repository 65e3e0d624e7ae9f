"""Do one thing after the other in several processes, results in order, few of them in flight."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import FrameType, TracebackType
from typing import TypeVar

from megatron_mode.errors import DataError

PENDING_PER_WORKER = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnfinishedError(DataError):
    """Report a stop that is no fault of the input: what is finished stays for the next run."""


class Stop:
    """End the task at hand on SIGTERM, and start no other; the process itself lives on.

    A worker that dies may leave the pool's queues locked or half-read, and the parent waiting.
    """

    def __init__(self) -> None:
        self._asked = self._in_task = False

    def listen(self) -> None:
        """Take SIGTERM."""
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._in_task:
            raise SystemExit(128 + number)

    def run(self, task: Callable[[Item], Result], item: Item) -> Result:
        """Return task(item), unless a stop was asked for."""
        self._in_task = True
        try:
            if self._asked:
                raise SystemExit(128 + signal.SIGTERM)
            return task(item)
        finally:
            self._in_task = False


STOP = Stop()


def run_task(task: Callable[[Item], Result], item: Item) -> Result:
    """Do one task in a worker."""
    return STOP.run(task, item)


def follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    STOP.listen()
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Workers:
    """Hold the processes; with one worker everything runs in this one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, spawn, initializer=follow_parent)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            if kind in (KeyboardInterrupt, SystemExit):
                for process in multiprocessing.active_children():
                    process.terminate()  # merging a source may take hours
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield task(item) of each item, in order."""
        if self._pool is None:
            yield from map(task, items)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(run_task, task, item))
                if len(pending) >= PENDING_PER_WORKER * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UnfinishedError(
                f"A worker died (--workers {self.count}); it was probably out of memory, so give "
                "the same command with fewer --workers: it continues."
            ) from None
