"""Derive the DeepSpeed configuration from ours; users do not write one."""

from __future__ import annotations

from typing import Any

from megatron_mode.config import Config
from megatron_mode.cost.topology import accumulation_steps


def deepspeed_config(config: Config, data: int, *, bf16: bool) -> dict[str, Any]:
    """Return DeepSpeed's dict for `data` data-parallel ranks.

    bf16 needs `grad_accum_dtype: fp32`: it selects BF16_Optimizer, which keeps fp32 master weights
    and gradients; without it DeepSpeed accumulates gradients in bf16. `immediate_grad_update` adds
    each gradient up as it arrives. Without it DeepSpeed clears bf16 gradients when that of the last
    stage's hidden states arrives, and with them those of both heads, which the loss has just made.
    `communication_data_type` keeps it from rounding the sums to bf16 before data ranks add them up.
    `use_reentrant: False` lets the first stage recompute from integer inputs. DeepSpeed cuts what
    stages exchange into a part for each tensor rank, as if all had the same; under sequence
    parallelism each has its own, and DualPipeV sends complete tensors.
    """
    parallel = config.parallel
    cut = parallel.schedule == "1f1b" and not parallel.sequence_parallel
    derived: dict[str, Any] = {
        "train_batch_size": config.batch.global_rows,
        "train_micro_batch_size_per_gpu": config.batch.micro_rows,
        "gradient_accumulation_steps": accumulation_steps(config, data),
        "steps_per_print": 1_000_000_000,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_optimization": {"stage": parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "pipeline": {
            "activation_checkpoint_interval": int(parallel.activation_checkpointing == "full"),
            "use_reentrant": False,
            "pipe_partitioned": cut,
            "grad_partitioned": cut,
        },
    }
    if bf16:
        derived["bf16"] = {"enabled": True, "immediate_grad_update": True}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        derived["communication_data_type"] = "fp32"
    return derived
