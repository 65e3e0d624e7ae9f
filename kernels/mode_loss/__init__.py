"""Compute LM and mode loss in one operation that never keeps the N x V logits."""

from megatron_mode.kernels.mode_loss.arguments import (
    Blocking,
    TargetRangeError,
    Targets,
    VocabShard,
)
from megatron_mode.kernels.mode_loss.op import Implementation, LossOutput, mode_loss

__all__ = [
    "Blocking",
    "Implementation",
    "LossOutput",
    "TargetRangeError",
    "Targets",
    "VocabShard",
    "mode_loss",
]
