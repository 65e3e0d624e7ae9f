"""Run chosen rows forward, dealt over the data ranks, without training on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_mode.engine.step import Engine, TokenOutputs
from megatron_mode.mix.loader import MicroBatch

Read = Callable[[Sequence[int]], MicroBatch]


def forward_rows(
    engine: Engine, rows: Sequence[int], micro_rows: int, read: Read
) -> list[TokenOutputs]:
    """Evaluate rows in micro-batches shared by the data ranks; every rank calls it.

    `read` gives the micro-batch of some rows. The last micro-batches are filled up with rows that
    weigh nothing.
    """
    stride = micro_rows * engine.layout.data
    count = -(-len(rows) // stride)
    mine = []
    for batch in range(count if engine.reads_data else 0):
        begin = batch * stride + engine.at.data * micro_rows
        chosen = rows[begin : begin + micro_rows]
        micro_batch = read([*chosen, *[rows[0]] * (micro_rows - len(chosen))])
        micro_batch.lm_weight_BT[len(chosen) :] = 0
        micro_batch.mode_weight_BT[len(chosen) :] = 0
        mine.append(micro_batch)
    return engine.evaluate(mine, count)
