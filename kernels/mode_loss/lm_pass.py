"""Walk the logits in pieces: LM statistics and gradients without keeping the N x V logits.

    logit = W H^T;  p = softmax(logit);  dlogit = (1 + 2 z_weight lse) p - onehot(target)
    dH    = a * (dlogit^T W);            dW     = dlogit (a * H)

Two walks, chosen by the dtype. `by_tokens` takes R tokens against the full vocabulary: three
products, dW accumulates over the pieces. `by_columns` takes all tokens against C columns twice,
first for the statistics, then for the gradients: four products, but each dW row is written once
and shards exchange their statistics once. The weights a scale the sides of size D, which is
cheaper than scaling the logits.

Letters: n tokens, R tokens of a piece, D hidden size, V columns, C columns of a piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import VocabShard
from megatron_mode.kernels.mode_loss.tokens import Choices, LmTokens, accumulation_dtype

# Measured with fp32 on two AVX2 cores at N = 2048, D = 512, V = 32768 (GFLOP/s of logits, dH, dW):
# pieces of 128 tokens 110, 110, 134; of 256 121, 128, 132; of 512 134, 141, 126. 32 MiB is 256
# tokens there and 1024 at V = 8192. The buffer is [V, R]: as [R, V] the logits ran at 102.
CPU_LOGITS_BYTES = 32 * 2**20
# by_columns meets its pieces twice and reads no weight twice in a piece. CPU seconds of one core at
# N = 2048, D = 512, V = 8192 in bf16, widened: 16 MiB 0.94, 4 MiB 0.95, 2 MiB 0.96, 1 MiB 1.05.
CPU_COLUMNS_BYTES = 2 * 2**20
CPU_ROWS_MAX = 1024
# A GPU needs thousands of rows to fill; the buffer is small beside its memory.
GPU_LOGITS_BYTES = 256 * 2**20
ROWS_MIN = 64
COLUMNS_MIN = 256
NARROW = 16
NARROW_COLUMNS = 512


class LmResult(NamedTuple):
    """Hold what a walk yields for the n tokens: gradients of the shard's LM sum, if wanted."""

    nll_n: Tensor
    lse_n: Tensor
    hidden_gradient_nD: Tensor | None
    lm_weight_gradient_VD: Tensor | None


def lm_pass(tokens: LmTokens, lm_weight_VD: Tensor, choices: Choices) -> LmResult:
    """Return statistics and gradients; all shards must pass the same tokens."""
    if accumulation_dtype(tokens.hidden_nD) == tokens.hidden_nD.dtype:
        return by_tokens(tokens, lm_weight_VD, choices)
    return by_columns(tokens, lm_weight_VD, choices)


def by_tokens(tokens: LmTokens, lm_weight_VD: Tensor, choices: Choices) -> LmResult:
    """Walk the tokens; the buffer holds R of them against all columns."""
    shard, wants, hidden_nD = choices.shard, choices.wants, tokens.hidden_nD
    count, columns = len(hidden_nD), shard.real_columns(len(lm_weight_VD))
    weight_VD = lm_weight_VD[:columns]
    rows = piece_rows(count, hidden_nD, len(lm_weight_VD), shard)
    buffer = hidden_nD.new_empty(columns * min(rows, count))
    nll_n, lse_n = hidden_nD.new_empty(count), hidden_nD.new_empty(count)
    hidden_gradient_nD = torch.zeros_like(hidden_nD) if wants.hidden else None
    weight_gradient_VD = hidden_nD.new_zeros(lm_weight_VD.shape) if wants.lm_weight else None

    for piece in _pieces(count, rows):
        hidden_RD = hidden_nD[piece]
        logit_VR = buffer[: columns * len(hidden_RD)].view(columns, len(hidden_RD))
        torch.mm(weight_VD, hidden_RD.T, out=logit_VR)
        local_target_R = tokens.target_n[piece] - shard.start
        nll_n[piece], lse_n[piece], scale_R = _dlogits_in_place(logit_VR, local_target_R, choices)
        scale_R1 = (scale_R * tokens.weight_n[piece])[:, None]
        if not columns:
            continue
        if hidden_gradient_nD is not None:
            _multiply_over_columns(logit_VR, weight_VD, hidden_gradient_nD[piece])
            hidden_gradient_nD[piece].mul_(scale_R1)
        if weight_gradient_VD is not None:
            add_product(weight_gradient_VD[:columns], logit_VR, hidden_RD * scale_R1)
    return LmResult(nll_n, lse_n, hidden_gradient_nD, weight_gradient_VD)


