"""Join the vocabulary shards of a tensor-parallel group: the collectives of the fused loss.

The statistics of N tokens cost 12 bytes a token and rank: one all-gather in `triton` and in half
precision, one for each piece of tokens where `chunked` walks the tokens. The gradient of the hidden
states costs one all-reduce, or one reduce-scatter under sequence parallelism, and the mode term is
added afterwards. Letters: N tokens, n tokens of a piece, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mode.kernels.mode_loss import VocabShard


def vocab_shard(
    group: dist.ProcessGroup | None,
    local_columns: int,
    vocab_size: int,
    device: torch.device,
    *,
    sequence_parallel: bool = False,
    reduce_dtype: torch.dtype | None = None,
) -> VocabShard:
    """Place this rank's rows of the LM head; every rank of the group must call it.

    The shards follow each other in rank order and may differ in size; `vocab_size` counts the
    columns without padding. One rank or no group holds the complete vocabulary. With
    `sequence_parallel` the hidden states are this rank's equal part of the tokens: they are
    gathered, and their gradient is reduced and scattered. `reduce_dtype` is that of the sum over
    the ranks; None: fp32.
    """
    if group is None or dist.get_world_size(group) == 1:
        return VocabShard(vocab_size=vocab_size)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    collectives = _Collectives(group, rank, ranks, reduce_dtype)
    columns = collectives.all_gather(torch.tensor([local_columns], device=device))
    return VocabShard(
        start=int(columns[:rank].sum()),
        vocab_size=vocab_size,
        ranks=ranks,
        merge=collectives.merge,
        reduce=collectives.reduce_scatter if sequence_parallel else collectives.all_reduce,
        gather=collectives.all_gather if sequence_parallel else None,
        own_share=rank if sequence_parallel else None,
    )


@dataclass(frozen=True)
class _Collectives:
    """Hold the group and do what the op asks of it."""

    group: dist.ProcessGroup
    rank: int
    ranks: int
    reduce_dtype: torch.dtype | None

    def merge(self, partial_3n: Tensor) -> Tensor:
        return merge_statistics(self._gather(partial_3n))

    def all_reduce(self, value_ND: Tensor) -> Tensor:
        summed_ND = value_ND.to(self.reduce_dtype or value_ND.dtype, copy=True)
        dist.all_reduce(summed_ND, group=self.group)
        return summed_ND.to(value_ND.dtype)

    def reduce_scatter(self, value_ND: Tensor) -> Tensor:
        value_dtype = self.reduce_dtype or value_ND.dtype
        parts = value_ND.to(value_dtype).contiguous().chunk(self.ranks)
        own_ND = torch.empty_like(parts[self.rank])
        dist.reduce_scatter(own_ND, list(parts), group=self.group)
        return own_ND.to(value_ND.dtype)

    def all_gather(self, own_ND: Tensor) -> Tensor:
        return torch.cat(self._gather(own_ND))

    def _gather(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return parts


def merge_statistics(shards_3n: list[Tensor]) -> Tensor:
    """Merge (maximum, sum of exponentials, target logit) [3, n] of the shards, in their order.

    A shard without a real column reports (-inf, 0, 0); a shard that does not hold the target
    reports the target logit 0.
    """
    maximum_n = torch.stack([shard[0] for shard in shards_3n]).amax(0)
    sum_n = torch.zeros_like(maximum_n)
    target_logit_n = torch.zeros_like(maximum_n)
    for shard_maximum_n, shard_sum_n, shard_target_logit_n in shards_3n:
        sum_n += shard_sum_n * (shard_maximum_n - maximum_n).exp()
        target_logit_n += shard_target_logit_n
    return torch.stack([maximum_n, sum_n, target_logit_n])
