"""Hold the loader to one result whatever its threads, readers and micro-batches."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mode.config.mix import MixConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.loader import Loader, MicroBatch, StepBatch, micro_batch
from megatron_mode.mix.order import Order
from megatron_mode.mix.packing import PackedSource, rows_in_stream
from megatron_mode.mix.rows import RowReader

SEQ_LEN, GLOBAL_ROWS, STEPS = 32, 12, 9
MIX = MixConfig.model_validate(
    {
        "mode1": {"sources": [{"name": "web", "weight": "2"}, {"name": "books"}]},
        "mode2": {"sources": [{"name": "chat"}]},
        "mode2_fraction": {"shape": "linear", "start": "0.1", "end": "0.6"},
    }
)


@pytest.fixture
def plan(memory_source: Callable[..., Any]) -> tuple[Order, RowReader]:
    sources = [
        memory_source("web", 1, 1400, 1),
        memory_source("books", 1, 700, 2),
        memory_source("chat", 2, 900, 3),
    ]
    rows = {source.name: rows_in_stream(source.tokens, SEQ_LEN) for source in sources}
    order = Order(MIX, SEQ_LEN, GLOBAL_ROWS * STEPS, 7, rows)
    return order, RowReader([PackedSource(s, SEQ_LEN) for s in sources], SEQ_LEN, MIX)


def steps_of(plan: tuple[Order, RowReader], **keys: int) -> list[StepBatch]:
    keys = {"global_rows": GLOBAL_ROWS, "micro_rows": 2, "end_step": STEPS, **keys}
    with Loader(*plan, **keys) as loader:
        return list(loader)


def same(a: StepBatch, b: StepBatch) -> bool:
    pairs = zip(a.micro_batches, b.micro_batches, strict=True)
    return a.step == b.step and all(
        torch.equal(getattr(x, name), getattr(y, name)) for x, y in pairs for name in x._fields
    )


def row_bytes(batches: list[MicroBatch]) -> list[bytes]:
    """Return every row with all its fields as bytes, sorted."""
    return sorted(
        b"".join(getattr(batch, name)[b].numpy().tobytes() for name in batch._fields)
        for batch in batches
        for b in range(len(batch.input_BT))
    )


@pytest.mark.parametrize(
    ("readers", "micro_rows"), [(1, 1), (1, 12), (2, 3), (2, 6), (3, 1), (3, 4), (4, 1), (4, 3)]
)
def test_readers_together_read_the_rows_of_the_step(
    plan: tuple[Order, RowReader], readers: int, micro_rows: int
) -> None:
    order, reader = plan
    by_reader = [
        steps_of(plan, readers=readers, reader_index=index, micro_rows=micro_rows)
        for index in range(readers)
    ]
    for step in range(STEPS):
        rows = order.rows(step * GLOBAL_ROWS, (step + 1) * GLOBAL_ROWS)
        truth = micro_batch(reader, rows.source.tolist(), rows.source_row.tolist())
        parts = [batch for steps in by_reader for batch in steps[step].micro_batches]
        assert {len(part.input_BT) for part in parts} == {micro_rows}
        assert len({len(steps[step].micro_batches) for steps in by_reader}) == 1
        assert row_bytes(parts) == row_bytes([truth])
        for steps in by_reader:
            assert steps[step].step == step
            assert np.array_equal(steps[step].rows.source_row, rows.source_row)


def test_rows_lie_in_the_dealt_slots(plan: tuple[Order, RowReader]) -> None:
    """Slots run micro-batch by micro-batch, in each reader by reader."""
    order, reader = plan
    loaded = steps_of(plan, readers=2, reader_index=1, micro_rows=3)[4]
    deal = order.deals(4, 5, GLOBAL_ROWS)[0]
    rows = order.rows(4 * GLOBAL_ROWS, 5 * GLOBAL_ROWS)
    for number, slots in enumerate(([3, 4, 5], [9, 10, 11])):
        mine = rows[deal[slots]]
        truth = micro_batch(reader, mine.source.tolist(), mine.source_row.tolist())
        assert torch.equal(loaded.micro_batches[number].input_BT, truth.input_BT)


def test_threads_prefetch_and_restart_change_nothing(plan: tuple[Order, RowReader]) -> None:
    base = steps_of(plan)
    assert [batch.step for batch in base] == list(range(STEPS))
    for keys in ({"threads": 4, "prefetch_steps": 7}, {"prefetch_steps": 1}):
        assert all(map(same, steps_of(plan, **keys), base))
    tail = steps_of(plan, first_step=5, threads=2)
    assert len(tail) == STEPS - 5
    assert all(map(same, tail, base[5:]))


class GatedReader(RowReader):
    """Read like another reader, count the batches begun, and wait at the gate."""

    def __init__(self, reader: RowReader) -> None:
        self.__dict__.update(reader.__dict__)
        self.begun = 0
        self.lock = threading.Lock()
        self.gate = threading.Event()

    def read_batch(self, *picks: Any) -> Any:
        with self.lock:
            self.begun += 1
        assert self.gate.wait(60)
        return super().read_batch(*picks)

    def wait_for(self, begun: int) -> None:
        deadline = time.monotonic() + 60
        while self.begun < begun:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_steps_are_read_ahead_of_a_slow_loop(plan: tuple[Order, RowReader]) -> None:
    """While the loop is busy with one step, exactly the next three are read."""
    order, reader = plan
    gated = GatedReader(reader)
    with Loader(
        order, gated, global_rows=12, micro_rows=12, end_step=STEPS, prefetch_steps=3
    ) as loader:
        gated.wait_for(1)  # before anyone asked
        threading.Timer(0.2, gated.gate.set).start()
        next(loader)
        assert loader.data_wait_seconds > 0.1
        gated.wait_for(4)
        time.sleep(0.05)
        assert gated.begun == 4
        next(loader)
        assert loader.data_wait_seconds < 0.1


def test_an_error_comes_up_at_its_step_and_closes(plan: tuple[Order, RowReader]) -> None:
    order, reader = plan
    before = threading.active_count()
    rows = order.rows(0, GLOBAL_ROWS * STEPS)
    reader.sources[0].fail_at = 30 * SEQ_LEN
    bad = (rows.source == 0) & (rows.source_row >= 30)
    failing = int(np.flatnonzero(bad)[0]) // GLOBAL_ROWS
    loader = Loader(*plan, global_rows=GLOBAL_ROWS, micro_rows=2, end_step=STEPS, threads=2)
    for step in range(failing):
        assert next(loader).step == step
    sentence = rf"rows of step {failing} cannot be read \(OSError: the disk is gone\)"
    with pytest.raises(DataError, match=sentence) as raised:
        next(loader)
    assert isinstance(raised.value.__cause__, OSError)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def end_thread(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise in another thread, which is as near as Python comes to killing one."""
    number = ctypes.c_ulong(thread.ident or 0)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(error)) == 1


