"""Open the public door to the LM + mode loss: a module without parameters.

Letters: B rows, T row length, D hidden size, V vocabulary columns of this rank.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mode.config.fields import LossConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.kernels.mode_loss import (
    Implementation,
    LossOutput,
    TargetRangeError,
    Targets,
    VocabShard,
    mode_loss,
    why_no_triton,
)
from megatron_mode.loss.blocking import blocking_of
from megatron_mode.loss.vocab_parallel import vocab_shard

REDUCE_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def choose_implementation(
    name: Implementation | Literal["auto"], device_type: str
) -> Implementation:
    """Return the implementation for `loss.implementation` on a device: the one place of choice.

    `auto` is `triton` on a GPU where it is installed, else `chunked`. On a CPU `triton` runs in its
    interpreter, for tests. Raises ConfigError where `triton` cannot run.
    """
    if name == "auto":
        # `and`: a CPU does not import Triton to learn that it has no compiler.
        has_triton = device_type == "cuda" and why_no_triton(device_type) is None
        return "triton" if has_triton else "chunked"
    reason = why_no_triton(device_type) if name == "triton" else None
    if reason is not None:
        raise ConfigError(
            f"loss.implementation is 'triton', which {reason}: set loss.implementation=auto."
        )
    return name


class ModeLoss(nn.Module):
    """Compute the LM sum and the mode sum of a micro-batch in one fused operation.

    Under tensor parallelism the hidden states are replicated and enter as they are, not through
    megatron's copy_to_tensor_model_parallel_region: the op itself sums the LM term's gradient of
    the hidden states over the group and adds the mode term afterwards, once. All outputs and the
    gradients of hidden states and mode head are the same on every rank: reduce none of them.
    """

    def __init__(
        self,
        config: LossConfig,
        vocab_size: int,
        tensor_group: dist.ProcessGroup | None = None,
        *,
        device_type: str = "cpu",
        sequence_parallel: bool = False,
    ) -> None:
        """Keep the choices; `vocab_size` counts the tokens without padding.

        With `sequence_parallel` the hidden states are [T / ranks, B, D], this rank's part.

        Raises ConfigError for an implementation that is not available.
        """
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.implementation = choose_implementation(config.implementation, device_type)
        self._tensor_group = tensor_group
        self._sequence_parallel = sequence_parallel
        self._shards: dict[int, VocabShard] = {}

    def forward(
        self,
        hidden_TBD: Tensor,
        local_lm_weight_VD: Tensor,
        mode_weight_D: Tensor,
        mode_bias: Tensor,
        targets: Targets,
        *,
        blocking_active: bool = True,
    ) -> LossOutput:
        """Return both sums and the losses of each token.

        `blocking_active` is False while fewer than `loss.blocking.warmup_tokens` were seen.
        Raises DataError for a target outside the vocabulary whose LM weight is not 0 (on a CPU).
        """
        try:
            return mode_loss(
                hidden_TBD,
                local_lm_weight_VD,
                mode_weight_D,
                mode_bias,
                targets,
                shard=self._shard(len(local_lm_weight_VD), hidden_TBD.device),
                z_weight=self.config.z_weight,
                blocking=blocking_of(self.config.blocking, active=blocking_active),
                implementation=self.implementation,
                keep_logits_bytes=self.config.keep_logits_bytes,
                check_targets=self.config.check_targets,
            )
        except TargetRangeError as error:
            raise DataError(str(error)) from error

    def _shard(self, local_columns: int, device: torch.device) -> VocabShard:
        if local_columns not in self._shards:
            self._shards[local_columns] = vocab_shard(
                self._tensor_group,
                local_columns,
                self.vocab_size,
                device,
                sequence_parallel=self._sequence_parallel,
                reduce_dtype=REDUCE_DTYPES[self.config.reduce_dtype],
            )
        return self._shards[local_columns]
