"""Run one training step or one evaluation through DeepSpeed's pipeline.

Only the last stage computes the loss: it is on the last rank of a 1F1B pipeline and on the first
of a DualPipeV one. It keeps the detached per-token outputs of every micro-batch for metrics.

T row length, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mode.config import Config
from megatron_mode.cost.topology import Coordinates, Layout, accumulation_steps
from megatron_mode.engine.health import APPLY, HealthJudge, Verdict
from megatron_mode.engine.optimizer import learning_rate
from megatron_mode.engine.update_gate import install_gate
from megatron_mode.kernels.mode_loss import LossOutput, Targets
from megatron_mode.loss.blocking import blocked_losses
from megatron_mode.loss.mode_loss import ModeLoss
from megatron_mode.loss.normalise import BlockedShares, LossScales, loss_scales, scaled_loss
from megatron_mode.mix.loader import MicroBatch
from megatron_mode.model.decoder import HeadInputs


class TokenOutputs(NamedTuple):
    """Hold a micro-batch and what the loss gave for each of its tokens, detached."""

    batch: MicroBatch
    loss: LossOutput


class StepResult(NamedTuple):
    """Report a training step."""

    loss: float
    grad_norm: float
    """NaN where the update was left out."""
    learning_rate: float
    outputs: list[TokenOutputs]
    """Empty on all but the last stage."""
    verdict: Verdict = APPLY


class StepLoss:
    """Serve as the pipeline's loss_fn: weigh both sums and keep the per-token outputs.

    A plain object, not a module: a module hung on `loss_fn` would be registered on every stage.
    """

    def __init__(self, mode_loss: ModeLoss) -> None:
        self.mode_loss = mode_loss
        self.scales = LossScales(0.0, 0.0)
        self.blocking_active = False
        self.loss_sum: Tensor | float = 0.0
        self.outputs: list[TokenOutputs] = []

    def start(self, scales: LossScales, blocking_active: bool) -> None:
        """Set the weights of the coming step and forget the outputs of the last."""
        self.scales = scales
        self.blocking_active = blocking_active
        self.loss_sum = 0.0
        self.outputs = []

    def __call__(self, outputs: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Return the micro-batch's scalar loss, scaled so that the engine's average is global."""
        *fields, lm_rows_n = labels
        batch = MicroBatch(*fields)
        targets = Targets(
            batch.target_BT,
            batch.lm_weight_BT,
            batch.mode_label_BT,
            batch.mode_weight_BT,
            lm_rows_n,
        )
        heads = HeadInputs(*outputs)
        result = self.mode_loss(*heads, targets, blocking_active=self.blocking_active)
        detached = replace(result, lm_sum=result.lm_sum.detach(), mode_sum=result.mode_sum.detach())
        self.outputs.append(TokenOutputs(batch, detached))
        loss = scaled_loss(result.lm_sum, result.mode_sum, self.scales)
        self.loss_sum = self.loss_sum + loss.detach().double()
        return loss


