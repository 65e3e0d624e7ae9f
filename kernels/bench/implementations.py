"""List what is compared: each peer with a separate mode head beside it, and ours.

Every function returns the sum of the LM losses plus the sum of the mode losses of all tokens. torch
and the peers are imported inside the functions: the list serves `--help`, and a peer that is not
installed fails alone. Peers run with their own defaults.

Letters: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_mode.kernels.bench.problem import Inputs

Loss = Callable[["Inputs"], "Tensor"]
Ours = Literal["chunked", "triton", "reference"]


@dataclass(frozen=True)
class Implementation:
    """Name one row of the table and say how its loss is computed."""

    name: str
    loss: Loss
    ours: bool = False
    mode_head: bool = True
    """The loss includes the mode term."""
    not_on_cpu: str = ""
    """Why it cannot run on a CPU; empty: it can."""


def _torch(inputs: Inputs) -> Tensor:
    from torch.nn.functional import cross_entropy, linear

    logit_NV = linear(inputs.hidden_ND, inputs.lm_weight_VD)
    return cross_entropy(logit_NV, inputs.target_N, reduction="sum") + _mode_sum(inputs)


def _torch_linear_cross_entropy(inputs: Inputs, *, chunked: bool) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    lm_sum = linear_cross_entropy(
        inputs.hidden_ND,
        inputs.lm_weight_VD,
        inputs.target_N,
        reduction="sum",
        options=LinearCrossEntropyOptions() if chunked else None,
    )
    return lm_sum + _mode_sum(inputs)


def _cut_cross_entropy(inputs: Inputs) -> Tensor:
    peer = import_module("cut_cross_entropy")
    lm_sum: Tensor = peer.linear_cross_entropy(
        inputs.hidden_ND,
        inputs.lm_weight_VD,
        inputs.target_N,
        reduction="sum",
        impl="cce" if inputs.hidden_ND.is_cuda else "torch_compile",
    )
    return lm_sum + _mode_sum(inputs)


def _liger(inputs: Inputs) -> Tensor:
    peer = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = peer.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    lm_sum: Tensor = loss(inputs.lm_weight_VD, inputs.hidden_ND, inputs.target_N)
    return lm_sum + _mode_sum(inputs)


def _mode_sum(inputs: Inputs) -> Tensor:
    """Return the mode loss as a model with a separate mode head computes it."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    logit_N = (inputs.hidden_ND @ inputs.mode_weight_D + inputs.mode_bias).float()
    return binary_cross_entropy_with_logits(logit_N, inputs.mode_label_N, reduction="sum")


def _ours(inputs: Inputs, *, implementation: Ours, mode_head: bool) -> Tensor:
    from megatron_mode.kernels.mode_loss import Targets, mode_loss

    losses = mode_loss(
        inputs.hidden_ND,
        inputs.lm_weight_VD,
        inputs.mode_weight_D if mode_head else None,
        inputs.mode_bias if mode_head else None,
        Targets(inputs.target_N, inputs.weight_N, inputs.mode_label_N, inputs.weight_N),
        implementation=implementation,
    )
    return losses.lm_sum + losses.mode_sum if mode_head else losses.lm_sum


def _rows_of_ours(implementation: Ours, not_on_cpu: str = "") -> tuple[Implementation, ...]:
    """Return the row with the mode head and the row without it."""
    return tuple(
        Implementation(
            f"megatron_mode {implementation}{'' if mode_head else ' without mode head'}",
            partial(_ours, implementation=implementation, mode_head=mode_head),
            True,
            mode_head,
            not_on_cpu,
        )
        for mode_head in (True, False)
    )


CHUNKED, CHUNKED_WITHOUT_HEAD = _rows_of_ours("chunked")
TORCH_CHUNKED = "torch linear_cross_entropy chunked"
IMPLEMENTATIONS = (
    Implementation("torch", _torch),
    Implementation(
        "torch linear_cross_entropy", partial(_torch_linear_cross_entropy, chunked=False)
    ),
    Implementation(TORCH_CHUNKED, partial(_torch_linear_cross_entropy, chunked=True)),
    Implementation("cut-cross-entropy", _cut_cross_entropy),
    Implementation("liger", _liger, not_on_cpu="its Triton kernels need a CUDA device"),
    CHUNKED,
    CHUNKED_WITHOUT_HEAD,
    *_rows_of_ours("triton", "a CPU runs Triton only in its interpreter, whose times say nothing"),
    *_rows_of_ours("reference"),
)
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
