"""Write the gradient of the logits for one slice of the vocabulary.

    dlogit_iv = a_i ((1 + 2 z_weight lse_i) exp(logit_iv - lse_i) - [v = target_i])

The logits are computed again, or read where the forward pass kept them. The slice then meets two
library GEMMs: dH += dlogit W (accumulated in fp32) and dW = dlogit^T H (each slice written once).
That is deterministic without atomics; one kernel for all three spills and needs atomics.

Letters: N tokens, D hidden size, V columns of the slice.
"""

import triton
import triton.language as tl

from megatron_mode.kernels.mode_loss.lse_forward import tile_logits
from megatron_mode.kernels.mode_loss.offsets import row_start


@triton.jit(do_not_specialize=["tokens", "columns", "first_column"])
def dlogits(
    hidden_ptr,  # [N, D], bf16, fp16 or fp32
    weight_ptr,  # [V, D], same dtype: the rows of the slice
    target_ptr,  # [N] int64, ids of the whole vocabulary
    lse_ptr,  # [N] fp32
    token_weight_ptr,  # [N] fp32, a; a token of weight 0 gets a row of zeros
    logits_ptr,  # [N, V] kept logits of the slice, or None
    out_ptr,  # [N, V] in the dtype of hidden, out
    tokens,
    columns,
    hidden_size,
    hidden_stride,
    weight_stride,
    logits_stride,
    out_stride,
    first_column,  # id of the slice's first column
    z_weight,
    KEPT: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """Write one tile [BLOCK_N, BLOCK_V] of dlogits."""
    program = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK_N)
    tiles = tl.cdiv(columns, BLOCK_V)
    group = program // (GROUP_N * tiles)
    group_blocks = tl.minimum(blocks - group * GROUP_N, GROUP_N)
    inside = program % (GROUP_N * tiles)
    block = group * GROUP_N + inside % group_blocks
    tile = inside // group_blocks

    lane_N = tl.arange(0, BLOCK_N)
    row_N = block * BLOCK_N + lane_N
    real_N = row_N < tokens
    lane_V = tl.arange(0, BLOCK_V)
    column_V = tile * BLOCK_V + lane_V
    real_V = column_V < columns
    inside_NV = real_N[:, None] & real_V[None, :]
    if KEPT:
        kept_ptrs = logits_ptr + row_start(block, BLOCK_N, logits_stride)
        kept_ptrs += (lane_N * logits_stride)[:, None] + column_V[None, :]
        logit_NV = tl.load(kept_ptrs, mask=inside_NV, other=0).to(tl.float32)
    else:
        logit_NV = tile_logits(
            hidden_ptr + row_start(block, BLOCK_N, hidden_stride),
            weight_ptr + row_start(tile, BLOCK_V, weight_stride),
            tl.minimum(lane_N, tokens - block * BLOCK_N - 1) * hidden_stride,
            tl.minimum(lane_V, columns - tile * BLOCK_V - 1) * weight_stride,
            hidden_size,
            EVEN_D,
            UPCAST,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )

    target_N = tl.load(target_ptr + row_N, mask=real_N, other=-1).to(tl.int64) - first_column
    owned_N = (target_N >= 0) & (target_N < columns)
    target_N = tl.where(owned_N, target_N, -1).to(tl.int32)
    lse_N = tl.load(lse_ptr + row_N, mask=real_N, other=0)
    weight_N = tl.load(token_weight_ptr + row_N, mask=real_N, other=0)
    slope_N = 1 + 2 * z_weight * lse_N
    dlogit_NV = tl.exp(logit_NV - lse_N[:, None]) * slope_N[:, None]
    dlogit_NV -= tl.where(column_V[None, :] == target_N[:, None], 1.0, 0.0)
    dlogit_NV = tl.where(weight_N[:, None] != 0, dlogit_NV * weight_N[:, None], 0)
    out_ptrs = out_ptr + row_start(block, BLOCK_N, out_stride)
    out_ptrs += (lane_N * out_stride)[:, None] + column_V[None, :]
    tl.store(out_ptrs, dlogit_NV.to(out_ptr.dtype.element_ty), mask=inside_NV)
