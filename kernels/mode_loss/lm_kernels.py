"""Walk the logits tile by tile: their statistics, then their gradient.

`lse_forward` reduces each tile to one partial per token, `merge_tiles` joins them with an online
softmax (Milakov and Gimelshein, 2018) in a fixed order, so the result has the same bits in every
run. No atomics, and no N x V logits unless KEEP asks for them. Partials are 12 N V / BLOCK_V
bytes. A program that walks several tiles needs 63 to 70 registers a thread more.

`dlogits` writes the gradient of the logits for one slice of the vocabulary:

    dlogit_iv = a_i ((1 + 2 z_weight lse_i) exp(logit_iv - lse_i) - [v = target_i])

The logits are computed again, or read where the forward pass kept them. The slice then meets two
library GEMMs: dH += dlogit W (accumulated in fp32) and dW = dlogit^T H (each slice written once).
That is deterministic without atomics; one kernel for all three spills and needs atomics.

Tiles beyond 2^31 elements: the start of a tile is one 64-bit scalar, offsets inside it stay 32-bit.
A tensor of 64-bit offsets took 254 registers a thread where this takes 128 (128 x 128 tile, sm_90).
The kernels do not specialise on the number of tokens, columns and tiles: it changes from one
micro-batch to the next, and each new class of value would compile in the middle of a run.

Letters: N tokens, D hidden size, V columns of the shard or slice without padding.
"""

import triton
import triton.language as tl


@triton.jit
def row_start(tile, TILE_ROWS: tl.constexpr, stride):
    """Return the 64-bit offset of the first element of row `tile * TILE_ROWS`."""
    # Adding to a 64-bit zero widens plain numbers too, which have no `.to`.
    return (tl.zeros((), tl.int64) + tile) * TILE_ROWS * stride


@triton.jit
def tile_of_program(
    tokens, columns, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_N: tl.constexpr
):
    """Return the token block and the tile of columns of this program.

    GROUP_N token blocks in a row share a tile: its columns stay in the L2 cache.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK_N)
    tiles = tl.cdiv(columns, BLOCK_V)
    group = program // (GROUP_N * tiles)
    group_blocks = tl.minimum(blocks - group * GROUP_N, GROUP_N)
    inside = program % (GROUP_N * tiles)
    return group * GROUP_N + inside % group_blocks, inside // group_blocks


@triton.jit
def tile_logits(
    hidden_ptr,  # first token of the tile
    weight_ptr,  # first column of the tile
    offset_N,  # clamped
    offset_V,  # clamped
    hidden_size,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the logits [BLOCK_N, BLOCK_V] of one tile in fp32.

    Lanes beyond the matrix repeat its last row: the offsets are clamped, so that the loop over D
    needs no mask. The caller drops what they yield.
    """
    column_D = tl.arange(0, BLOCK_D)
    logit_NV = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    hidden_ptrs = hidden_ptr + offset_N[:, None] + column_D[None, :]
    weight_ptrs = weight_ptr + offset_V[None, :] + column_D[:, None]
    for begin in range(0, hidden_size, BLOCK_D):
        if EVEN_D:
            hidden_ND, weight_DV = tl.load(hidden_ptrs), tl.load(weight_ptrs)
        else:
            inside_D = begin + column_D < hidden_size
            hidden_ND = tl.load(hidden_ptrs, mask=inside_D[None, :], other=0)
            weight_DV = tl.load(weight_ptrs, mask=inside_D[:, None], other=0)
        if UPCAST:  # the interpreter multiplies the raw bits of bf16
            hidden_ND, weight_DV = hidden_ND.to(tl.float32), weight_DV.to(tl.float32)
        logit_NV = tl.dot(hidden_ND, weight_DV, logit_NV, input_precision="ieee")
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    return logit_NV


