"""State what `triton`, `chunked` and `reference` take beside tensors, and what they return.

Letters: N tokens, D hidden size, V columns of this shard.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import Blocking, VocabShard
from megatron_mode.kernels.mode_loss.tokens import TokenGrid

Implementation = Literal["triton", "chunked", "reference"]


class Wants(NamedTuple):
    """Say which inputs need a gradient."""

    hidden: bool
    lm_weight: bool
    mode_weight: bool
    mode_bias: bool


@dataclass(frozen=True)
class Choices:
    """Hold the choices of one call."""

    grid: TokenGrid
    shard: VocabShard
    wants: Wants
    z_weight: float
    blocking: Blocking | None
    keep_logits_bytes: int
    """Largest logits that `triton` keeps for the backward pass instead of computing them again."""


class ModeHead(NamedTuple):
    """Hold the mode head: weight [D] and bias of one element."""

    weight_D: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight_D: Tensor | None, bias: Tensor | None) -> ModeHead | None:
        """Return the head, or None for a model without one."""
        return None if weight_D is None or bias is None else cls(weight_D, bias)


class TokenLosses(NamedTuple):
    """Hold both sums (differentiable) and the losses of each token (detached)."""

    lm_sum: Tensor
    """sum a_i * (nll_i + z_weight * lse_i^2)."""
    mode_sum: Tensor
    """sum c_i * bce_i."""
    z_loss_sum: Tensor
    """sum a_i * z_weight * lse_i^2, the part of lm_sum that is the z-loss; detached."""
    nll_N: Tensor
    bce_N: Tensor
    mode_logit_N: Tensor
    blocked_N: Tensor
    """Tokens that the blocking policy chose, bool."""


class Upstream(NamedTuple):
    """Hold the gradients of both sums, scalars; None where a sum was not used."""

    lm: Tensor | None
    mode: Tensor | None


class Gradients(NamedTuple):
    """Hold the gradients of the inputs, before casts to their dtypes; None where not wanted."""

    hidden_ND: Tensor | None
    lm_weight_VD: Tensor | None
    mode_weight_D: Tensor | None
    mode_bias: Tensor | None


def end_forward(
    ctx: Any, choices: Choices, losses: TokenLosses, inputs: tuple[Tensor | None, ...]
) -> TokenLosses:
    """Leave in `ctx` what `end_backward` needs; only the sums are differentiable."""
    ctx.choices = choices
    ctx.like = [None if value is None else (value.dtype, value.shape) for value in inputs]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*losses[2:])
    return losses


def end_backward(ctx: Any, found: Gradients) -> tuple[Tensor | None, ...]:
    """Return the gradients in dtype and shape of the inputs; targets and choices have none."""
    typed = [
        None if value is None or like is None else value.to(like[0]).view(like[1])
        for value, like in zip(found, ctx.like, strict=True)
    ]
    return (*typed, None, None)


def accumulation_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums: fp64 for fp64 hidden states, else fp32."""
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def why_no_triton(device_type: str) -> str | None:
    """Return why the Triton kernels cannot run on a device, or None where they can.

    On a CPU they run in Triton's interpreter, which is chosen before Triton is imported.
    """
    if importlib.util.find_spec("triton") is None:
        return "is not installed (pip install triton)"
    if device_type == "cuda":
        return None
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    return f"has no compiler for {device_type} (its interpreter runs under TRITON_INTERPRET=1)"