class Engine:
    """Drive one rank of a run: steps, evaluation and the sums over ranks that metrics need."""

    def __init__(self, config: Config, layout: Layout, pipeline_engine: Any) -> None:
        self.config = config
        self.layout = layout
        self.deepspeed = pipeline_engine
        self.step_loss: StepLoss = pipeline_engine.module.loss_fn
        self.rank: int = dist.get_rank()
        self.at: Coordinates = layout.coordinates(self.rank)
        self.turns = config.parallel.schedule == "dualpipev"
        """Micro-batches come back from the last rank to the first."""
        self.computes_loss = self.at.pipeline == (0 if self.turns else layout.pipeline - 1)
        self.reads_data = self.at.pipeline == 0 or self.computes_loss
        self.device: torch.device = torch.device(pipeline_engine.device)
        self.accumulation_steps = accumulation_steps(config, layout.data)
        self.blocked_shares = BlockedShares()
        """Of the newest step whose update was applied, for `loss.blocking.renormalise`."""
        self.judge = HealthJudge(config.health)
        self.gradient_square: Tensor | None = None
        """Sum of squares of this rank's part of the newest gradient, fp64 with one element."""
        self._step, self._verdict = 0, APPLY
        install_gate(pipeline_engine, self._lets_through)

    def train_step(self, step: int, micro_batches: list[MicroBatch]) -> StepResult:
        """Run step `step` (0-based) on this rank's micro-batches and update the weights.

        The judge of `health` may leave the update out, on all ranks.
        """
        self._step = step
        tokens_seen = step * self.config.batch.global_rows * self.config.model.seq_len
        blocking = self.config.loss.blocking
        self.step_loss.start(
            self._scales(micro_batches),
            blocking.policy != "none" and tokens_seen >= blocking.warmup_tokens,
        )
        rate = learning_rate(self.config.optimizer, step, self.config.run.steps)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        loss = self.deepspeed.train_batch(data_iter=_pairs(micro_batches))
        norm = self.deepspeed.get_global_grad_norm()
        if norm is None or self._verdict.is_left_out:
            norm = math.nan
        if blocking.policy != "none" and not self._verdict.is_left_out:
            self.blocked_shares = self._sum_blocked()
        return StepResult(float(loss), float(norm), rate, self.step_loss.outputs, self._verdict)

    def evaluate(self, micro_batches: list[MicroBatch], count: int) -> list[TokenOutputs]:
        """Run `count` micro-batches forward only; per-token outputs on the last stage, else [].

        DualPipeV takes at least twice as many as there are pipeline ranks: the last one is repeated
        and its outputs are left out.
        """
        self.step_loss.start(LossScales(0.0, 0.0), blocking_active=False)
        runs = max(count, 2 * self.layout.pipeline) if self.turns and count else count
        padded = micro_batches + micro_batches[-1:] * (runs - count)
        training = self.deepspeed.micro_batches
        # DualPipeV's engine finds a buffer's second half by the count of a training step.
        self.deepspeed.micro_batches = runs
        try:
            if count:
                self.deepspeed.eval_batch(
                    _pairs(padded), reduce_output=None, bcast_loss=False, num_micro_batches=runs
                )
        finally:
            self.deepspeed.micro_batches = training
        return self.step_loss.outputs[:count]

    def forward_rows(
        self, rows: Sequence[int], micro_rows: int, read: Callable[[Sequence[int]], MicroBatch]
    ) -> list[TokenOutputs]:
        """Evaluate chosen rows in micro-batches dealt over the data ranks; every rank calls it.

        `read` gives the micro-batch of some rows. The last micro-batches are filled up with rows
        that weigh nothing.
        """
        stride = micro_rows * self.layout.data
        count = -(-len(rows) // stride)
        mine = []
        for batch in range(count if self.reads_data else 0):
            begin = batch * stride + self.at.data * micro_rows
            chosen = rows[begin : begin + micro_rows]
            micro_batch = read([*chosen, *[rows[0]] * (micro_rows - len(chosen))])
            micro_batch.lm_weight_BT[len(chosen) :] = 0
            micro_batch.mode_weight_BT[len(chosen) :] = 0
            mine.append(micro_batch)
        return self.evaluate(mine, count)

    @contextmanager
    def other_row_length(self) -> Iterator[None]:
        """Let micro-batches of another shape be evaluated inside: stages agree on it anew."""
        self.deepspeed.reset_activation_shape()
        try:
            yield
        finally:
            self.deepspeed.reset_activation_shape()

    def sum_over_ranks(self, vector: Tensor) -> Tensor:
        """Add a float64 vector over data ranks and give it to every rank.

        Counted once a data rank: the last stage's first tensor part contributes, others add zeros.
        """
        counted = self.computes_loss and self.at.tensor == 0
        total = vector.to(self.device) if counted else torch.zeros_like(vector).to(self.device)
        dist.all_reduce(total)
        return total.cpu()

    def largest_over_ranks(self, number: int) -> int:
        """Return the largest of the numbers that the ranks hold, on every rank."""
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def _lets_through(self, gradient_square: Tensor) -> bool:
        """Judge the step by what all ranks saw of it."""
        numbers = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.computes_loss and self.at.tensor == 0:
            numbers[0] = self.step_loss.loss_sum
        numbers[1:] = self.gradient_square = gradient_square
        dist.all_reduce(numbers)
        loss_sum, square = numbers.tolist()
        loss = loss_sum / (self.accumulation_steps * self.layout.data)
        self._verdict = self.judge.decide(self._step, loss, square)
        return not self._verdict.is_left_out

    def _scales(self, micro_batches: list[MicroBatch]) -> LossScales:
        weights = torch.zeros(2, dtype=torch.float64)
        for batch in micro_batches:
            weights[0] += batch.lm_weight_BT.sum(dtype=torch.float64)
            weights[1] += batch.mode_weight_BT.sum(dtype=torch.float64)
        if self.computes_loss and self.layout.data > 1:
            weights = weights.to(self.device)
            dist.all_reduce(weights, group=self.deepspeed.grid.get_data_parallel_group())
        lm_weight_sum, mode_weight_sum = weights.tolist()
        renormalise = self.config.loss.blocking.renormalise
        return loss_scales(
            lm_weight_sum,
            mode_weight_sum,
            mode_weight=self.config.loss.mode_weight,
            gradient_accumulation_steps=self.accumulation_steps,
            data_parallel_size=self.layout.data,
            previous_shares=self.blocked_shares if renormalise else None,
        )

    def _sum_blocked(self) -> BlockedShares:
        """Return the shares of the LM and the mode weight of a step that blocking took."""
        sums = torch.zeros(4, dtype=torch.float64)
        for batch, loss in self.step_loss.outputs:
            for offset, weight_BT in ((0, batch.lm_weight_BT), (2, batch.mode_weight_BT)):
                sums[offset] += weight_BT.sum(dtype=torch.float64).cpu()
                sums[offset + 1] += (weight_BT * loss.blocked_BT).sum(dtype=torch.float64).cpu()
        lm_weight, lm_blocked, mode_weight, mode_blocked = self.sum_over_ranks(sums).tolist()
        lm, mode = blocked_losses(self.config.loss.blocking)
        return BlockedShares(
            lm=lm_blocked / lm_weight if lm_weight and lm else 0.0,
            mode=mode_blocked / mode_weight if mode_weight and mode else 0.0,
        )


def _pairs(micro_batches: list[MicroBatch]) -> Iterator[tuple[Any, Any]] | None:
    """Give DeepSpeed (inputs for the first stage, labels for the last) of each micro-batch.

    Labels are the batch and the indices b * T + t of the tokens with an LM weight: the host knows
    the masks, so a GPU computes no other token and does not wait to find them.
    """
    if not micro_batches:
        return None
    return (
        (
            (batch.input_BT, batch.position_BT),
            (*batch, batch.lm_weight_BT.reshape(-1).nonzero().squeeze(1)),
        )
        for batch in micro_batches
    )
