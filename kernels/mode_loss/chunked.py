"""Compute the LM + mode loss with gradients taken in the forward pass, chunk by chunk.

The forward pass keeps the gradients of both sums for upstream 1 (dH [n, D], dW [V, D], dz [N] and
two small ones); the backward pass only scales them, so it computes nothing twice and may run
again with `retain_graph`. The mode term's part of dH is the outer product of dz and the mode
weight: it is formed in the backward pass, after dH of the LM term was summed over the shards.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_mode.kernels.mode_loss.arguments import TokenTargets, VocabShard
from megatron_mode.kernels.mode_loss.lm_pass import lm_pass
from megatron_mode.kernels.mode_loss.results import TokenLosses, accumulation_dtype

# Half-precision rows are widened, and rows without a mode weight cleared, this many at a time:
# 2 MiB at D = 512.
MODE_ROWS = 1024


@dataclass(frozen=True)
class Fixed:
    """Hold what gets no gradient."""

    targets: TokenTargets
    shard: VocabShard
    z_weight: float
    logits_bytes: int | None
    grad_enabled: bool
    """Grad mode of the caller: it is always off inside `forward`, and needs_input_grad ignores
    it."""


def chunked_loss(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor,
    mode_bias: Tensor,
    targets: TokenTargets,
    *,
    shard: VocabShard,
    z_weight: float,
    logits_bytes: int | None = None,
) -> TokenLosses:
    """Return both sums and the losses of each token.

    `logits_bytes` is the budget of the logits buffer; None: by device.
    """
    fixed = Fixed(targets, shard, z_weight, logits_bytes, torch.is_grad_enabled())
    apply = cast(Callable[..., tuple[Tensor, ...]], _ChunkedLoss.apply)
    return TokenLosses(*apply(hidden_ND, lm_weight_VD, mode_weight_D, mode_bias, fixed))


def chunked_mode_logit(hidden_ND: Tensor, mode_weight_D: Tensor, mode_bias: Tensor) -> Tensor:
    """Return the mode logit z of each token, detached, in fp32 (fp64 for fp64 hidden states)."""
    dtype = accumulation_dtype(hidden_ND)
    weight_D = mode_weight_D.detach().to(dtype)
    logit_N = mode_bias.detach().to(dtype).reshape(()).repeat(len(hidden_ND))
    for begin in range(0, len(hidden_ND), MODE_ROWS):
        rows = slice(begin, begin + MODE_ROWS)
        logit_N[rows] += hidden_ND.detach()[rows].to(dtype) @ weight_D
    return logit_N


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        lm_weight_VD: Tensor,
        mode_weight_D: Tensor,
        mode_bias: Tensor,
        fixed: Fixed,
    ) -> tuple[Tensor, ...]:
        needs = [fixed.grad_enabled and needed for needed in ctx.needs_input_grad[:4]]
        targets, weight_N = fixed.targets, fixed.targets.lm_weight_N
        rows_n = _active_rows(weight_N)
        lm = lm_pass(
            hidden_ND,
            lm_weight_VD,
            targets.target_N,
            weight_N,
            rows_n=rows_n,
            shard=fixed.shard,
            z_weight=fixed.z_weight,
            wants_hidden=needs[0],
            wants_weight=needs[1],
            logits_bytes=fixed.logits_bytes,
        )
        weight_n = weight_N if rows_n is None else weight_N[rows_n]
        z_loss_sum = (fixed.z_weight * weight_n * lm.lse_n.square()).sum()
        lm_sum = (weight_n * lm.nll_n).sum() + z_loss_sum
        nll_N = lm.nll_n if rows_n is None else _spread(lm.nll_n, rows_n, len(weight_N))

        mode_logit_N = chunked_mode_logit(hidden_ND, mode_weight_D, mode_bias)
        mode_sum, bce_N, dlogit_N = _mode_statistics(mode_logit_N, targets)
        mode_grad_D = (
            _weighted_row_sum(hidden_ND, dlogit_N, targets.mode_weight_N) if needs[2] else None
        )
        ctx.save_for_backward(
            lm.hidden_grad_nD,
            lm.weight_grad_VD,
            rows_n,
            dlogit_N,
            mode_weight_D,
            mode_grad_D,
        )
        ctx.dtypes = [value.dtype for value in (hidden_ND, lm_weight_VD, mode_weight_D, mode_bias)]
        ctx.bias_shape = mode_bias.shape
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(z_loss_sum, nll_N, bce_N, mode_logit_N)
        return lm_sum, mode_sum, z_loss_sum, nll_N, bce_N, mode_logit_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass kept; saved tensors stay as they are."""
        lm_up, mode_up = gradients[:2]
        hidden_grad_nD, weight_grad_VD, rows_n, dlogit_N, mode_weight_D, mode_grad_D = (
            ctx.saved_tensors
        )
        needs_hidden, needs_weight, needs_mode_weight, needs_bias = ctx.needs_input_grad[:4]
        results: list[Tensor | None] = [None] * 4
        if needs_hidden and lm_up is not None:
            grad_nD = hidden_grad_nD * lm_up
            results[0] = grad_nD if rows_n is None else _spread(grad_nD, rows_n, len(dlogit_N))
        if needs_weight and lm_up is not None:
            results[1] = weight_grad_VD * lm_up
        if mode_up is not None:
            scaled_N = dlogit_N * mode_up
            if needs_hidden:
                results[0] = _add_outer(results[0], scaled_N, mode_weight_D.to(scaled_N.dtype))
            if needs_mode_weight:
                results[2] = mode_grad_D * mode_up
            if needs_bias:
                results[3] = scaled_N.sum().reshape(ctx.bias_shape)
        typed = [
            result if result is None else result.to(dtype)
            for result, dtype in zip(results, ctx.dtypes, strict=True)
        ]
        return (*typed, None)


