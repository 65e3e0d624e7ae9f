"""Launch the backward kernels: the gradient of the logits slice by slice, then the mode terms.

The logits are computed again for a slice of the vocabulary, their gradient is written, and dH and
dW are left to two library products; each slice of dW is written once. All orders are fixed and
nothing is atomic: results have the same bits in every run.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_mode.kernels.mode_loss import tiling
from megatron_mode.kernels.mode_loss.arguments import TokenTargets
from megatron_mode.kernels.mode_loss.dlogits import dlogits
from megatron_mode.kernels.mode_loss.launch_arguments import (
    matmul_arguments,
    rows_contiguous,
    tile_of,
)
from megatron_mode.kernels.mode_loss.mode_gradient import hidden_gradient, mode_weight_gradient
from megatron_mode.kernels.mode_loss.plan import LmTokens, Plan, lm_tokens
from megatron_mode.kernels.mode_loss.products import add_product, operand, product
from megatron_mode.kernels.mode_loss.results import Gradients, Kept, Saved, Upstream

# One slice of dlogits: 8192 tokens x 16384 columns in bf16. Small beside the weights, large enough
# for the products to fill a GPU.
SLICE_BYTES = 256 * 2**20


def triton_backward(
    saved: Saved, kept: Kept, up: Upstream, plan: Plan, main_gradient_VD: Tensor | None
) -> Gradients:
    """Return the gradients of the inputs; a main gradient takes the LM weight's instead."""
    wants, shard = plan.wants, plan.shard
    hidden_ND = saved.hidden_ND if shard.gather is None else shard.gather(saved.hidden_ND)
    hidden_ND, lm_weight_VD = rows_contiguous(hidden_ND), rows_contiguous(saved.lm_weight_VD)
    weight_N = saved.mode_weight_N
    targets = TokenTargets(
        saved.target_N, kept.lm_weight_N, weight_N, weight_N, lm_rows_n=saved.lm_rows_n
    )
    tokens = lm_tokens(hidden_ND, targets, kept.lm_weight_N)
    lm_hidden_nD, weight_VD = _lm_gradients(
        tokens, lm_weight_VD, kept, plan, up.lm, main_gradient_VD
    )
    rows_n = tokens.rows_n
    if lm_hidden_nD is not None and shard.reduce is not None:
        if rows_n is not None and shard.gather is not None:
            # Each rank gets an equal part of all tokens, so all of them take part in the sum.
            lm_hidden_nD, rows_n = tokens.spread(lm_hidden_nD, len(hidden_ND)), None
        lm_hidden_nD = shard.reduce(lm_hidden_nD)

    head_D = saved.mode_weight_D
    up = up if head_D is not None else Upstream(up.lm, None)
    hidden_gradient_ND, mode_D, bias = None, None, None
    if wants.hidden and (up.lm is not None or up.mode is not None):
        if head_D is None:
            head_D = kept.dlogit_N.new_zeros(hidden_ND.shape[1])
        out_ND = torch.empty_like(saved.hidden_ND, memory_format=torch.contiguous_format)
        own_N = shard.own_tokens(kept.dlogit_N)
        _hidden_gradient(out_ND, lm_hidden_nD, rows_n, own_N, head_D, up)
        hidden_gradient_ND = out_ND
    if up.mode is not None:
        if wants.mode_weight:
            mode_D = _mode_weight_gradient(hidden_ND, kept.dlogit_N, weight_N) * up.mode
        if wants.mode_bias:
            bias = kept.dlogit_N.sum() * up.mode
    return Gradients(hidden_gradient_ND, weight_VD, mode_D, bias)


