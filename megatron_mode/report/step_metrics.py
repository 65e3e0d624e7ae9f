"""Make the metrics line of a training step: what the ranks saw, the plan, the clock, the cost."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mode.cost.hardware import peak_flops_per_second
from megatron_mode.engine.step import Engine, StepResult, TokenOutputs
from megatron_mode.mix.audit.forecast import labels, planned_rows
from megatron_mode.mix.loader import StepBatch
from megatron_mode.mix.order import Order
from megatron_mode.model.size import training_flops
from megatron_mode.report.metrics import DEFAULT_BITS, TokenStatistics


class StepTimer:
    """Time steps; the wait for data is the time between two steps in which the loop had nothing."""

    def __init__(self) -> None:
        self._idle_since = self._began = time.perf_counter()
        self.data_wait_seconds = 0.0

    def start(self) -> None:
        """Note that a batch has come."""
        self._began = time.perf_counter()
        self.data_wait_seconds = self._began - self._idle_since

    def step_seconds(self) -> float:
        """Return the seconds since the loop began to wait for this step's batch."""
        return time.perf_counter() - self._began + self.data_wait_seconds

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
    tokens = statistics_of(result.outputs, DEFAULT_BITS)
    names = labels(order)
    by_source = source_sums(result.outputs, len(names))
    summed = engine.sum_over_ranks(torch.cat((by_source.reshape(-1), tokens.vector())))
    head = by_source.numel()
    end_row = (batch.step + 1) * len(batch.rows)
    tokens_seen = end_row * engine.config.model.seq_len
    return {
        "step": batch.step + 1,
        "tokens_seen": tokens_seen,
        "loss": result.loss,
        **TokenStatistics.from_vector(summed[head:]).metrics(),
        **_shares(order, batch, end_row),
        **_by_source(order, batch, summed[:head].reshape(-1, 2)),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        **_speed(engine, len(batch.rows) * engine.config.model.seq_len, seconds),
        "data_wait_seconds": timer.data_wait_seconds,
        **({"update_left_out": True} if result.verdict.is_left_out else {}),
    }


def _shares(order: Order, batch: StepBatch, end_row: int) -> dict[str, float]:
    """Compare the plan with the rows that were taken, over this step and since the start."""
    rows = len(batch.rows)
    begin_row = end_row - rows
    taken = int((batch.rows.mode == 2).sum())
    planned = order.integral.planned(end_row) - order.integral.planned(begin_row)
    return {
        "mode2_fraction_planned": planned / rows,
        "mode2_fraction_realised": taken / rows,
        "mode2_rows_planned_minus_realised": order.integral.planned(end_row)
        - (order.integral.mode_rows(2, begin_row) + taken),
        "mode2_flops_share": taken / rows,
    }


def source_sums(outputs: Sequence[TokenOutputs], sources: int) -> Tensor:
    """Return [sources, 2]: the sums of weighted LM loss and of LM weight over rows of a source."""
    sums = torch.zeros(sources, 2, dtype=torch.float64)
    for batch, loss in outputs:
        weight_BT = batch.lm_weight_BT.to(torch.float64)
        # A token of weight zero reports 0, so nothing that is not finite comes in with it.
        row_B2 = torch.stack(((loss.nll_BT * weight_BT).sum(1), weight_BT.sum(1)), dim=1)
        sums.index_add_(0, batch.source_B.cpu(), row_B2.cpu())
    return sums


def _by_source(order: Order, batch: StepBatch, sums: Tensor) -> dict[str, dict[str, float | None]]:
    """Name rows taken, rows planned and LM loss of each source; null where it gave no token."""
    names = labels(order)
    taken = np.bincount(batch.rows.source, minlength=len(names)).tolist()
    begin_row, end_row = int(batch.rows.row[0]), int(batch.rows.row[-1]) + 1
    losses = [loss / weight if weight else None for loss, weight in sums.tolist()]
    return {
        "rows_by_source": dict(zip(names, taken, strict=True)),
        "planned_rows_by_source": dict(
            zip(names, planned_rows(order, begin_row, end_row), strict=False)
        ),
        "lm_loss_by_source": dict(zip(names, losses, strict=True)),
    }


def _speed(engine: Engine, tokens: int, seconds: float) -> dict[str, float | int | None]:
    flops = training_flops(engine.config.model)
    flops_per_second = flops.total * tokens / seconds
    peak = peak_flops_per_second(_device_name(engine), engine.config.run.precision)
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "model_flops_per_second": flops_per_second,
        "mfu": flops_per_second / (peak * engine.layout.world_size) if peak else None,
        "mode_head_flops_share": flops.mode_head / flops.total,
        "peak_memory_bytes": _peak_memory_bytes(engine),
    }


def _device_name(engine: Engine) -> str:
    return torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"


def _peak_memory_bytes(engine: Engine) -> int:
    """Return this process's peak: of the GPU where there is one, else resident memory."""
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(engine.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def statistics_of(outputs: Sequence[TokenOutputs], bits: int, **changed: Any) -> TokenStatistics:
    """Add up micro-batches; none give the statistics of no tokens."""
    total = TokenStatistics.zero(bits)
    for batch, loss in outputs:
        fields = {
            "nll_N": loss.nll_BT,
            "bce_N": loss.bce_BT,
            "mode_logit_N": loss.mode_logit_BT,
            "blocked_N": loss.blocked_BT,
            "lm_weight_N": batch.lm_weight_BT,
            "mode_label_N": batch.mode_label_BT,
            "mode_weight_N": batch.mode_weight_BT,
            "flags_N": batch.flags_BT,
        }
        part = TokenStatistics.of(**{**fields, **changed}, bits=bits)
        total = total + TokenStatistics.from_vector(part.vector().cpu())
    return total
