"""Compute the mode terms: a kernel for the forward pass, two for the backward pass.

    z    = hidden . mode_weight + mode_bias
    bce  = max(z, 0) - m z + log(1 + exp(-|z|))
    dz   = c (sigmoid(z) - m)
    w    = z where m < 1/2, else -z          how far the logit stands on the wrong side
    blocked where c > 0, w > log(tau / (1 - tau)) and the direction is watched
    dH_i    = lm_up * dH_i(LM) + mode_up * dz_i w_mode
    dw_mode = mode_up * sum_i dz_i hidden_i

The prologue runs before any LM weight is read, so the mask of blocked tokens is there when the LM
loss begins. Inside the LM kernels the same product would cost 12 to 29 registers a thread, or an
extra row of the vocabulary on one tensor-parallel rank only. The mode term joins dH after dH was
summed over the vocabulary shards, or it would count once a shard.

Each kernel has its launcher below. Letters: N tokens, n tokens with an LM weight, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mode.kernels.mode_loss import tiling
from megatron_mode.kernels.mode_loss.lm_kernels import row_start
from megatron_mode.kernels.mode_loss.mode_terms import ModeTerms, cap_candidates, no_mode_terms
from megatron_mode.kernels.mode_loss.tokens import Choices, TokenTargets


@triton.jit(do_not_specialize=["tokens"])
def mode_prologue(
    hidden_ptr,  # [N, D], bf16, fp16 or fp32
    mode_weight_ptr,  # [D], any float
    mode_bias_ptr,  # one element
    label_ptr,  # [N] fp32
    token_weight_ptr,  # [N] fp32, c
    logit_ptr,  # [N] fp32, out
    bce_ptr,  # [N] fp32, out
    dlogit_ptr,  # [N] fp32, out: gradient of mode_sum
    candidate_ptr,  # [N] int8, out
    partial_ptr,  # [blocks] fp32, out: sum of c * bce over the block's tokens
    tokens,
    hidden_size,
    hidden_stride,  # elements between tokens
    threshold,  # log(tau / (1 - tau))
    WATCH_MODE1: tl.constexpr,  # a Mode 1 token called Mode 2 is a candidate
    WATCH_MODE2: tl.constexpr,  # a Mode 2 token called Mode 1 is a candidate
    DROP: tl.constexpr,  # candidates lose the mode loss: no cap follows
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write logit, cross-entropy, gradient and candidates of BLOCK_N tokens, and one partial sum.

    A token of weight 0 gets cross-entropy and gradient 0, whatever its hidden state holds.
    """
    block = tl.program_id(0)
    row_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    real_N = row_N < tokens
    offset_N = tl.arange(0, BLOCK_N) * hidden_stride
    hidden_ptr += row_start(block, BLOCK_N, hidden_stride)

    sum_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for begin in range(0, hidden_size, BLOCK_D):
        column_D = begin + tl.arange(0, BLOCK_D)
        inside_D = column_D < hidden_size
        weight_D = tl.load(mode_weight_ptr + column_D, mask=inside_D, other=0).to(tl.float32)
        hidden_ND = tl.load(
            hidden_ptr + offset_N[:, None] + column_D[None, :],
            mask=real_N[:, None] & inside_D[None, :],
            other=0,
        )
        sum_ND += hidden_ND.to(tl.float32) * weight_D[None, :]
    z_N = tl.sum(sum_ND, axis=1) + tl.load(mode_bias_ptr).to(tl.float32)

    label_N = tl.load(label_ptr + row_N, mask=real_N, other=0)
    weight_N = tl.load(token_weight_ptr + row_N, mask=real_N, other=0)
    decay_N = tl.exp(-tl.abs(z_N))  # in (0, 1]: neither exponential can overflow
    bce_N = tl.maximum(z_N, 0) - label_N * z_N + tl.log(1 + decay_N)
    sigmoid_N = tl.where(z_N >= 0, 1 / (1 + decay_N), decay_N / (1 + decay_N))
    dlogit_N = weight_N * (sigmoid_N - label_N)

    is_mode2_N = label_N >= 0.5
    wrong_N = tl.where(is_mode2_N, -z_N, z_N)
    candidate_N = (weight_N > 0) & (wrong_N > threshold)
    if not WATCH_MODE1:
        candidate_N = candidate_N & is_mode2_N
    if not WATCH_MODE2:
        candidate_N = candidate_N & (is_mode2_N == 0)

    counted_N = weight_N != 0
    if DROP:
        counted_N = counted_N & (candidate_N == 0)
    bce_N = tl.where(counted_N, bce_N, 0)
    dlogit_N = tl.where(counted_N, dlogit_N, 0)
    tl.store(logit_ptr + row_N, z_N, mask=real_N)
    tl.store(bce_ptr + row_N, bce_N, mask=real_N)
    tl.store(dlogit_ptr + row_N, dlogit_N, mask=real_N)
    tl.store(candidate_ptr + row_N, candidate_N.to(tl.int8), mask=real_N)
    loss_N = tl.where(counted_N, weight_N * bce_N, 0)
    tl.store(partial_ptr + block, tl.sum(loss_N, axis=0))


