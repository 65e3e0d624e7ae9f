"""Join the forward and backward passes in one autograd function.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mode.kernels.mode_loss.arguments import TokenTargets
from megatron_mode.kernels.mode_loss.chunked import chunked_backward
from megatron_mode.kernels.mode_loss.library import forward as forward_pass
from megatron_mode.kernels.mode_loss.library_backward import backward as triton_pass
from megatron_mode.kernels.mode_loss.plan import ModeHead, Plan
from megatron_mode.kernels.mode_loss.results import Kept, Saved, TokenLosses, Upstream


def fused_loss(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    head: ModeHead | None,
    targets: TokenTargets,
    plan: Plan,
    main_gradient_VD: Tensor | None,
) -> TokenLosses:
    """Return both sums, differentiable, and the losses of each token.

    Under sequence parallelism `hidden_ND` holds this rank's tokens, and so does its gradient.
    """
    mode_weight_D, mode_bias = (None, None) if head is None else head
    apply = cast(Callable[..., tuple[Tensor, ...]], _FusedLoss.apply)
    return TokenLosses(
        *apply(
            hidden_ND,
            lm_weight_VD,
            mode_weight_D,
            mode_bias,
            targets.target_N,
            targets.lm_weight_N,
            targets.mode_label_N,
            targets.mode_weight_N,
            targets.lm_rows_n,
            main_gradient_VD,
            plan,
        )
    )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        lm_weight_VD: Tensor,
        mode_weight_D: Tensor | None,
        mode_bias: Tensor | None,
        target_N: Tensor,
        lm_weight_N: Tensor,
        mode_label_N: Tensor,
        mode_weight_N: Tensor,
        lm_rows_n: Tensor | None,
        main_gradient_VD: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        head = None
        if mode_weight_D is not None and mode_bias is not None:
            head = ModeHead(mode_weight_D, mode_bias)
        targets = TokenTargets(target_N, lm_weight_N, mode_label_N, mode_weight_N, lm_rows_n)
        gather = plan.shard.gather
        whole_ND = hidden_ND if gather is None else gather(hidden_ND)
        losses, kept = forward_pass(whole_ND, lm_weight_VD, head, targets, plan)
        ctx.plan, ctx.main_gradient_VD = plan, main_gradient_VD
        inputs: tuple[Tensor | None, ...] = (None,) * 5
        if plan.implementation == "triton":
            inputs = (hidden_ND, lm_weight_VD, target_N, mode_weight_N, lm_rows_n)
        ctx.save_for_backward(*inputs, mode_weight_D, *kept)
        ctx.like = [
            None if value is None else (value.dtype, value.shape)
            for value in (hidden_ND, lm_weight_VD, mode_weight_D, mode_bias)
        ]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*losses[2:])
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first four arguments; saved inputs stay as they are."""
        up = Upstream(*gradients[:2])
        inputs, kept = ctx.saved_tensors[:6], Kept(*ctx.saved_tensors[6:])
        if ctx.plan.implementation == "triton":
            found = triton_pass(Saved(*inputs), kept, up, ctx.plan, ctx.main_gradient_VD)
        else:
            found = chunked_backward(
                kept,
                inputs[-1],
                up,
                ctx.plan,
                in_place=_graph_is_freed(),
                main_gradient_VD=ctx.main_gradient_VD,
            )
        typed = [
            None if value is None or like is None else value.to(like[0]).view(like[1])
            for value, like in zip(found, ctx.like, strict=True)
        ]
        return (*typed, *(None,) * 7)


def _graph_is_freed() -> bool:
    """Tell whether this backward pass is the last: what was kept may then be spoilt."""
    if torch.compiler.is_compiling():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()
