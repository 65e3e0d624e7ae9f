"""Run tasks in several processes, results in order, few of them in flight.

Each process has a pipe of its own, so that it can be killed at any moment: nothing that others wait
for stays locked or half-read.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from megatron_mode.errors import DataError, ExitStatus

PENDING_PER_WORKER = 3
# Imported once, before the processes are forked off.
PRELOADED = ["megatron_mode.tokens.prepare.prepare", "sentencepiece"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnfinishedError(DataError):
    """Report a stop that is no fault of the input: what is finished stays for the next run."""


def serve(connection: Connection) -> None:
    """Do tasks in a worker; signals are for the parent, and the worker ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"

    def follow() -> None:
        parent.join()
        os._exit(ExitStatus.FAULT)

    threading.Thread(target=follow, daemon=True).start()
    while True:
        task, item = connection.recv()
        outcome: tuple[Any, Exception | None]
        try:
            outcome = task(item), None
        except Exception as error:
            error.add_note(traceback.format_exc())  # pickling drops where it was raised
            outcome = None, error
        connection.send(outcome)


class Workers:
    """Hold the processes; with one worker everything runs in this one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[Any] = []
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        # A thread waits for a process, so that the pipe of each is served while others work.
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Workers:
        if self.count > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOADED)
            for _ in range(self.count):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._free.put(ours)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()  # merging a source may take hours
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()

    def map(self, task: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield task(item) of each item, in order."""
        if not self._processes:
            yield from map(task, items)
            return
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self._threads.submit(self._run, task, item))
            if len(pending) >= PENDING_PER_WORKER * self.count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _run(self, task: Callable[[Item], Result], item: Item) -> Result:
        connection = self._free.get()
        try:
            connection.send((task, item))
            result, error = connection.recv()
        except (EOFError, OSError):
            raise UnfinishedError(
                f"A worker died (--workers {self.count}); it was probably out of memory, so give "
                "the same command with fewer --workers: it continues."
            ) from None
        finally:
            self._free.put(connection)
        if error is not None:
            raise error
        found: Result = result
        return found
