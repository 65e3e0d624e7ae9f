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
from types import TracebackType
from typing import TypeVar

from megatron_mode.errors import DataError

PENDING_PER_WORKER = 3

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnfinishedError(DataError):
    """Report a stop that is no fault of the input: what is finished stays for the next run."""


def follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
                    process.terminate()  # a task may take hours
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
                pending.append(self._pool.submit(task, item))
                if len(pending) >= PENDING_PER_WORKER * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UnfinishedError(
                f"A worker died (--workers {self.count}); it was probably out of memory, so give "
                "the same command with fewer --workers: it continues."
            ) from None
