"""Walk the tokens in chunks: LM statistics and gradients without keeping the N x V logits.

Each chunk of R tokens is one [R, V] buffer, used for logits, softmax and dlogits in turn:

    logit = H W^T;  p = softmax(logit);  dlogit = (1 + 2 z_weight lse) p - onehot(target)
    dH    = a * (dlogit W);              dW += dlogit^T (a H)

The weights a scale the [R, D] sides, which is cheaper than scaling [R, V].

Letters: N tokens, n tokens with an LM weight, R tokens of a chunk, D hidden size, V columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss.arguments import VocabShard
from megatron_mode.kernels.mode_loss.results import accumulation_dtype

# Measured with fp32 on an AVX2 server core: a product of 64 rows runs at 52 to 69 GFLOP/s, of 128
# at 58 to 70, of 256 and more at 68 to 79, because the weight is packed anew for every chunk;
# softmax adds 5 %. 16 MiB is 512 rows at V = 8192 and 128 rows at V = 32768, and stays within a
# 32 MiB last-level cache.
CPU_LOGITS_BYTES = 16 * 2**20
CPU_ROWS_MAX = 1024
# A GPU needs thousands of rows to fill; the buffer is small beside its memory.
GPU_LOGITS_BYTES = 256 * 2**20
ROWS_MIN = 64


@dataclass(frozen=True)
class LmResult:
    """Hold what the walk yields for the n tokens that have an LM weight."""

    nll_n: Tensor
    lse_n: Tensor
    hidden_grad_nD: Tensor | None
    """Gradient of the LM sum for upstream 1, summed over the shards; None if not wanted."""
    weight_grad_VD: Tensor | None
    """Gradient of the LM sum for upstream 1, of the local shard; None if not wanted."""


def lm_pass(
    hidden_ND: Tensor,
    lm_weight_VD: Tensor,
    target_N: Tensor,
    lm_weight_N: Tensor,
    *,
    rows_n: Tensor | None,
    shard: VocabShard,
    z_weight: float,
    wants_hidden: bool,
    wants_weight: bool,
    logits_bytes: int | None = None,
) -> LmResult:
    """Return statistics and gradients of the tokens `rows_n` (None: all of them).

    All shards must pass the same tokens and the same `logits_bytes`: each chunk is one merge.
    """
    dtype = accumulation_dtype(hidden_ND)
    tokens = len(hidden_ND) if rows_n is None else len(rows_n)
    columns = shard.real_columns(len(lm_weight_VD))
    weight_VD = _operand(lm_weight_VD[:columns].detach(), dtype)
    rows_R = chunk_rows(tokens, hidden_ND, len(lm_weight_VD), shard, logits_bytes)

    new = torch.empty((), dtype=dtype, device=hidden_ND.device)
    nll_n, lse_n = new.new_empty(tokens), new.new_empty(tokens)
    buffer_RV = new.new_empty(min(rows_R, tokens), columns)
    hidden_grad_nD = new.new_zeros(tokens, hidden_ND.shape[1]) if wants_hidden else None
    weight_grad_VD = new.new_zeros(lm_weight_VD.shape) if wants_weight else None

    for begin, end in _chunks(tokens, rows_R):
        take = slice(begin, end) if rows_n is None else rows_n[begin:end]
        hidden_RD = _operand(hidden_ND[take], dtype)
        logit_RV = buffer_RV[: end - begin]
        _multiply(hidden_RD, weight_VD.T, logit_RV)
        nll_n[begin:end], lse_n[begin:end] = _softmax_gradient(
            logit_RV, target_N[take] - shard.start, shard, z_weight
        )
        weight_R = lm_weight_N[take, None]
        if hidden_grad_nD is not None and columns:
            _multiply(logit_RV, weight_VD, hidden_grad_nD[begin:end])
            hidden_grad_nD[begin:end].mul_(weight_R)
        if weight_grad_VD is not None and columns:
            weighted_RD = (hidden_RD * weight_R).to(hidden_RD.dtype)
            _multiply(logit_RV.T, weighted_RD, weight_grad_VD[:columns], add=True)

    if hidden_grad_nD is not None and shard.reduce is not None and tokens:
        shard.reduce(hidden_grad_nD)
    return LmResult(nll_n, lse_n, hidden_grad_nD, weight_grad_VD)


def chunk_rows(
    tokens: int,
    hidden_ND: Tensor,
    local_columns: int,
    shard: VocabShard,
    logits_bytes: int | None,
) -> int:
    """Return the tokens of a chunk: what the budget holds, spread evenly over the chunks.

    Depends on the whole vocabulary, not on the local shard, so that all shards chunk alike.
    """
    columns = local_columns if shard.vocab_size is None else -(-shard.vocab_size // shard.ranks)
    row_bytes = max(columns, 1) * accumulation_dtype(hidden_ND).itemsize
    if logits_bytes is not None:
        rows = max(logits_bytes // row_bytes, 1)
    elif hidden_ND.device.type == "cpu":
        rows = min(max(CPU_LOGITS_BYTES // row_bytes, ROWS_MIN), CPU_ROWS_MAX)
    else:
        rows = max(GPU_LOGITS_BYTES // row_bytes, ROWS_MIN)
    return -(-tokens // max(-(-tokens // rows), 1))


def _chunks(tokens: int, rows: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, tokens, max(rows, 1)):
        yield begin, min(begin + rows, tokens)


def _softmax_gradient(
    logit_RV: Tensor, local_target_R: Tensor, shard: VocabShard, z_weight: float
) -> tuple[Tensor, Tensor]:
    """Turn logits into dlogits for weight 1, in place; return (nll_R, lse_R) over all shards."""
    columns = logit_RV.shape[1]
    owned_R = (local_target_R >= 0) & (local_target_R < columns)
    index_R1 = torch.where(owned_R, local_target_R, 0)[:, None]
    if columns:
        maximum_R = logit_RV.amax(1)
        target_logit_R = torch.where(owned_R, logit_RV.gather(1, index_R1).squeeze(1), 0)
        torch.softmax(logit_RV, 1, out=logit_RV)
        # The largest probability is exp(0) / sum: one pass over the row gives the sum exactly.
        sum_R = logit_RV.amax(1).reciprocal()
    else:
        sum_R = logit_RV.new_zeros(len(logit_RV))
        maximum_R, target_logit_R = torch.full_like(sum_R, -torch.inf), sum_R

    factor_R: Tensor | None = None
    whole_maximum_R, whole_sum_R = maximum_R, sum_R
    if shard.merge is not None:
        whole_maximum_R, whole_sum_R, target_logit_R = shard.merge(
            torch.stack([maximum_R, sum_R, target_logit_R])
        ).unbind()
        factor_R = sum_R / whole_sum_R * (maximum_R - whole_maximum_R).exp()
    log_sum_R = whole_sum_R.log()
    nll_R = (whole_maximum_R - target_logit_R) + log_sum_R
    lse_R = whole_maximum_R + log_sum_R

    if z_weight:
        slope_R = 1 + 2 * z_weight * lse_R
        factor_R = slope_R if factor_R is None else factor_R * slope_R
    if columns:
        if factor_R is not None:
            logit_RV.mul_(factor_R[:, None])
        logit_RV.scatter_add_(1, index_R1, -owned_R[:, None].to(logit_RV.dtype))
    return nll_R, lse_R


def _operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix as the products take it.

    A CPU without bf16 instructions multiplies fp32 5 to 80 times faster than bf16 (60 against
    0.8 to 14 GFLOP/s on one AVX2 core), so half precision is widened there; a GPU keeps it.
    """
    return matrix.to(dtype) if matrix.device.type == "cpu" else matrix


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write left @ right into `out`, or add it to what is there."""
    if right.dtype == left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=float(add), out=out)
        return
    half = right.dtype if left.dtype == out.dtype else left.dtype
    product = left.to(half) @ right.to(half)
    if add:
        out.add_(product)
    else:
        out.copy_(product)
