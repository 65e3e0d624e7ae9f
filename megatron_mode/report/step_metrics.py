"""Make the metrics line of a training step: what the ranks saw, the plan, the clock, the cost."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_mode.cost.hardware import peak_flops_per_second
from megatron_mode.engine.step import Engine, StepResult, TokenOutputs
from megatron_mode.mix.audit.forecast import labels, planned_rows
from megatron_mode.mix.loader import StepBatch
from megatron_mode.mix.order import Order
from megatron_mode.model.size import training_flops
from megatron_mode.report.metrics import token_metrics, token_sums


class StepTimer:
    """Time steps; the wait for data is the time between two steps in which the loop had nothing."""

    def __init__(self) -> None:
        self._idle_since = time.perf_counter()
        self.data_wait_seconds = 0.0

    def start(self) -> None:
        """Note that a batch has come."""
        self.data_wait_seconds = self.step_seconds()

    def step_seconds(self) -> float:
        """Return the seconds since the loop began to wait for this step's batch."""
        return time.perf_counter() - self._idle_since

    def stop(self) -> None:
        """Note that the loop asks for the next batch."""
        self._idle_since = time.perf_counter()


def metrics_line(
    engine: Engine, order: Order, batch: StepBatch, result: StepResult, timer: StepTimer
) -> dict[str, object]:
    """Return the line of a step; all ranks call it, for the sums over ranks.

    `step` counts finished steps.
    """
    seconds = timer.step_seconds()
    names = labels(order)
    by_source = _source_sums(result.outputs, len(names)).reshape(-1)
    summed = engine.sum_over_ranks(torch.cat((by_source, token_sums(result.outputs))))
    loss_sums = summed[: len(by_source)].reshape(-1, 2).tolist()
    losses = [loss / weight if weight else None for loss, weight in loss_sums]
    step_tokens = len(batch.rows) * engine.config.model.seq_len
    return {
        "step": batch.step + 1,
        "tokens_seen": (batch.step + 1) * step_tokens,
        "loss": result.loss,
        **token_metrics(summed[len(by_source) :]),
        **_rows(order, batch, names),
        "lm_loss_by_source": dict(zip(names, losses, strict=True)),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        **_speed(engine, step_tokens, seconds),
        "data_wait_seconds": timer.data_wait_seconds,
        **({"update_left_out": True} if result.verdict.is_left_out else {}),
    }


def _source_sums(outputs: Sequence[TokenOutputs], sources: int) -> Tensor:
    """Return [sources, 2]: the sums of weighted LM loss and of LM weight over rows of a source."""
    sums = torch.zeros(sources, 2, dtype=torch.float64)
    for batch, loss in outputs:
        weight_BT = batch.lm_weight_BT.to(torch.float64)
        # A token of weight zero reports 0, so nothing that is not finite comes in with it.
        row_B2 = torch.stack(((loss.nll_BT * weight_BT).sum(1), weight_BT.sum(1)), dim=1)
        sums.index_add_(0, batch.source_B.cpu(), row_B2.cpu())
    return sums


def _rows(order: Order, batch: StepBatch, names: Sequence[str]) -> dict[str, object]:
    """Compare the plan with the rows that were taken, over this step and since the start."""
    rows, begin_row = len(batch.rows), int(batch.rows.row[0])
    end_row = begin_row + rows
    taken = int((batch.rows.mode == 2).sum())
    planned_before, planned_after = map(order.integral.planned, (begin_row, end_row))
    by_source = np.bincount(batch.rows.source, minlength=len(names)).tolist()
    planned = planned_rows(order, begin_row, end_row)
    return {
        "mode2_fraction_planned": (planned_after - planned_before) / rows,
        "mode2_fraction_realised": taken / rows,
        "mode2_rows_planned_minus_realised": planned_after
        - (order.integral.mode_rows(2, begin_row) + taken),
        "mode2_flops_share": taken / rows,
        "rows_by_source": dict(zip(names, by_source, strict=True)),
        # The names of edits come last, and the plan gives them no rows.
        "planned_rows_by_source": dict(zip(names, planned, strict=False)),
    }


def _speed(engine: Engine, tokens: int, seconds: float) -> dict[str, float | int | None]:
    """Return speed and memory; the peak is that of the GPU, on a CPU resident memory."""
    flops = training_flops(engine.config.model)
    flops_per_second = flops.total * tokens / seconds
    if engine.device.type == "cuda":
        name = torch.cuda.get_device_name(engine.device)
        peak_memory_bytes = torch.cuda.max_memory_allocated(engine.device)
    else:
        name = "cpu"
        peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = peak_flops_per_second(name, engine.config.run.precision)
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "model_flops_per_second": flops_per_second,
        "mfu": flops_per_second / (peak * engine.layout.world_size) if peak else None,
        "mode_head_flops_share": flops.mode_head / flops.total,
        "peak_memory_bytes": peak_memory_bytes,
    }
