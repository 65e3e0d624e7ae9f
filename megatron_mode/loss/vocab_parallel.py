"""Join the vocabulary shards of a tensor-parallel group: the collectives of the fused loss.

A chunk of n tokens costs one all-gather of 3 * n numbers (12 bytes a token in fp32); the
gradient of the hidden states costs one all-reduce. Letters: n tokens of a chunk, S shards.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mode.kernels.mode_loss import VocabShard


def vocab_shard(
    group: dist.ProcessGroup | None, local_columns: int, vocab_size: int, device: torch.device
) -> VocabShard:
    """Place this rank's rows of the LM head; every rank of the group must call it.

    The shards follow each other in rank order and may differ in size; `vocab_size` counts the
    columns without padding. One rank or no group is the whole vocabulary.
    """
    if group is None or dist.get_world_size(group) == 1:
        return VocabShard(vocab_size=vocab_size)
    local = torch.tensor([local_columns], device=device)
    columns = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(columns, local, group=group)
    ends = list(itertools.accumulate(int(count) for count in columns))
    rank = dist.get_rank(group)

    def merge(partial_3n: Tensor) -> Tensor:
        gathered = [torch.empty_like(partial_3n) for _ in columns]
        dist.all_gather(gathered, partial_3n.contiguous(), group=group)
        return merge_statistics(gathered)

    def reduce(value: Tensor) -> None:
        dist.all_reduce(value, group=group)

    return VocabShard(
        start=ends[rank] - local_columns,
        vocab_size=vocab_size,
        ranks=len(columns),
        merge=merge,
        reduce=reduce,
    )


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
