"""Let a step's update through DeepSpeed or keep it out, on all ranks alike.

The gate is between the reduced gradients and the optimizer, and costs one pass over them.
DeepSpeed's own norm counts replicated parameters on one rank only: it would miss a broken copy on
another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def install_gate(deepspeed: Any, lets_through: Callable[[Tensor], bool]) -> None:
    """Ask `lets_through` before every update of a pipeline engine.

    It gets the local sum of squares of the gradient, fp64 with one element, and returns the same
    on every rank.
    """
    take_model_step = deepspeed._take_model_step

    def gated(lr_kwargs: Any) -> None:
        is_applied = lets_through(gradient_square(deepspeed))
        with nullcontext() if is_applied else updates_left_out(deepspeed.optimizer):
            take_model_step(lr_kwargs)

    deepspeed._take_model_step = gated
    deepspeed.clip_fp32_gradients = partial(_clip_and_note, deepspeed)


def _clip_and_note(deepspeed: Any) -> None:
    """Clip as DeepSpeed does without ZeRO, and keep the norm that it throws away."""
    deepspeed._global_grad_norm = clip_grad_norm_(
        parameters=deepspeed.module.parameters(),
        max_norm=deepspeed.gradient_clipping(),
        mpu=deepspeed.mpu,
    )


def gradient_square(deepspeed: Any) -> Tensor:
    """Return the sum of squares of the gradients that this rank holds, as fp64 with one element."""
    gradients = local_gradients(deepspeed)
    if not gradients:
        return torch.zeros(1, dtype=torch.float64, device=deepspeed.device)
    # The square leaves fp32 where the norm that clipping needs would: both are infinite then.
    square = torch.nn.utils.get_total_norm(gradients).float().square()
    return square.double().reshape(1)


def local_gradients(deepspeed: Any) -> list[Tensor]:
    """Return the gradients that the coming update reads on this rank."""
    optimizer = deepspeed.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        parts = optimizer.averaged_gradients.values()
        return [gradient for part in parts for gradient in part or () if gradient is not None]
    flat = getattr(optimizer, "fp32_groups_gradients_flat", None)  # BF16_Optimizer
    if flat is not None:
        return list(flat)
    return [p.grad for p in deepspeed.module.parameters() if p.grad is not None]


@contextmanager
def updates_left_out(optimizer: Any) -> Iterator[None]:
    """Make DeepSpeed's next step drop its gradients and touch nothing else.

    ZeRO-1 takes the way of an overflow, which frees what its step would have freed; of the others
    the engine clears the gradients itself.
    """
    changes: dict[str, Any] = {"step": lambda: None}
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        changes = {
            "check_grad_overflow": True,
            "has_overflow": lambda partition_gradients: True,
            "_update_scale": lambda overflow: None,  # says that gradients are not finite
        }
    before = {name: vars(optimizer)[name] for name in changes if name in vars(optimizer)}
    vars(optimizer).update(changes)
    try:
        yield
    finally:
        for name in changes:
            del vars(optimizer)[name]
        vars(optimizer).update(before)
