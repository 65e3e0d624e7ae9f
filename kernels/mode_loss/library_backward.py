"""Register Triton's backward pass with torch.library, in two variants.

`mode_loss_backward` returns all gradients. `mode_loss_backward_into` adds the gradient of the LM
weight to a main gradient in fp32 and declares that it mutates it.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_mode.kernels.mode_loss.library import pack, unpack
from megatron_mode.kernels.mode_loss.plan import Plan, launch_device
from megatron_mode.kernels.mode_loss.results import Gradients, Kept, Saved, Upstream


def backward(
    saved: Saved, kept: Kept, up: Upstream, plan: Plan, main_gradient_VD: Tensor | None
) -> Gradients:
    """Run the backward pass, as a registered operator where a compiler or fake tensors look on."""
    plain = type(kept.dlogit_N) in (Tensor, Parameter) and kept.dlogit_N.device.type != "meta"
    if not plan.shard.whole or (plain and not torch.compiler.is_compiling()):
        return _run(saved, kept, up, plan, main_gradient_VD)
    arguments = (*saved, list(kept), *up, *pack(plan))
    if main_gradient_VD is None:
        found = torch.ops.megatron_mode.mode_loss_backward(*arguments)
    else:
        found = torch.ops.megatron_mode.mode_loss_backward_into(main_gradient_VD, *arguments)
    wanted = wanted_gradients(saved, up, plan, main_gradient_VD is not None)
    return Gradients(*(value if want else None for value, want in zip(found, wanted, strict=True)))


def wanted_gradients(saved: Saved, up: Upstream, plan: Plan, into_main: bool) -> list[bool]:
    """Tell which gradients the backward pass returns."""
    mode = up.mode is not None and saved.mode_weight_D is not None
    return [
        plan.wants.hidden and (up.lm is not None or up.mode is not None),
        plan.wants.lm_weight and up.lm is not None and not into_main,
        plan.wants.mode_weight and mode,
        plan.wants.mode_bias and mode,
    ]


def _run(
    saved: Saved, kept: Kept, up: Upstream, plan: Plan, main_gradient_VD: Tensor | None
) -> Gradients:
    from megatron_mode.kernels.mode_loss.triton_backward import triton_backward

    with launch_device(saved.hidden_ND):
        return triton_backward(saved, kept, up, plan, main_gradient_VD)


def _filled(found: Gradients, like: Tensor) -> list[Tensor]:
    """Return a tensor for every gradient: an operator cannot return None."""
    return [like.new_empty(0) if value is None else value for value in found]


@torch.library.custom_op("megatron_mode::mode_loss_backward", mutates_args=())
def mode_loss_backward(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    target_N: Tensor,
    mode_weight_N: Tensor,
    lm_rows_n: Tensor | None,
    mode_weight_D: Tensor | None,
    kept: list[Tensor],
    lm_up: Tensor | None,
    mode_up: Tensor | None,
    implementation: str,
    integers: list[int],
    floats: list[float],
) -> list[Tensor]:
    """Return the fields of Gradients; those that are not wanted are empty."""
    saved = Saved(hidden_ND, lm_weight_VD, target_N, mode_weight_N, lm_rows_n, mode_weight_D)
    plan = unpack(implementation, integers, floats)
    return _filled(_run(saved, Kept(*kept), Upstream(lm_up, mode_up), plan, None), kept[0])


@torch.library.custom_op(
    "megatron_mode::mode_loss_backward_into", mutates_args=("main_gradient_VD",)
)
def mode_loss_backward_into(
    main_gradient_VD: Tensor,
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    target_N: Tensor,
    mode_weight_N: Tensor,
    lm_rows_n: Tensor | None,
    mode_weight_D: Tensor | None,
    kept: list[Tensor],
    lm_up: Tensor | None,
    mode_up: Tensor | None,
    implementation: str,
    integers: list[int],
    floats: list[float],
) -> list[Tensor]:
    """Add the gradient of the LM weight to the main gradient; return the other gradients."""
    saved = Saved(hidden_ND, lm_weight_VD, target_N, mode_weight_N, lm_rows_n, mode_weight_D)
    plan, up = unpack(implementation, integers, floats), Upstream(lm_up, mode_up)
    return _filled(_run(saved, Kept(*kept), up, plan, main_gradient_VD), kept[0])


def _fake(saved: Saved, like: Tensor, up: Upstream, plan: Plan, into_main: bool) -> list[Tensor]:
    wanted = wanted_gradients(saved, up, plan, into_main)
    values = (
        saved.hidden_ND.new_empty(saved.hidden_ND.shape),
        saved.lm_weight_VD.new_empty(saved.lm_weight_VD.shape),
        like.new_empty(saved.hidden_ND.shape[1]),
        like.new_empty(()),
    )
    return [
        value if want else like.new_empty(0) for value, want in zip(values, wanted, strict=True)
    ]


@mode_loss_backward.register_fake
def _(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    target_N: Tensor,
    mode_weight_N: Tensor,
    lm_rows_n: Tensor | None,
    mode_weight_D: Tensor | None,
    kept: list[Tensor],
    lm_up: Tensor | None,
    mode_up: Tensor | None,
    implementation: str,
    integers: list[int],
    floats: list[float],
) -> list[Tensor]:
    saved = Saved(hidden_ND, lm_weight_VD, target_N, mode_weight_N, lm_rows_n, mode_weight_D)
    plan = unpack(implementation, integers, floats)
    return _fake(saved, kept[0], Upstream(lm_up, mode_up), plan, into_main=False)


@mode_loss_backward_into.register_fake
def _(
    main_gradient_VD: Tensor,
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    target_N: Tensor,
    mode_weight_N: Tensor,
    lm_rows_n: Tensor | None,
    mode_weight_D: Tensor | None,
    kept: list[Tensor],
    lm_up: Tensor | None,
    mode_up: Tensor | None,
    implementation: str,
    integers: list[int],
    floats: list[float],
) -> list[Tensor]:
    saved = Saved(hidden_ND, lm_weight_VD, target_N, mode_weight_N, lm_rows_n, mode_weight_D)
    plan = unpack(implementation, integers, floats)
    return _fake(saved, kept[0], Upstream(lm_up, mode_up), plan, into_main=True)
