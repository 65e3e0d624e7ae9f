"""Launch the forward kernels: mode terms, then statistics of the logits.

One matrix product; one number a token is kept. No step makes the host wait for the device.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mode.kernels.mode_loss import tiling
from megatron_mode.kernels.mode_loss.contract import (
    Choices,
    ModeHead,
    TokenLosses,
    Upstream,
    end_backward,
    end_forward,
)
from megatron_mode.kernels.mode_loss.lm_kernels import lse_forward, merge_tiles
from megatron_mode.kernels.mode_loss.mode_kernels import mode_prologue
from megatron_mode.kernels.mode_loss.mode_terms import (
    ModeTerms,
    cap_candidates,
    effective_lm_weight,
    no_mode_terms,
    token_losses,
)
from megatron_mode.kernels.mode_loss.tokens import LmTokens, TokenTargets, named_tokens
from megatron_mode.kernels.mode_loss.triton_backward import Kept, triton_backward


class TritonLoss(torch.autograd.Function):
    """Join the forward and backward passes of `triton`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        lm_weight_VD: Tensor,
        mode_weight_D: Tensor | None,
        mode_bias: Tensor | None,
        targets: TokenTargets,
        choices: Choices,
    ) -> TokenLosses:
        """Return the losses; `hidden_ND` holds this rank's tokens under sequence parallelism."""
        head, merge = ModeHead.of(mode_weight_D, mode_bias), choices.shard.merge
        with tiling.launch_device(hidden_ND):
            all_ND = tiling.rows_contiguous(choices.shard.all_tokens(hidden_ND))
            mode = _mode_terms(all_ND, head, targets, choices)
            weight_N = effective_lm_weight(targets, mode.blocked_N, choices)
            tokens = named_tokens(all_ND, targets.target_N, weight_N, targets.lm_rows_n)
            statistics_3n, logits_nV = _statistics(tokens, lm_weight_VD, choices)
        if merge is not None and len(tokens.weight_n):
            statistics_3n = merge(statistics_3n)
        maximum_n, sum_n, target_logit_n = statistics_3n.unbind()
        log_sum_n = sum_n.log()
        lse_n, nll_n = maximum_n + log_sum_n, (maximum_n - target_logit_n) + log_sum_n
        kept = Kept(
            hidden_ND,
            lm_weight_VD,
            targets.target_N,
            targets.mode_weight_N,
            targets.lm_rows_n,
            mode_weight_D,
            weight_N,
            mode.dlogit_N,
            lse_n,
            logits_nV,
        )
        ctx.save_for_backward(*kept)
        losses = token_losses(tokens, nll_n, lse_n, mode, choices)
        return end_forward(
            ctx, choices, losses, (hidden_ND, lm_weight_VD, mode_weight_D, mode_bias)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first four arguments."""
        kept = Kept(*ctx.saved_tensors)
        with tiling.launch_device(kept.hidden_ND):
            found = triton_backward(kept, Upstream(*gradients[:2]), ctx.choices)
        return end_backward(ctx, found)


def _mode_terms(
    hidden_ND: Tensor, head: ModeHead | None, targets: TokenTargets, choices: Choices
) -> ModeTerms:
    """Return the mode terms from the prologue kernel; the cap, a sort, is applied in torch."""
    if head is None or not len(hidden_ND):
        return no_mode_terms(targets)
    label_N, weight_N = targets.mode_label_N, targets.mode_weight_N
    blocking, count = choices.blocking, len(hidden_ND)
    blocks = triton.cdiv(count, tiling.PROLOGUE["BLOCK_N"])
    logit_N, bce_N, dlogit_N = (torch.empty_like(weight_N) for _ in range(3))
    candidate_N = torch.empty(count, dtype=torch.int8, device=hidden_ND.device)
    partial = weight_N.new_empty(blocks)
    drops = blocking is not None and blocking.mode and not blocking.capped
    mode_prologue[(blocks,)](
        hidden_ND,
        head.weight_D.contiguous(),
        head.bias,
        label_N,
        weight_N,
        logit_N,
        bce_N,
        dlogit_N,
        candidate_N,
        partial,
        count,
        hidden_ND.shape[1],
        hidden_ND.stride(0),
        0.0 if blocking is None else blocking.threshold,
        WATCH_MODE1=blocking is not None and blocking.watch_mode1,
        WATCH_MODE2=blocking is not None and blocking.watch_mode2,
        DROP=drops,
        enable_fp_fusion=tiling.FP_FUSION,
        **tiling.PROLOGUE,
    )
    blocked_N = candidate_N.bool()
    if blocking is None or not blocking.capped:
        return ModeTerms(partial.sum(), logit_N, bce_N, dlogit_N, blocked_N)
    blocked_N = cap_candidates(blocked_N, logit_N, targets, blocking, choices.grid)
    if not blocking.mode:
        return ModeTerms(partial.sum(), logit_N, bce_N, dlogit_N, blocked_N)
    bce_N, dlogit_N = bce_N.masked_fill(blocked_N, 0), dlogit_N.masked_fill(blocked_N, 0)
    return ModeTerms((weight_N * bce_N).sum(), logit_N, bce_N, dlogit_N, blocked_N)


def _statistics(
    tokens: LmTokens, lm_weight_VD: Tensor, choices: Choices
) -> tuple[Tensor, Tensor | None]:
    """Return (maximum, sum of exponentials, target logit) [3, n] of the shard, and kept logits."""
    hidden_nD, lm_weight_VD = tokens.hidden_nD, tiling.rows_contiguous(lm_weight_VD)
    count, columns = len(hidden_nD), choices.shard.real_columns(len(lm_weight_VD))
    merged_3n = torch.zeros(3, count, dtype=torch.float32, device=hidden_nD.device)
    merged_3n[0] = -torch.inf
    if not count or not columns:
        return merged_3n, None
    tile = tiling.tile_of(hidden_nD, lm_weight_VD)
    blocks, tiles = triton.cdiv(count, tile.BLOCK_N), triton.cdiv(columns, tile.BLOCK_V)
    partial = merged_3n.new_empty(3, tiles, count)
    logits_nV = None
    if (choices.wants.hidden or choices.wants.lm_weight) and (
        count * columns * hidden_nD.element_size() <= choices.keep_logits_bytes
    ):
        logits_nV = hidden_nD.new_empty(count, tiling.padded_columns(columns))
    lse_forward[(blocks * tiles,)](
        hidden_nD,
        lm_weight_VD,
        tokens.target_n,
        partial,
        logits_nV,
        count,
        columns,
        hidden_nD.shape[1],
        hidden_nD.stride(0),
        lm_weight_VD.stride(0),
        tiling.padded_columns(columns),
        choices.shard.start,
        KEEP=logits_nV is not None,
        **tiling.matmul_arguments(tile, hidden_nD),
    )
    blocks = triton.cdiv(count, tiling.MERGE["BLOCK_N"])
    merge_tiles[(blocks,)](
        partial, merged_3n, count, tiles, enable_fp_fusion=tiling.FP_FUSION, **tiling.MERGE
    )
    return merged_3n, logits_nV