@triton.jit(do_not_specialize=["tokens", "columns", "first_column"])
def lse_forward(
    hidden_ptr,  # [N, D], bf16, fp16 or fp32
    weight_ptr,  # [V, D], same dtype
    target_ptr,  # [N] int64, ids of the whole vocabulary
    partial_ptr,  # [3, tiles, N] fp32, out: maximum, sum of exponentials, target logit
    logits_ptr,  # [N, V] in the dtype of hidden, out, or None
    tokens,
    columns,
    hidden_size,
    hidden_stride,
    weight_stride,
    logits_stride,
    first_column,  # id of the shard's first column
    KEEP: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """Write the statistics of BLOCK_N tokens over one tile of the vocabulary.

    A token whose target is elsewhere gets target logit 0.
    """
    block, tile = tile_of_program(tokens, columns, BLOCK_N, BLOCK_V, GROUP_N)
    lane_N = tl.arange(0, BLOCK_N)
    row_N = block * BLOCK_N + lane_N
    real_N = row_N < tokens
    lane_V = tl.arange(0, BLOCK_V)
    column_V = tile * BLOCK_V + lane_V
    real_V = column_V < columns
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
    if KEEP:
        kept_ptrs = logits_ptr + row_start(block, BLOCK_N, logits_stride)
        kept_ptrs += (lane_N * logits_stride)[:, None] + column_V[None, :]
        kept_NV = logit_NV.to(logits_ptr.dtype.element_ty)
        tl.store(kept_ptrs, kept_NV, mask=real_N[:, None] & real_V[None, :])
        # The statistics are those of the rounded logits: exp(rounded - lse) must sum to one.
        logit_NV = kept_NV.to(tl.float32)

    target_N = tl.load(target_ptr + row_N, mask=real_N, other=-1).to(tl.int64) - first_column
    owned_N = (target_N >= 0) & (target_N < columns)
    target_N = tl.where(owned_N, target_N, -1).to(tl.int32)
    is_target_NV = column_V[None, :] == target_N[:, None]
    target_logit_N = tl.sum(tl.where(is_target_NV, logit_NV, 0), axis=1)
    logit_NV = tl.where(real_V[None, :], logit_NV, -float("inf"))
    maximum_N = tl.max(logit_NV, axis=1)
    sum_N = tl.sum(tl.exp(logit_NV - maximum_N[:, None]), axis=1)

    plane = row_start(tl.cdiv(columns, BLOCK_V), 1, tokens)
    partial_ptr += row_start(tile, 1, tokens)
    tl.store(partial_ptr + row_N, maximum_N, mask=real_N)
    tl.store(partial_ptr + plane + row_N, sum_N, mask=real_N)
    tl.store(partial_ptr + 2 * plane + row_N, target_logit_N, mask=real_N)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def merge_tiles(
    partial_ptr,  # [3, tiles, N] fp32
    merged_ptr,  # [3, N] fp32, out
    tokens,
    tiles,
    BLOCK_N: tl.constexpr,
):
    """Join the partials of BLOCK_N tokens in the order of the tiles."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_N = row_N < tokens
    plane = row_start(tiles, 1, tokens)
    maximum_N = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    sum_N = tl.zeros((BLOCK_N,), tl.float32)
    found_N = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(tiles):
        part_ptr = partial_ptr + row_start(tile, 1, tokens)
        part_maximum_N = tl.load(part_ptr + row_N, mask=real_N, other=0)
        part_sum_N = tl.load(part_ptr + plane + row_N, mask=real_N, other=0)
        found_N += tl.load(part_ptr + 2 * plane + row_N, mask=real_N, other=0)
        new_maximum_N = tl.maximum(maximum_N, part_maximum_N)
        sum_N = sum_N * tl.exp(maximum_N - new_maximum_N)
        sum_N += part_sum_N * tl.exp(part_maximum_N - new_maximum_N)
        maximum_N = new_maximum_N
    tl.store(merged_ptr + row_N, maximum_N, mask=real_N)
    tl.store(merged_ptr + tokens + row_N, sum_N, mask=real_N)
    tl.store(merged_ptr + 2 * tokens + row_N, found_N, mask=real_N)


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
    block, tile = tile_of_program(tokens, columns, BLOCK_N, BLOCK_V, GROUP_N)
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