def _dlogits_in_place(
    logit_VR: Tensor, local_target_R: Tensor, choices: Choices
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into dlogits but for a factor a token; return (nll_R, lse_R, factor_R)."""
    shard, columns = choices.shard, len(logit_VR)
    owned_R, index_R = _owned(local_target_R, columns)
    if columns:
        maximum_R = logit_VR.amax(0)
        target_logit_R = torch.where(owned_R, logit_VR.gather(0, index_R[None])[0], 0)
        logit_VR.sub_(maximum_R).exp_()
        sum_R = logit_VR.sum(0)
    else:
        sum_R = logit_VR.new_zeros(len(owned_R))
        maximum_R, target_logit_R = torch.full_like(sum_R, -torch.inf), sum_R
    all_maximum_R, all_sum_R = maximum_R, sum_R
    if shard.merge is not None:
        all_maximum_R, all_sum_R, target_logit_R = shard.merge(
            torch.stack([maximum_R, sum_R, target_logit_R])
        )
    log_sum_R = all_sum_R.log()
    nll_R = (all_maximum_R - target_logit_R) + log_sum_R
    lse_R = all_maximum_R + log_sum_R
    factor_R = all_sum_R.reciprocal()
    if not columns or not (choices.wants.hidden or choices.wants.lm_weight):
        return nll_R, lse_R, factor_R
    if shard.merge is None and not choices.z_weight:
        # p - onehot = (exp - sum * onehot) / sum: the division waits for the sides of size D.
        logit_VR.scatter_add_(0, index_R[None], torch.where(owned_R, -sum_R, 0)[None])
        return nll_R, lse_R, factor_R
    factor_R = factor_R * (maximum_R - all_maximum_R).exp() * (1 + 2 * choices.z_weight * lse_R)
    logit_VR.mul_(factor_R)
    logit_VR.scatter_add_(0, index_R[None], -owned_R[None].to(logit_VR.dtype))
    return nll_R, lse_R, torch.ones_like(factor_R)


def _multiply_over_columns(dlogit_VR: Tensor, weight_VD: Tensor, out_RD: Tensor) -> None:
    """Write dlogit^T @ weight.

    A library adds up a narrow product term by term: at D = 1 and V = 50257 its error was 9e-5,
    that of plain torch 5e-6. Blocks of columns, as a wide product has them, stay within twice that.
    """
    if weight_VD.shape[1] >= NARROW:
        torch.mm(dlogit_VR.T, weight_VD, out=out_RD)
        return
    out_RD.zero_()
    for piece in _pieces(len(weight_VD), NARROW_COLUMNS):
        out_RD += dlogit_VR[piece].T @ weight_VD[piece]


def by_columns(tokens: LmTokens, lm_weight_VD: Tensor, choices: Choices) -> LmResult:
    """Walk the columns twice; the buffer holds all tokens against C of them."""
    shard, wants, dtype = choices.shard, choices.wants, accumulation_dtype(tokens.hidden_nD)
    count, columns = len(tokens.hidden_nD), shard.real_columns(len(lm_weight_VD))
    hidden_nD = operand(tokens.hidden_nD)
    budget = CPU_COLUMNS_BYTES if hidden_nD.device.type == "cpu" else GPU_LOGITS_BYTES
    width = max(budget // (dtype.itemsize * max(count, 1)), COLUMNS_MIN)
    pieces = _pieces(columns, width) if count else []
    buffer = torch.empty(count * min(width, columns), dtype=dtype, device=hidden_nD.device)

    def logits(weight_CD: Tensor) -> Tensor:
        logit_nC = buffer[: count * len(weight_CD)].view(count, len(weight_CD))
        return product(hidden_nD, weight_CD.T, out=logit_nC)

    target_n = tokens.target_n - shard.start
    statistics_3n = torch.zeros(3, count, dtype=dtype, device=hidden_nD.device)
    statistics_3n[0] = -torch.inf
    for piece in pieces:
        logit_nC = logits(operand(lm_weight_VD[piece]))
        _reduce_piece(logit_nC, target_n - piece.start, statistics_3n)
    if shard.merge is not None and count:
        statistics_3n = shard.merge(statistics_3n)
    maximum_n, sum_n, target_logit_n = statistics_3n
    nll_n, lse_n = (maximum_n - target_logit_n) + sum_n.log(), maximum_n + sum_n.log()

    weight_n1 = tokens.weight_n[:, None]
    hidden_gradient_nD = hidden_nD.new_zeros(hidden_nD.shape, dtype=dtype) if wants.hidden else None
    # bf16 holds what fp32 does in range; fp16 does not, before the upstream gradient scales it.
    kept_dtype = torch.bfloat16 if lm_weight_VD.dtype == torch.bfloat16 else dtype
    weight_gradient_VD = (
        lm_weight_VD.new_zeros(lm_weight_VD.shape, dtype=kept_dtype) if wants.lm_weight else None
    )
    weighted_nD = (hidden_nD * weight_n1).to(hidden_nD.dtype) if wants.lm_weight else hidden_nD
    for piece in pieces if wants.hidden or wants.lm_weight else []:
        weight_CD = operand(lm_weight_VD[piece])
        dlogit_nC = logits(weight_CD)
        _piece_dlogits(dlogit_nC, target_n - piece.start, lse_n, choices.z_weight)
        if hidden_gradient_nD is not None:
            add_product(hidden_gradient_nD, dlogit_nC, weight_CD)
        if weight_gradient_VD is not None:
            weight_gradient_VD[piece] = product(dlogit_nC.T, weighted_nD)
    if hidden_gradient_nD is not None:
        hidden_gradient_nD.mul_(weight_n1)
    return LmResult(nll_n, lse_n, hidden_gradient_nD, weight_gradient_VD)


def _reduce_piece(logit_nC: Tensor, local_target_n: Tensor, statistics_3n: Tensor) -> None:
    """Fold a piece into (maximum, sum of exponentials, target logit); spoils the logits."""
    maximum_n, sum_n, target_logit_n = statistics_3n
    owned_n, index_n = _owned(local_target_n, logit_nC.shape[1])
    target_logit_n += torch.where(owned_n, logit_nC.gather(1, index_n[:, None])[:, 0], 0)
    new_maximum_n = torch.maximum(maximum_n, logit_nC.amax(1))
    sum_n *= (maximum_n - new_maximum_n).exp_()
    sum_n += logit_nC.sub_(new_maximum_n[:, None]).exp_().sum(1)
    maximum_n.copy_(new_maximum_n)


def _piece_dlogits(
    logit_nC: Tensor, local_target_n: Tensor, lse_n: Tensor, z_weight: float
) -> None:
    """Turn the logits of a piece into dlogits for weight 1, in place."""
    owned_n, index_n = _owned(local_target_n, logit_nC.shape[1])
    logit_nC.sub_(lse_n[:, None]).exp_()
    if z_weight:
        logit_nC.mul_((1 + 2 * z_weight * lse_n)[:, None])
    logit_nC.scatter_add_(1, index_n[:, None], -owned_n[:, None].to(logit_nC.dtype))


def _owned(local_target_n: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return which targets are among the columns, and an index of a column for every token."""
    owned_n = (local_target_n >= 0) & (local_target_n < columns)
    return owned_n, torch.where(owned_n, local_target_n, 0)


def piece_rows(tokens: int, hidden_ND: Tensor, local_columns: int, shard: VocabShard) -> int:
    """Return the tokens of a piece: what the budget holds, spread evenly over the pieces.

    Depends on the full vocabulary, not on the local shard, so that all shards cut alike.
    """
    columns = local_columns if shard.vocab_size is None else -(-shard.vocab_size // shard.ranks)
    row_bytes = max(columns, 1) * accumulation_dtype(hidden_ND).itemsize
    if hidden_ND.device.type == "cpu":
        rows = min(max(CPU_LOGITS_BYTES // row_bytes, ROWS_MIN), CPU_ROWS_MAX)
    else:
        rows = max(GPU_LOGITS_BYTES // row_bytes, ROWS_MIN)
    return -(-tokens // max(-(-tokens // rows), 1))


def _pieces(total: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, total)) for begin in range(0, total, max(size, 1))]


def operand(matrix: Tensor) -> Tensor:
    """Return the matrix as the products of this device take it: half precision, or widened.

    A CPU without bf16 instructions multiplies fp32 5 to 80 times faster than bf16 (60 against
    0.8 to 14 GFLOP/s on one AVX2 core), so half precision is widened there, and fp16 on any CPU.
    """
    is_half = matrix.dtype in (torch.bfloat16, torch.float16)
    return matrix.float() if is_half and not native_half(matrix) else matrix


def native_half(matrix: Tensor) -> bool:
    """Tell whether the device multiplies the matrix's half precision faster than fp32."""
    if matrix.device.type != "cpu":
        return True
    return matrix.dtype == torch.bfloat16 and bool(
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return left @ right in the accumulation dtype; an operand in fp32 follows a half one."""
    if left.dtype == right.dtype and left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    half = right.dtype if left.dtype == torch.float32 else left.dtype
    left, right = left.to(half), right.to(half)
    if left.device.type == "cuda":
        result = torch.mm(left, right, out_dtype=torch.float32)
    else:
        result = torch.mm(left, right)
    return result.float() if out is None else out.copy_(result)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which is in the accumulation dtype."""
    if left.dtype == right.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += product(left, right)
