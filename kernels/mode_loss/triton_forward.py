"""Launch the forward kernels: mode terms, then statistics of the logits.

One matrix product; one number a token is kept. No step makes the host wait for the device.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_mode.kernels.mode_loss import tiling
from megatron_mode.kernels.mode_loss.arguments import Blocking, TokenTargets
from megatron_mode.kernels.mode_loss.blocking import cap_candidates
from megatron_mode.kernels.mode_loss.launch_arguments import (
    matmul_arguments,
    rows_contiguous,
    tile_of,
)
from megatron_mode.kernels.mode_loss.lse_forward import lse_forward, merge_tiles
from megatron_mode.kernels.mode_loss.mode_pass import (
    ModeTerms,
    effective_lm_weight,
    no_mode_terms,
    token_losses,
)
from megatron_mode.kernels.mode_loss.plan import (
    LmTokens,
    ModeHead,
    Plan,
    keeps_logits,
    lm_tokens,
)
from megatron_mode.kernels.mode_loss.prologue import mode_prologue
from megatron_mode.kernels.mode_loss.results import Kept, TokenLosses


def triton_forward(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    head: ModeHead | None,
    targets: TokenTargets,
    plan: Plan,
) -> tuple[TokenLosses, Kept]:
    """Return the losses, and the log-sum-exp for the backward pass."""
    hidden_ND = rows_contiguous(hidden_ND)
    mode = _mode_terms(hidden_ND, head, targets, plan)
    weight_N = effective_lm_weight(targets, mode.blocked_N, plan)
    tokens = lm_tokens(hidden_ND, targets, weight_N)
    statistics_3n, logits_nV = _statistics(tokens, rows_contiguous(lm_weight_VD), plan)
    if plan.shard.merge is not None and len(tokens.weight_n):
        statistics_3n = plan.shard.merge(statistics_3n)
    maximum_n, sum_n, target_logit_n = statistics_3n.unbind()
    log_sum_n = sum_n.log()
    lse_n = maximum_n + log_sum_n
    nll_n = (maximum_n - target_logit_n) + log_sum_n
    empty = lse_n.new_empty(0)
    kept = Kept(
        dlogit_N=mode.dlogit_N,
        lm_weight_N=weight_N,
        lse_N=lse_n,
        logits_nV=empty.clone() if logits_nV is None else logits_nV,
        hidden_gradient_ND=empty.clone(),
        lm_weight_gradient_VD=empty.clone(),
        mode_weight_gradient_D=empty,
    )
    return token_losses(tokens, nll_n, lse_n, mode, plan), kept


def _mode_terms(
    hidden_ND: Tensor, head: ModeHead | None, targets: TokenTargets, plan: Plan
) -> ModeTerms:
    """Return the mode terms from the prologue kernel; the cap, a sort, is applied in torch."""
    if head is None or not len(hidden_ND):
        return no_mode_terms(targets)
    label_N, weight_N = targets.mode_label_N, targets.mode_weight_N
    blocking, count = plan.blocking, len(hidden_ND)
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
    blocked_N = _capped(blocked_N, logit_N, label_N, weight_N, blocking, plan)
    if not blocking.mode:
        return ModeTerms(partial.sum(), logit_N, bce_N, dlogit_N, blocked_N)
    bce_N, dlogit_N = bce_N.masked_fill(blocked_N, 0), dlogit_N.masked_fill(blocked_N, 0)
    return ModeTerms((weight_N * bce_N).sum(), logit_N, bce_N, dlogit_N, blocked_N)


def _capped(
    candidate_N: Tensor,
    logit_N: Tensor,
    label_N: Tensor,
    weight_N: Tensor,
    blocking: Blocking,
    plan: Plan,
) -> Tensor:
    grid = plan.grid

    def rows(value_N: Tensor) -> Tensor:
        value_BT = grid.unflatten(value_N)
        return value_BT if value_BT.dim() == 2 else value_BT[None]

    blocked_BT = cap_candidates(
        rows(candidate_N), rows(logit_N), rows(label_N), rows(weight_N), blocking
    )
    return grid.flatten(blocked_BT.view(grid.shape))


def _statistics(tokens: LmTokens, lm_weight_VD: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Return (maximum, sum of exponentials, target logit) [3, n] of the shard, and kept logits."""
    hidden_nD = tokens.hidden_nD
    count, columns = len(hidden_nD), plan.shard.real_columns(len(lm_weight_VD))
    merged_3n = torch.zeros(3, count, dtype=torch.float32, device=hidden_nD.device)
    merged_3n[0] = -torch.inf
    if not count or not columns:
        return merged_3n, None
    tile = tile_of(hidden_nD, lm_weight_VD)
    blocks, tiles = triton.cdiv(count, tile.BLOCK_N), triton.cdiv(columns, tile.BLOCK_V)
    partial = merged_3n.new_empty(3, tiles, count)
    logits_nV = None
    if keeps_logits(plan, count, columns, hidden_nD.dtype):
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
        plan.shard.start,
        KEEP=logits_nV is not None,
        **matmul_arguments(tile, hidden_nD),
    )
    blocks = triton.cdiv(count, tiling.MERGE["BLOCK_N"])
    merge_tiles[(blocks,)](
        partial, merged_3n, count, tiles, enable_fp_fusion=tiling.FP_FUSION, **tiling.MERGE
    )
    return merged_3n, logits_nV