@pytest.mark.parametrize("error", [SystemExit, MemoryError])
def test_a_worker_killed_while_it_reads_is_told_in_a_sentence(
    plan: tuple[Order, RowReader], error: type[BaseException]
) -> None:
    order, reader = plan
    gated = GatedReader(reader)
    loader = Loader(order, gated, global_rows=12, micro_rows=12, end_step=STEPS)
    gated.wait_for(1)
    end_thread(loader._workers[0], error)
    gated.gate.set()
    with pytest.raises(DataError, match=rf"rows of step 0 cannot be read \({error.__name__}"):
        next(loader)


def test_a_worker_that_is_gone_is_no_hang(plan: tuple[Order, RowReader]) -> None:
    """The thread ends between two steps, so that nobody would ever read the next ones."""
    order, reader = plan
    loader = Loader(order, reader, global_rows=12, micro_rows=12, end_step=STEPS, prefetch_steps=1)
    (worker,) = loader._workers
    assert next(loader).step == 0
    time.sleep(0.2)  # step 1 is read, the thread waits for more
    end_thread(worker, SystemExit)
    assert next(loader).step == 1  # wakes the thread, which ends before it takes step 2
    worker.join(10)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"rows of step 2 cannot be read \(a thread .* has ended"):
        next(loader)
    assert time.monotonic() - begin < 5


def test_closing_mid_run_neither_hangs_nor_leaves_threads(plan: tuple[Order, RowReader]) -> None:
    """Two steps are in work, six wait: the two are finished, the six are never begun."""
    order, reader = plan
    before = threading.active_count()
    gated = GatedReader(reader)
    loader = Loader(
        order, gated, global_rows=12, micro_rows=12, end_step=STEPS, prefetch_steps=8, threads=2
    )
    gated.wait_for(2)
    closer = threading.Thread(target=loader.close)
    closer.start()
    time.sleep(0.5)
    gated.gate.set()
    closer.join(60)
    assert not closer.is_alive()
    assert gated.begun == 2
    loader.close()
    assert threading.active_count() == before


def test_an_empty_range_of_steps_is_empty(plan: tuple[Order, RowReader]) -> None:
    assert steps_of(plan, first_step=STEPS) == []


def test_a_batch_that_does_not_split_is_refused(plan: tuple[Order, RowReader]) -> None:
    with pytest.raises(ConfigError, match=r"global_rows is 12.*multiple of.*= 2 \* 5"):
        Loader(*plan, global_rows=12, micro_rows=2, end_step=1, readers=5)
