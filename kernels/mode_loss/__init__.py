"""Compute LM and mode loss in one operation that never keeps the N x V logits."""

from megatron_mode.kernels.mode_loss.arguments import (
    Blocking,
    TargetRangeError,
    Targets,
    VocabShard,
)
from megatron_mode.kernels.mode_loss.op import LossOutput, mode_loss
from megatron_mode.kernels.mode_loss.plan import Implementation

__all__ = [
    "Blocking",
    "Implementation",
    "LossOutput",
    "TargetRangeError",
    "Targets",
    "VocabShard",
    "mode_loss",
]