@triton.jit(do_not_specialize=["tokens"])
def hidden_gradient(
    lm_gradient_ptr,  # [n, D] fp32
    lm_row_ptr,  # [N] int32: row of lm_gradient of the token, -1 for none
    dlogit_ptr,  # [N] fp32, dz
    mode_weight_ptr,  # [D]
    lm_up_ptr,  # one fp32: upstream gradient of lm_sum
    mode_up_ptr,  # one fp32: upstream gradient of mode_sum
    out_ptr,  # [N, D], out
    tokens,
    hidden_size,
    gradient_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write BLOCK_N x BLOCK_D elements of the gradient of the hidden states."""
    block = tl.program_id(0)
    lane_N = tl.arange(0, BLOCK_N)
    row_N = block * BLOCK_N + lane_N
    real_N = row_N < tokens
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = column_D < hidden_size
    lm_row_N = tl.load(lm_row_ptr + row_N, mask=real_N, other=-1)
    gradient_ND = tl.load(
        # Gathered rows have no common start, so their offsets are 64-bit: N of them, not N x D.
        (lm_gradient_ptr + lm_row_N.to(tl.int64) * gradient_stride)[:, None] + column_D[None, :],
        mask=(lm_row_N >= 0)[:, None] & inside_D[None, :],
        other=0,
    ).to(tl.float32)
    lm_up, mode_up = tl.load(lm_up_ptr), tl.load(mode_up_ptr)
    dlogit_N = tl.load(dlogit_ptr + row_N, mask=real_N, other=0) * mode_up
    weight_D = tl.load(mode_weight_ptr + column_D, mask=inside_D, other=0).to(tl.float32)
    gradient_ND = gradient_ND * lm_up + dlogit_N[:, None] * weight_D[None, :]
    out_ptrs = out_ptr + row_start(block, BLOCK_N, out_stride)
    out_ptrs += (lane_N * out_stride)[:, None] + column_D[None, :]
    inside_ND = real_N[:, None] & inside_D[None, :]
    tl.store(out_ptrs, gradient_ND.to(out_ptr.dtype.element_ty), mask=inside_ND)


@triton.jit(do_not_specialize=["tokens"])
def mode_weight_gradient(
    hidden_ptr,  # [N, D]
    dlogit_ptr,  # [N] fp32
    token_weight_ptr,  # [N] fp32, c: hidden states of weight 0 are not looked at (0 * NaN is NaN)
    partial_ptr,  # [blocks, D] fp32, out
    tokens,
    hidden_size,
    hidden_stride,
    ROWS: tl.constexpr,  # tokens of a program
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write sum_i dz_i hidden_i over ROWS tokens and BLOCK_D columns."""
    block = tl.program_id(0)
    lane_N = tl.arange(0, BLOCK_N)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = column_D < hidden_size
    hidden_ptr += row_start(block, ROWS, hidden_stride)
    sum_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for begin in range(0, ROWS, BLOCK_N):
        row_N = block * ROWS + begin + lane_N
        weight_N = tl.load(token_weight_ptr + row_N, mask=row_N < tokens, other=0)
        dlogit_N = tl.load(dlogit_ptr + row_N, mask=row_N < tokens, other=0)
        hidden_ND = tl.load(
            hidden_ptr + ((begin + lane_N) * hidden_stride)[:, None] + column_D[None, :],
            mask=(weight_N != 0)[:, None] & inside_D[None, :],
            other=0,
        )
        sum_ND += dlogit_N[:, None] * hidden_ND.to(tl.float32)
    sum_D = tl.sum(sum_ND, axis=0)
    tl.store(partial_ptr + row_start(block, 1, hidden_size) + column_D, sum_D, mask=inside_D)


def launch_prologue(
    hidden_ND: Tensor,
    mode_weight_D: Tensor | None,
    mode_bias: Tensor | None,
    targets: TokenTargets,
    choices: Choices,
) -> ModeTerms:
    """Return the mode terms; the cap, a sort, is applied in torch."""
    count, hidden_size = hidden_ND.shape
    if mode_weight_D is None or not count:
        return no_mode_terms(targets)
    weight_N, blocking = targets.mode_weight_N, choices.blocking
    blocks = triton.cdiv(count, tiling.PROLOGUE["BLOCK_N"])
    logit_N, bce_N, dlogit_N = (torch.empty_like(weight_N) for _ in range(3))
    candidate_N = torch.empty_like(weight_N, dtype=torch.int8)
    partial = weight_N.new_empty(blocks)
    mode_prologue[(blocks,)](
        hidden_ND,
        mode_weight_D.contiguous(),
        mode_bias,
        targets.mode_label_N,
        weight_N,
        logit_N,
        bce_N,
        dlogit_N,
        candidate_N,
        partial,
        count,
        hidden_size,
        hidden_ND.stride(0),
        0.0 if blocking is None else blocking.threshold,
        WATCH_MODE1=blocking is not None and blocking.watch_mode1,
        WATCH_MODE2=blocking is not None and blocking.watch_mode2,
        DROP=blocking is not None and blocking.mode and not blocking.capped,
        **tiling.PROLOGUE,
    )
    blocked_N, mode_sum = candidate_N.bool(), partial.sum()
    if blocking is not None and blocking.capped:
        blocked_N = cap_candidates(blocked_N, logit_N, targets, blocking, choices.grid)
        if blocking.mode:
            bce_N, dlogit_N = bce_N.masked_fill(blocked_N, 0), dlogit_N.masked_fill(blocked_N, 0)
            mode_sum = (weight_N * bce_N).sum()
    return ModeTerms(mode_sum, logit_N, bce_N, dlogit_N, blocked_N)


def launch_hidden_gradient(
    out_ND: Tensor,
    lm_gradient_nD: Tensor | None,
    rows_n: Tensor | None,
    mode_weight_D: Tensor | None,
    dlogit_N: Tensor,
    ups: tuple[Tensor | None, Tensor | None],
) -> None:
    """Write the gradient of this rank's hidden states; `ups` are upstream of LM and mode sum."""
    count, hidden_size = out_ND.shape
    lm_row_N = torch.full((count,), -1, dtype=torch.int32, device=out_ND.device)
    if lm_gradient_nD is None:
        lm_gradient_nD = dlogit_N.new_zeros(1, hidden_size)
    else:
        row_n = torch.arange(len(lm_gradient_nD), dtype=torch.int32, device=out_ND.device)
        lm_row_N[slice(None) if rows_n is None else rows_n] = row_n
    if not count:
        return
    zero = dlogit_N.new_zeros(())
    if ups[1] is None or mode_weight_D is None:
        mode_weight_D = dlogit_N.new_zeros(hidden_size)
        dlogit_N = torch.zeros_like(dlogit_N)  # 0 * NaN would be NaN
    blocks = triton.cdiv(count, tiling.HIDDEN_GRADIENT["BLOCK_N"])
    strips = triton.cdiv(hidden_size, tiling.HIDDEN_GRADIENT["BLOCK_D"])
    hidden_gradient[(blocks, strips)](
        lm_gradient_nD,
        lm_row_N,
        dlogit_N,
        mode_weight_D.contiguous(),
        *(zero if up is None else up.float() for up in ups),
        out_ND,
        count,
        hidden_size,
        lm_gradient_nD.stride(0),
        out_ND.stride(0),
        **tiling.HIDDEN_GRADIENT,
    )


def launch_mode_weight_gradient(hidden_ND: Tensor, dlogit_N: Tensor, weight_N: Tensor) -> Tensor:
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
            **tiling.MODE_WEIGHT_GRADIENT,
        )
    return partial.sum(0)
