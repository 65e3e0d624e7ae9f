"""Cut the residual stream along T over the tensor ranks (Korthikanti et al., 2022, section 4.2.2).

    embedding -> [T/p] norm -> gather -> column-parallel ... row-parallel -> reduce-scatter -> [T/p]

Between two tensor-parallel blocks a rank then holds T/p tokens instead of all: norms and residuals
cost 1/p of the memory, and the two halves of an all-reduce take its place. megatron-core's layers
ask for a CUDA device on this path; these do the same on the device of their input. Only the cut
activations are saved; the backward pass gathers them again while it computes the input's gradient.

A norm sees T/p tokens, so its weight's gradient is a part of the sum: such weights carry
megatron-core's mark `sequence_parallel`, and `engine.pipeline` has them summed over the ranks.

T row length, B rows, D hidden size, F output features of this rank, p tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor
from torch.nn import functional


class GatheringLinear(ColumnParallelLinear):
    """Multiply the tokens of all ranks by this rank's rows of the weight; has no bias."""

    def forward(self, input_TBD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Turn [T/p, B, D] into ([T, B, F], no bias)."""
        return gather_linear(input_TBD, self.weight, self.tp_group), None


class ScatteringLinear(RowParallelLinear):
    """Multiply by this rank's columns of the weight, add over the ranks, keep own tokens."""

    def forward(self, input_TBF: Tensor) -> tuple[Tensor, None]:
        """Turn [T, B, F] into ([T/p, B, D], no bias)."""
        return reduce_scatter(functional.linear(input_TBF, self.weight), self.tp_group), None


class ScatteringEmbedding(VocabParallelEmbedding):
    """Look up this rank's part of the vocabulary, add over the ranks, keep own tokens."""

    def forward(self, input_BT: Tensor) -> Tensor:
        """Turn ids [B, T] into embeddings [T/p, B, D]."""
        begin, end = self.vocab_start_index, self.vocab_end_index
        foreign_TB = ((input_BT < begin) | (input_BT >= end)).t()
        local_TB = (input_BT.t() - begin).masked_fill(foreign_TB, 0)
        found_TBD = functional.embedding(local_TB, self.weight)
        return reduce_scatter(found_TBD.masked_fill(foreign_TB.unsqueeze(-1), 0), self.tp_group)


class ReduceScatter(torch.autograd.Function):
    """Add over the ranks and keep own tokens; backward, gather."""

    @staticmethod
    def forward(ctx: Any, partial_TBD: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Turn [T, B, D] into [T/p, B, D]."""
        ctx.group = group
        own_TBD, scattered = _start_reduce_scatter(partial_TBD, group)
        scattered.wait()
        return own_TBD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Turn [T/p, B, D] into [T, B, D]."""
        grad_TBD, gathered = _start_gather(grads[0], ctx.group)
        gathered.wait()
        return grad_TBD, None


reduce_scatter = cast(Callable[..., Tensor], ReduceScatter.apply)


class GatherLinear(torch.autograd.Function):
    """Gather tokens and multiply; communication overlaps with the products of the backward pass."""

    @staticmethod
    def forward(ctx: Any, own_TBD: Tensor, weight_FD: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Turn [T/p, B, D] and [F, D] into [T, B, F]."""
        ctx.save_for_backward(own_TBD, weight_FD)
        ctx.group = group
        all_TBD, gathered = _start_gather(own_TBD, group)
        gathered.wait()
        return functional.linear(all_TBD, weight_FD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of own tokens and of the weight."""
        own_TBD, weight_FD = ctx.saved_tensors
        all_TBD, gathered = _start_gather(own_TBD, ctx.group)
        partial_TBD = grads[0] @ weight_FD
        gathered.wait()
        grad_own_TBD, scattered = _start_reduce_scatter(partial_TBD, ctx.group)
        grad_weight_FD = grads[0].flatten(0, 1).t() @ all_TBD.flatten(0, 1)
        scattered.wait()
        return grad_own_TBD, grad_weight_FD, None


gather_linear = cast(Callable[..., Tensor], GatherLinear.apply)


def _start_gather(own_TBD: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    all_TBD = own_TBD.new_empty(own_TBD.shape[0] * dist.get_world_size(group), *own_TBD.shape[1:])
    work = dist.all_gather_single(all_TBD, own_TBD.contiguous(), group=group, async_op=True)
    return all_TBD, work


def _start_reduce_scatter(
    partial_TBD: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    ranks = dist.get_world_size(group)
    own_TBD = partial_TBD.new_empty(partial_TBD.shape[0] // ranks, *partial_TBD.shape[1:])
    work = dist.reduce_scatter_single(own_TBD, partial_TBD.contiguous(), group=group, async_op=True)
    return own_TBD, work
