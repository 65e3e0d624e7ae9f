"""Read steps ahead of the training loop, so that it never waits.

A step is a pure function of its number: order -> rows -> dealing -> this reader's micro-batches.
Worker threads compute steps in any order, the loop receives them in order, so neither their number
nor their timing shows in the result. There is nothing to save: a new loader starts at any step.

A step's Gb slots are laid out as [micro-batch, reader, row of the micro-batch]. Readers that share
a batch have the same `readers` count and each its own index; every slot is read exactly once.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mode.errors import ConfigError, DataError, MegatronModeError
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.order import BLOCK_ROWS, Order, Rows
from megatron_mode.mix.rows import ArrayBatch, Batch, RowReader

KEPT_BLOCKS = 3
ALIVE_EVERY_SECONDS = 0.5

MicroBatch = Batch[Tensor]


@dataclass(frozen=True)
class StepBatch:
    """Hold one reader's micro-batches of a step, and all rows of the step in index order."""

    step: int
    micro_batches: list[MicroBatch]
    rows: Rows


def as_tensors(batch: ArrayBatch) -> MicroBatch:
    """Return the rows as CPU tensors that share the arrays' memory."""
    return MicroBatch(*map(torch.from_numpy, batch))


def micro_batch(
    reader: RowReader, source_index: Sequence[int], source_row: Sequence[int]
) -> MicroBatch:
    """Read the given rows as tensors."""
    return as_tensors(reader.read_batch(source_index, source_row))


class Loader(Iterator[StepBatch], AbstractContextManager["Loader"]):
    """Iterate over the steps first_step .. end_step - 1 of one reader; a context that closes it."""

    def __init__(
        self,
        order: Order,
        reader: RowReader,
        *,
        global_rows: int,
        micro_rows: int,
        end_step: int,
        first_step: int = 0,
        reader_index: int = 0,
        readers: int = 1,
        prefetch_steps: int = 4,
        threads: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Start reading; `readers` share each batch of `global_rows` rows.

        `pin_memory` puts batches where a GPU can fetch them while the host continues.

        Raises ConfigError where global_rows does not split into micro-batches of all readers.
        """
        if global_rows % (micro_rows * readers):
            raise ConfigError(
                f"batch.global_rows is {global_rows}, but it must be a multiple of "
                f"batch.micro_rows * data-parallel size = {micro_rows} * {readers}; change "
                "batch.global_rows or batch.micro_rows"
            )
        self.data_wait_seconds = 0.0
        self._order, self._reader = order, reader
        self._global_rows, self._micro_rows = global_rows, micro_rows
        self._reader_index, self._readers = reader_index, readers
        self._next_step, self._end_step = first_step, end_step
        self._block_steps = max(1, BLOCK_ROWS // global_rows)
        self._block = functools.lru_cache(KEPT_BLOCKS)(self._work_out)
        self._pending: deque[Future[StepBatch]] = deque()
        self._prefetch_steps = prefetch_steps
        self._closed = False
        self._pin_memory = pin_memory
        self._workers: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(
            threads,
            thread_name_prefix="loader",
            initializer=lambda: self._workers.append(threading.current_thread()),
        )
        self._submit()

    def __next__(self) -> StepBatch:
        """Return the next step, and note the wait for it in `data_wait_seconds`.

        An error of a worker is raised here, at the step that it belongs to, and closes the loader:
        as DataError, unless it is a sentence already.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        if not self._pending:
            raise StopIteration
        begin = time.perf_counter()
        try:
            batch = self._wait_for(self._pending.popleft())
        except BaseException:
            self.close()
            raise
        self.data_wait_seconds = time.perf_counter() - begin
        self._submit()
        return batch

    def __exit__(self, *error: object) -> None:
        """Close the loader."""
        self.close()

    def close(self) -> None:
        """Drop steps not yet begun and wait for the one in work; may be called again."""
        self._closed = True
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _wait_for(self, future: Future[StepBatch]) -> StepBatch:
        """Return what a worker read; a thread that ended would leave its step undone for ever."""
        while not wait([future], timeout=ALIVE_EVERY_SECONDS).done:
            if not all(worker.is_alive() for worker in self._workers):
                raise self._unreadable("a thread that reads rows has ended")
        error = future.exception()
        if error is None or isinstance(error, MegatronModeError):
            return future.result()
        raise self._unreadable(f"{type(error).__name__}: {error}") from error

    def _unreadable(self, what: str) -> DataError:
        step = self._next_step - len(self._pending) - 1
        return DataError(
            f"the rows of step {step} cannot be read ({what}): mend the data or the disk and start "
            "the run again to resume from its newest checkpoint"
        )

    def _submit(self) -> None:
        """Keep `prefetch_steps` steps in work or ready."""
        while len(self._pending) < self._prefetch_steps and self._next_step < self._end_step:
            self._pending.append(self._pool.submit(self._load, self._next_step))
            self._next_step += 1

    def _work_out(self, block: int) -> tuple[Rows, IntArray]:
        """Return the rows and dealings of some steps; threads may do the same block at once."""
        begin = block * self._block_steps
        end = min(begin + self._block_steps, self._end_step)
        rows = self._order.rows(begin * self._global_rows, end * self._global_rows)
        return rows, self._order.deals(begin, end, self._global_rows)

    def _load(self, step: int) -> StepBatch:
        """Read this reader's slots of a step."""
        block, within = divmod(step, self._block_steps)
        block_rows, deals = self._block(block)
        rows = block_rows[slice(within * self._global_rows, (within + 1) * self._global_rows)]
        slots = deals[within].reshape(-1, self._readers, self._micro_rows)
        micro_batches = []
        for slot in slots[:, self._reader_index]:
            mine = rows[slot]
            batch = micro_batch(self._reader, mine.source.tolist(), mine.source_row.tolist())
            if self._pin_memory:
                batch = MicroBatch(*(tensor.pin_memory() for tensor in batch))
            micro_batches.append(batch)
        return StepBatch(step, micro_batches, rows)
