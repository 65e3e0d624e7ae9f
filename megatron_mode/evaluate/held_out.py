"""Evaluate on held-out sources: losses and mode separation, by source and rendering.

Rows are spread evenly over a source, ranks share them, and each sum is added over ranks once. A row
begins anywhere in a document, so it holds complete documents and windows cut from the middle of
one; these windows are also scored alone. T row length, B rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mode.engine.step import Engine, TokenOutputs
from megatron_mode.errors import DataError
from megatron_mode.mix.loader import MicroBatch, as_tensors, micro_batch
from megatron_mode.mix.packing import rows_in_stream
from megatron_mode.mix.rows import RowReader
from megatron_mode.report.metrics import POSITION_BUCKETS, position_histogram, token_sums
from megatron_mode.tokens.flags import CONTROL
from megatron_mode.tokens.source.shards import Source

EVALUATION_BITS = 16
HeldOutRendering = Literal["plain", "chat", "mixed"]


class Piece(NamedTuple):
    """Hold the mean mode logit of a document's content tokens in a row: its start or a middle."""

    mode2: bool
    from_start: bool
    mean_logit: float


@dataclass(frozen=True)
class SourceResult:
    """Hold what one held-out source gave, with sums of `report.metrics` over its tokens."""

    name: str
    mode: int
    rendering: HeldOutRendering
    tokens_S: Tensor
    windows_S: Tensor
    positions_K2B: Tensor
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
    parts = (
        token_sums(outputs, EVALUATION_BITS),
        token_sums([*map(_middle_windows, outputs)], EVALUATION_BITS),
        position_histogram(outputs).reshape(-1),
    )
    summed = torch.split(engine.sum_over_ranks(torch.cat(parts)), [len(part) for part in parts])
    found: list[Piece] = []
    targets: Counter[int] = Counter()
    if engine.computes_loss and engine.at.tensor == 0:
        for output in outputs:
            found += _pieces(output)
            targets.update(output.batch.target_BT[output.batch.lm_weight_BT > 0].tolist())
    if pieces:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (found, targets))
        found = [piece for part, _ in gathered for piece in part]
        targets = sum((part for _, part in gathered), Counter())
    return SourceResult(
        name=source.name,
        mode=source.mode,
        rendering=rendering_of(source),
        tokens_S=summed[0],
        windows_S=summed[1],
        positions_K2B=summed[2].view(POSITION_BUCKETS, 2, -1),
        pieces=found,
        target_counts=targets,
    )


def evaluate_window(engine: Engine, reader: RowReader, index: int, begin_token: int) -> Tensor:
    """Return the mode logits [T] of the row that starts at `begin_token`, on every rank."""
    rows = engine.config.batch.micro_rows
    batch = as_tensors(reader.read_windows([index] * rows, [begin_token] * rows))
    outputs = engine.evaluate([batch] if engine.reads_data else [], 1)
    logit_T = torch.zeros(reader.seq_len)
    if outputs and engine.at.data == 0:
        logit_T = outputs[0].loss.mode_logit_BT[0]
    return engine.sum_over_ranks(logit_T.to(torch.float64))


def rendering_of(source: Source) -> HeldOutRendering:
    """Return how the source's dialogues are rendered; a corpus without a record counts as plain."""
    found: HeldOutRendering = source.info.get("rendering", "plain")
    if found not in get_args(HeldOutRendering):
        raise DataError(
            f"{source.root / source.name}.json: rendering is {found!r}, but it must be one of "
            f"{', '.join(get_args(HeldOutRendering))}; prepare the source again"
        )
    return found


def _forward(engine: Engine, reader: RowReader, index: int, rows: int) -> list[TokenOutputs]:
    """Run rows spread evenly over the source forward."""
    available = rows_in_stream(reader.sources[index].tokens, reader.seq_len)
    rows = min(rows, available)
    chosen = [row * available // rows for row in range(rows)]

    def read(some: Sequence[int]) -> MicroBatch:
        return micro_batch(reader, [index] * len(some), some)

    return engine.forward_rows(chosen, engine.config.batch.micro_rows, read)


def _middle_windows(output: TokenOutputs) -> TokenOutputs:
    """Weigh only a row's first document, where the row does not begin with its start."""
    batch = output.batch
    first_BT = (batch.position_BT == 0).cumsum(dim=1) == 1
    starts_inside_B1 = (batch.flags_BT[:, :1] & CONTROL) == 0
    mode_weight_BT = batch.mode_weight_BT * (first_BT & starts_inside_B1)
    return output._replace(batch=batch._replace(mode_weight_BT=mode_weight_BT))


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