def _add_outer(sum_ND: Tensor | None, left_N: Tensor, right_D: Tensor) -> Tensor:
    """Add the outer product to a sum that the backward pass owns."""
    return torch.outer(left_N, right_D) if sum_ND is None else sum_ND.addr_(left_N, right_D)


def _active_rows(weight_N: Tensor) -> Tensor | None:
    """Return the indices of the tokens with a weight; None where that is all of them."""
    rows_n = weight_N.nonzero().squeeze(1)
    return None if len(rows_n) == len(weight_N) else rows_n


def _spread(value_n: Tensor, rows_n: Tensor, tokens: int) -> Tensor:
    """Put the values of some rows among zeros."""
    return value_n.new_zeros(tokens, *value_n.shape[1:]).index_copy_(0, rows_n, value_n)


def _mode_statistics(logit_N: Tensor, targets: TokenTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mode_sum, bce_N, dlogit_N), the last for upstream 1; all 0 without a weight."""
    weight_N, label_N = targets.mode_weight_N, targets.mode_label_N
    active_N = weight_N != 0
    bce_N = binary_cross_entropy_with_logits(logit_N, label_N, reduction="none")
    bce_N = torch.where(active_N, bce_N, 0)
    dlogit_N = torch.where(active_N, weight_N * (logit_N.sigmoid() - label_N), 0)
    return (weight_N * bce_N).sum(), bce_N, dlogit_N


def _weighted_row_sum(hidden_ND: Tensor, dlogit_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return sum_i dlogit_i * hidden_i over the tokens with a weight (0 * NaN would be NaN)."""
    sum_D = dlogit_N.new_zeros(hidden_ND.shape[1])
    all_active = _active_rows(weight_N) is None
    for begin in range(0, len(hidden_ND), MODE_ROWS):
        rows = slice(begin, begin + MODE_ROWS)
        hidden_RD = hidden_ND[rows].to(dlogit_N.dtype)
        if not all_active:
            hidden_RD = torch.where(weight_N[rows, None] != 0, hidden_RD, 0)
        sum_D += dlogit_N[rows] @ hidden_RD
    return sum_D
