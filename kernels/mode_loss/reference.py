"""Compute the LM + mode loss by plain autograd: the oracle of the other implementations.

    logit_iv = hidden_i . lm_weight_v                 over the real columns v of all shards
    lse_i    = log sum_v exp(logit_iv)
    nll_i    = lse_i - logit_i,target_i
    z_i      = hidden_i . mode_weight + mode_bias
    bce_i    = max(z_i, 0) - m_i * z_i + log(1 + exp(-|z_i|))
    lm_sum   = sum_i a_i * (nll_i + z_weight * lse_i^2)
    mode_sum = sum_i c_i * bce_i

Letters: N tokens, n tokens of weight other than zero, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_mode.kernels.mode_loss.arguments import VocabShard
from megatron_mode.kernels.mode_loss.mode_terms import blocked_tokens
from megatron_mode.kernels.mode_loss.tokens import (
    Choices,
    TokenLosses,
    TokenTargets,
    accumulation_dtype,
)


def reference_loss(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
    targets: TokenTargets,
    choices: Choices,
) -> TokenLosses:
    """Return both sums and the losses of each token; keeps all n x V logits."""
    shard, blocking = choices.shard, choices.blocking
    lm_hidden_ND, all_tokens = hidden_ND, cast(Callable[..., Tensor], _AllTokens.apply)
    if shard.reduce is not None:
        lm_hidden_ND = all_tokens(hidden_ND, shard, shard.reduce)
    if shard.gather is not None:
        hidden_ND = all_tokens(
            hidden_ND, shard, lambda value_ND: shard.own_tokens(value_ND).clone()
        )
    lm_weight_N, mode_weight_N = targets.lm_weight_N, targets.mode_weight_N
    zero_N = torch.zeros_like(lm_weight_N)
    bce_N, mode_sum, mode_logit_N, blocked_N = zero_N, zero_N.sum(), zero_N, zero_N.bool()
    if mode_weight_D is not None and mode_bias is not None:
        mode_logit_N = _mode_logit(hidden_ND.detach(), mode_weight_D, mode_bias).detach()
        if blocking is not None:
            blocked_N = blocked_tokens(mode_logit_N, targets, blocking, choices.grid)
            lm_weight_N = lm_weight_N.masked_fill(blocked_N & blocking.lm, 0)
            mode_weight_N = mode_weight_N.masked_fill(blocked_N & blocking.mode, 0)
        rows_n = mode_weight_N.nonzero().squeeze(1)
        bce_n = binary_cross_entropy_with_logits(
            _mode_logit(hidden_ND[rows_n], mode_weight_D, mode_bias),
            targets.mode_label_N[rows_n],
            reduction="none",
        )
        bce_N = zero_N.index_copy(0, rows_n, bce_n.detach())
        mode_sum = (mode_weight_N[rows_n] * bce_n).sum()

    lm_rows_n = lm_weight_N.nonzero().squeeze(1)
    nll_n, lse_n = _negative_log_likelihood(
        lm_hidden_ND[lm_rows_n], lm_weight_VD, targets.target_N[lm_rows_n], shard
    )
    weight_n = lm_weight_N[lm_rows_n]
    z_loss_sum = (weight_n * choices.z_weight * lse_n.square()).sum()
    return TokenLosses(
        lm_sum=(weight_n * nll_n).sum() + z_loss_sum,
        mode_sum=mode_sum,
        z_loss_sum=z_loss_sum.detach(),
        nll_N=zero_N.index_copy(0, lm_rows_n, nll_n.detach()),
        bce_N=bce_N,
        mode_logit_N=mode_logit_N,
        blocked_N=blocked_N,
    )


def _mode_logit(hidden_ND: Tensor, mode_weight_D: Tensor, mode_bias: Tensor) -> Tensor:
    """Return the mode logit z of each token, in fp32 (fp64 for fp64 hidden states)."""
    dtype = accumulation_dtype(hidden_ND)
    return hidden_ND.to(dtype) @ mode_weight_D.to(dtype) + mode_bias.to(dtype)


def _negative_log_likelihood(
    hidden_nD: Tensor, lm_weight_VD: Tensor, target_n: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Return (nll_n, lse_n) over all shards, differentiable in the local one."""
    dtype = accumulation_dtype(hidden_nD)
    columns = shard.real_columns(lm_weight_VD.shape[0])
    hidden_nD = hidden_nD.to(dtype)
    logit_nV = hidden_nD @ lm_weight_VD[:columns].to(dtype).T
    local_target_n = target_n - shard.start
    owned_n = (local_target_n >= 0) & (local_target_n < columns)
    # A column of zeros gives the gather something to take where the shard holds no real column.
    padded_nV = torch.cat([logit_nV, logit_nV.new_zeros(len(logit_nV), 1)], dim=1)
    index_n = torch.where(owned_n, local_target_n, columns)
    target_logit_n = padded_nV.gather(1, index_n[:, None]).squeeze(1)
    if shard.merge is None:
        lse_n = logit_nV.logsumexp(1)
        return lse_n - target_logit_n, lse_n

    with torch.no_grad():
        floor_n = logit_nV.new_full((len(logit_nV), 1), -torch.inf)
        maximum_n = torch.cat([logit_nV, floor_n], dim=1).amax(1)
        sum_n = (logit_nV - maximum_n[:, None]).exp().sum(1)
        all_3n = shard.merge(torch.stack([maximum_n, sum_n, target_logit_n]))
        all_lse_n = all_3n[0] + all_3n[1].log()
    # d lse / d logit is the softmax: `share` has that gradient and adds zero to the value.
    share_n = (logit_nV - all_lse_n[:, None]).exp().sum(1)
    lse_n = all_lse_n + (share_n - share_n.detach())
    all_target_logit_n = all_3n[2] + (target_logit_n - target_logit_n.detach())
    return lse_n - all_target_logit_n, lse_n


class _AllTokens(torch.autograd.Function):
    """Take all tokens; `own` turns their gradient into that of this rank's tokens.

    Of the LM term each shard knows a part of that gradient, of the mode term every rank all of it.
    """

    @staticmethod
    def forward(
        ctx: Any, own_ND: Tensor, shard: VocabShard, own: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.own = own
        return own_ND.view_as(own_ND) if shard.gather is None else shard.gather(own_ND)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.own(gradients[0]), None, None
