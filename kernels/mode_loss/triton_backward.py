"""Launch the backward kernels: the gradient of the logits slice by slice, then the mode terms.

The logits are computed again for a slice of the vocabulary, their gradient is written, and dH and
dW are left to two library products; each slice of dW is written once. All orders are fixed and
nothing is atomic: results have the same bits in every run.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_mode.kernels.mode_loss import tiling
from megatron_mode.kernels.mode_loss.contract import Choices, Gradients, Upstream
from megatron_mode.kernels.mode_loss.lm_kernels import dlogits
from megatron_mode.kernels.mode_loss.lm_pass import add_product, operand, product
from megatron_mode.kernels.mode_loss.mode_kernels import hidden_gradient, mode_weight_gradient
from megatron_mode.kernels.mode_loss.tokens import LmTokens, named_tokens

# One slice of dlogits: 8192 tokens x 16384 columns in bf16. Small beside the weights, large enough
# for the products to fill a GPU.
SLICE_BYTES = 256 * 2**20


class Kept(NamedTuple):
    """Hold what the forward pass leaves for the backward pass."""

    hidden_ND: Tensor
    """This rank's tokens under sequence parallelism."""
    lm_weight_VD: Tensor
    target_N: Tensor
    mode_weight_N: Tensor
    lm_rows_n: Tensor | None
    mode_weight_D: Tensor | None
    lm_weight_N: Tensor
    """LM weights after blocking."""
    dlogit_N: Tensor
    """Gradient of mode_sum to the mode logit."""
    lse_N: Tensor
    """Log-sum-exp of the logits over all shards."""
    logits_nV: Tensor | None
    """Logits of the shard in the dtype of hidden, where they fit the budget."""


def triton_backward(kept: Kept, up: Upstream, choices: Choices) -> Gradients:
    """Return the gradients of the inputs."""
    wants, shard = choices.wants, choices.shard
    hidden_ND = tiling.rows_contiguous(shard.all_tokens(kept.hidden_ND))
    tokens = named_tokens(hidden_ND, kept.target_N, kept.lm_weight_N, kept.lm_rows_n)
    lm_hidden_nD, weight_VD = _lm_gradients(tokens, kept, choices, up.lm)
    rows_n = tokens.rows_n
    if lm_hidden_nD is not None and shard.reduce is not None:
        if rows_n is not None and shard.gather is not None:
            # Each rank gets an equal part of all tokens, so all of them take part in the sum.
            lm_hidden_nD, rows_n = tokens.spread(lm_hidden_nD, len(hidden_ND)), None
        lm_hidden_nD = shard.reduce(lm_hidden_nD)

    head_D = kept.mode_weight_D
    up = up if head_D is not None else Upstream(up.lm, None)
    hidden_gradient_ND, mode_D, bias = None, None, None
    if wants.hidden and (up.lm is not None or up.mode is not None):
        if head_D is None:
            head_D = kept.dlogit_N.new_zeros(hidden_ND.shape[1])
        out_ND = torch.empty_like(kept.hidden_ND, memory_format=torch.contiguous_format)
        own_N = shard.own_tokens(kept.dlogit_N)
        _hidden_gradient(out_ND, lm_hidden_nD, rows_n, own_N, head_D, up)
        hidden_gradient_ND = out_ND
    if up.mode is not None:
        if wants.mode_weight:
            mode_D = _mode_weight_gradient(hidden_ND, kept.dlogit_N, kept.mode_weight_N) * up.mode
        if wants.mode_bias:
            bias = kept.dlogit_N.sum() * up.mode
    return Gradients(hidden_gradient_ND, weight_VD, mode_D, bias)


def _lm_gradients(
    tokens: LmTokens, kept: Kept, choices: Choices, lm_up: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return dH in fp32 for upstream 1 and dW scaled by the upstream gradient, slice by slice."""
    wants, hidden_nD = choices.wants, tokens.hidden_nD
    if lm_up is None or not (wants.hidden or wants.lm_weight):
        return None, None
    lm_weight_VD = tiling.rows_contiguous(kept.lm_weight_VD)
    count, columns = len(hidden_nD), choices.shard.real_columns(len(lm_weight_VD))
    hidden_gradient_nD, weight_gradient_VD = None, None
    if wants.hidden:
        hidden_gradient_nD = hidden_nD.new_zeros(hidden_nD.shape, dtype=torch.float32)
    if wants.lm_weight:
        weight_gradient_VD = torch.empty_like(lm_weight_VD)
        weight_gradient_VD[columns if count else 0 :] = 0  # padding, or nothing to add
    width = slice_columns(count, hidden_nD.shape[1], hidden_nD.element_size())
    buffer_nV = hidden_nD.new_empty(count, tiling.padded_columns(min(width, columns)))
    for begin in range(0, columns if count else 0, width):
        end = min(begin + width, columns)
        slice_nV = buffer_nV[:, : end - begin]
        _write_dlogits(slice_nV, tokens, lm_weight_VD[begin:], begin, kept, choices)
        dlogit_nV = operand(slice_nV)
        if hidden_gradient_nD is not None:
            add_product(hidden_gradient_nD, dlogit_nV, operand(lm_weight_VD[begin:end]))
        if weight_gradient_VD is not None:
            slice_VD = product(dlogit_nV.T, operand(hidden_nD))
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
    weight_VD: Tensor,
    begin: int,
    kept: Kept,
    choices: Choices,
) -> None:
    """Write the gradient of the logits of columns [begin, begin + width of out)."""
    hidden_nD = tokens.hidden_nD
    count, columns = out_nV.shape
    logits_nV = None if kept.logits_nV is None else kept.logits_nV[:, begin:]
    tile = tiling.tile_of(hidden_nD, weight_VD)
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
        choices.shard.start + begin,
        choices.z_weight,
        KEPT=logits_nV is not None,
        **tiling.matmul_arguments(tile, hidden_nD),
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