def _lm_gradients(
    tokens: LmTokens,
    lm_weight_VD: Tensor,
    kept: Kept,
    plan: Plan,
    lm_up: Tensor | None,
    main_gradient_VD: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dH in fp32 for upstream 1 and dW scaled by the upstream gradient, slice by slice."""
    wants, hidden_nD = plan.wants, tokens.hidden_nD
    if lm_up is None or not (wants.hidden or wants.lm_weight):
        return None, None
    count, columns = len(hidden_nD), plan.shard.real_columns(len(lm_weight_VD))
    hidden_gradient_nD = None
    if wants.hidden:
        hidden_gradient_nD = hidden_nD.new_zeros(hidden_nD.shape, dtype=torch.float32)
    weight_gradient_VD = None
    if wants.lm_weight and main_gradient_VD is None:
        weight_gradient_VD = torch.empty_like(lm_weight_VD)
        weight_gradient_VD[columns if count else 0 :] = 0  # padding, or nothing to add
    width = slice_columns(count, hidden_nD.shape[1], hidden_nD.element_size())
    buffer_nV = hidden_nD.new_empty(count, tiling.padded_columns(min(width, columns)))
    for begin in range(0, columns if count else 0, width):
        end = min(begin + width, columns)
        slice_nV = buffer_nV[:, : end - begin]
        _write_dlogits(slice_nV, tokens, lm_weight_VD, begin, kept, plan)
        dlogit_nV = operand(slice_nV)
        if hidden_gradient_nD is not None:
            add_product(hidden_gradient_nD, dlogit_nV, operand(lm_weight_VD[begin:end]))
        if wants.lm_weight:
            slice_VD = product(dlogit_nV.T, operand(hidden_nD))
            if main_gradient_VD is not None:
                main_gradient_VD[begin:end].addcmul_(slice_VD, lm_up)
            elif weight_gradient_VD is not None:
                torch.mul(slice_VD, lm_up, out=weight_gradient_VD[begin:end])
    return hidden_gradient_nD, weight_gradient_VD


def slice_columns(tokens: int, hidden_size: int, element_bytes: int) -> int:
    """Return the columns of a slice: dlogits, and dW in fp32, each within SLICE_BYTES.

    A multiple of 128, so that slices begin on aligned columns.
    """
    row_bytes = max(element_bytes * tokens, 4 * hidden_size)
    return -(-max(SLICE_BYTES // row_bytes, 1) // 128) * 128


def _write_dlogits(
    out_nV: Tensor,
    tokens: LmTokens,
    lm_weight_VD: Tensor,
    begin: int,
    kept: Kept,
    plan: Plan,
) -> None:
    """Write the gradient of the logits of columns [begin, begin + width of out)."""
    hidden_nD, weight_VD = tokens.hidden_nD, lm_weight_VD[begin:]
    count, columns = out_nV.shape
    logits_nV = kept.logits_nV[:, begin:] if kept.logits_nV.numel() else None
    tile = tile_of(hidden_nD, weight_VD)
    blocks, tiles = triton.cdiv(count, tile.BLOCK_N), triton.cdiv(columns, tile.BLOCK_V)
    dlogits[(blocks * tiles,)](
        hidden_nD,
        weight_VD,
        tokens.target_n,
        kept.lse_N,
        tokens.weight_n,
        logits_nV,
        out_nV,
        count,
        columns,
        hidden_nD.shape[1],
        hidden_nD.stride(0),
        weight_VD.stride(0),
        0 if logits_nV is None else logits_nV.stride(0),
        out_nV.stride(0),
        plan.shard.start + begin,
        plan.z_weight,
        KEPT=logits_nV is not None,
        **matmul_arguments(tile, hidden_nD),
    )


def _hidden_gradient(
    out_ND: Tensor,
    lm_hidden_nD: Tensor | None,
    rows_n: Tensor | None,
    dlogit_N: Tensor,
    mode_weight_D: Tensor,
    up: Upstream,
) -> None:
    """Write lm_up * dH(LM) + mode_up * dz (x) w_mode of this rank's tokens."""
    count, hidden_size = out_ND.shape
    lm_row_N = torch.full((count,), -1, dtype=torch.int32, device=out_ND.device)
    if lm_hidden_nD is None:
        lm_hidden_nD = dlogit_N.new_zeros(1, hidden_size)
    elif rows_n is None:
        lm_row_N = torch.arange(count, dtype=torch.int32, device=out_ND.device)
    else:
        lm_row_N[rows_n] = torch.arange(len(rows_n), dtype=torch.int32, device=out_ND.device)
    if not count:
        return
    zero = dlogit_N.new_zeros(())
    if up.mode is None:
        dlogit_N = torch.zeros_like(dlogit_N)  # 0 * NaN would be NaN
    blocks = triton.cdiv(count, tiling.HIDDEN_GRADIENT["BLOCK_N"])
    strips = triton.cdiv(hidden_size, tiling.HIDDEN_GRADIENT["BLOCK_D"])
    hidden_gradient[(blocks, strips)](
        lm_hidden_nD,
        lm_row_N,
        dlogit_N,
        mode_weight_D.contiguous(),
        zero if up.lm is None else up.lm.float(),
        zero if up.mode is None else up.mode.float(),
        out_ND,
        count,
        hidden_size,
        lm_hidden_nD.stride(0),
        out_ND.stride(0),
        enable_fp_fusion=tiling.FP_FUSION,
        **tiling.HIDDEN_GRADIENT,
    )


def _mode_weight_gradient(hidden_ND: Tensor, dlogit_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return sum_i dz_i hidden_i; partial sums are added in a fixed order."""
    count, hidden_size = hidden_ND.shape
    blocks = triton.cdiv(count, tiling.MODE_WEIGHT_GRADIENT["ROWS"])
    strips = triton.cdiv(hidden_size, tiling.MODE_WEIGHT_GRADIENT["BLOCK_D"])
    partial = dlogit_N.new_zeros(max(blocks, 1), hidden_size)
    if count:
        mode_weight_gradient[(blocks, strips)](
            hidden_ND,
            dlogit_N,
            weight_N,
            partial,
            count,
            hidden_size,
            hidden_ND.stride(0),
            enable_fp_fusion=tiling.FP_FUSION,
            **tiling.MODE_WEIGHT_GRADIENT,
        )
    return partial.sum(0)
