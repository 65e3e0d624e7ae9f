"""Evaluate on held-out sources: losses and mode separation, by source and rendering.

Rows are spread evenly over a source, ranks share them, and each sum is added over ranks once. A row
begins anywhere in a document, so it holds complete documents and windows cut from the middle of
one; these windows are also scored alone. T row length, B rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mode.engine.step import Engine, TokenOutputs
from megatron_mode.mix.loader import MicroBatch, as_tensors, micro_batch
from megatron_mode.mix.packing import rows_in_stream
from megatron_mode.mix.rows import RowReader
from megatron_mode.report.metrics import (
    DEFAULT_BITS,
    POSITION_BUCKETS,
    PositionStatistics,
    TokenStatistics,
)
from megatron_mode.report.step_metrics import statistics_of
from megatron_mode.tokens.flags import CONTROL
from megatron_mode.tokens.source.shards import Source

EVALUATION_BITS = 16


@dataclass(frozen=True)
class Piece:
    """Hold the mean mode logit of one document's content tokens in one row.

    `from_start` tells a document seen from its start from a window cut from its middle.
    """

    mode2: bool
    from_start: bool
    mean_logit: float


@dataclass
class SourceResult:
    """Hold what one held-out source gave."""

    name: str
    mode: int
    rendering: str
    tokens: TokenStatistics
    windows: TokenStatistics
    positions: PositionStatistics
    pieces: list[Piece]
    target_counts: Counter[int]


def evaluate_source(
    engine: Engine, reader: RowReader, index: int, rows: int, *, pieces: bool
) -> SourceResult:
    """Evaluate on `rows` rows of source `index` of the reader; every rank calls it.

    `pieces` also gathers document scores, which costs a gather of Python objects.
    """
    source = reader.sources[index]
    assert isinstance(source, Source)
    outputs = _forward(engine, reader, index, rows)
    tokens = statistics_of(outputs, EVALUATION_BITS)
    windows = TokenStatistics.zero(EVALUATION_BITS)
    positions = PositionStatistics.from_vector(_zero_positions())
    for output in outputs:
        batch = output.batch
        middle_BT = batch.mode_weight_BT * _middle_windows(batch)
        windows = windows + statistics_of([output], EVALUATION_BITS, mode_weight_N=middle_BT)
        part = PositionStatistics.of(
            mode_logit_N=output.loss.mode_logit_BT,
            mode_label_N=batch.mode_label_BT,
            mode_weight_N=batch.mode_weight_BT,
            flags_N=batch.flags_BT,
            position_N=batch.position_BT,
        )
        positions = positions + PositionStatistics.from_vector(part.vector().cpu())
    summed = engine.sum_over_ranks(
        torch.cat((tokens.vector(), windows.vector(), positions.vector()))
    )
    width = len(tokens.vector())
    counted = engine.computes_loss and engine.at.tensor == 0
    found = [piece for output in outputs for piece in _pieces(output)] if counted else []
    targets = Counter(token for output in outputs for token in _targets(output)) if counted else {}
    if pieces:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (found, targets))
        found = [piece for part, _ in gathered for piece in part]
        targets = sum((Counter(part) for _, part in gathered), Counter())
    return SourceResult(
        name=source.name,
        mode=source.mode,
        rendering=str(source.info.get("rendering", "plain")),
        tokens=TokenStatistics.from_vector(summed[:width]),
        windows=TokenStatistics.from_vector(summed[width : 2 * width]),
        positions=PositionStatistics.from_vector(summed[2 * width :]),
        pieces=found,
        target_counts=Counter(targets),
    )


def evaluate_window(engine: Engine, reader: RowReader, index: int, begin_token: int) -> Tensor:
    """Return the mode logits [T] of the row that starts at `begin_token`, on every rank."""
    rows = engine.config.batch.micro_rows
    batch = reader.read_windows([index] * rows, [begin_token] * rows)
    mine = [as_tensors(batch)] if engine.reads_data else []
    outputs = engine.evaluate(mine, 1)
    seq_len = reader.seq_len
    logits = outputs[0].loss.mode_logit_BT[0] if outputs else torch.zeros(seq_len)
    if engine.at.data != 0:
        logits = torch.zeros(seq_len)
    return engine.sum_over_ranks(logits.to(torch.float64))


def _forward(engine: Engine, reader: RowReader, index: int, rows: int) -> list[TokenOutputs]:
    """Run rows spread evenly over the source forward."""
    available = rows_in_stream(reader.sources[index].tokens, reader.seq_len)
    rows = min(rows, available)
    chosen = [row * available // rows for row in range(rows)]

    def read(some: Sequence[int]) -> MicroBatch:
        return micro_batch(reader, [index] * len(some), some)

    return engine.forward_rows(chosen, engine.config.batch.micro_rows, read)


def _middle_windows(batch: MicroBatch) -> Tensor:
    """Mark the tokens of a row's first document when the row does not begin with its start."""
    first_BT = (batch.position_BT == 0).cumsum(dim=1) == 1
    starts_inside_B = (batch.flags_BT[:, :1] & CONTROL) == 0
    return (first_BT & starts_inside_B).to(batch.mode_weight_BT.dtype)


def _pieces(output: TokenOutputs) -> Iterator[Piece]:
    batch = MicroBatch(*(tensor.cpu() for tensor in output.batch))
    logit, label = output.loss.mode_logit_BT.float().cpu(), batch.mode_label_BT
    flags = batch.flags_BT
    document = (batch.position_BT == 0).cumsum(dim=1)
    content = (batch.mode_weight_BT > 0) & ((flags & CONTROL) == 0)
    for row in range(logit.shape[0]):
        for number in range(1, int(document[row, -1]) + 1):
            mine = document[row] == number
            scores = logit[row][mine & content[row]]
            if scores.numel():
                begin = int(mine.nonzero()[0])
                yield Piece(
                    mode2=bool(label[row, begin] >= 0.5),
                    from_start=bool(flags[row, begin] & CONTROL),
                    mean_logit=float(scores.mean()),
                )


def _targets(output: TokenOutputs) -> list[int]:
    kept: list[int] = output.batch.target_BT[output.batch.lm_weight_BT > 0].tolist()
    return kept


def _zero_positions() -> Tensor:
    return torch.zeros(2 * POSITION_BUCKETS << DEFAULT_BITS, dtype=torch.float64)
