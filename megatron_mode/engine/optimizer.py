"""Set AdamW up: weight-decay groups and the learning rate of every step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any, assert_never

import torch
from torch import nn

from megatron_mode.config.fields import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of the update made by step `step` (0-based) of `steps`.

    Linear warm-up reaches the peak at step `warmup_steps`; then constant, cosine (SGDR, eq. 5),
    linear, or wsd (MiniCPM, section 4.2: stable, then a linear decay over `decay_steps`).
    """
    peak, low = config.learning_rate, min(config.min_learning_rate, config.learning_rate)
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    match config.schedule:
        case "constant":
            return peak
        case "linear":
            share = 1 - _progress(step, config.warmup_steps, steps)
        case "wsd":
            begin = max(config.warmup_steps, steps - config.decay_steps)
            if step < begin:
                return peak
            share = 1 - _progress(step, begin, steps)
        case "cosine":
            progress = _progress(step, config.warmup_steps, steps)
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            assert_never(config.schedule)
    return low + (peak - low) * share


def _progress(step: int, begin: int, steps: int) -> float:
    """Return the part of the steps after `begin` that is done, 1 at most."""
    return min(1.0, (step - begin) / max(1, steps - begin))


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether weight decay applies: to matrices and the mode head's weight only."""
    return parameter.dim() > 1 or name.endswith("mode_weight")


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Split parameters into those with and those without weight decay; no group is empty."""
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        split[decays(name, parameter)].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0}
        for decayed, parameters in split.items()
        if parameters
    ]


def adamw(
    config: OptimizerConfig,
    named: Iterable[tuple[str, nn.Parameter]],
    implementation: str = "torch",
) -> torch.optim.Optimizer:
    """Return torch's or apex's fused AdamW; the learning rate is set before each step."""
    groups = parameter_groups(named, config.weight_decay)
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    if implementation == "apex":
        apex: Any = importlib.import_module("apex.optimizers")
        fused: torch.optim.Optimizer = apex.FusedAdam(
            groups, lr=rate, betas=betas, eps=config.epsilon, adam_w_mode=True
        )
        return fused
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.epsilon, fused=True)
