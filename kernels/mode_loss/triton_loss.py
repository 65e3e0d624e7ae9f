"""Launch the Triton kernels: mode terms, statistics of the logits, then gradients slice by slice.

Forward: one matrix product, and one number a token is kept. Backward: the logits are computed again
for a slice of the vocabulary, their gradient is written, and dH and dW are left to two library
products; each slice of dW is written once. All orders are fixed and nothing is atomic: results have
the same bits in every run. No step makes the host wait for the device.

Letters: N tokens, n tokens with an LM weight, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mode.kernels.mode_loss import tiling
from megatron_mode.kernels.mode_loss.lm_kernels import dlogits, lse_forward, merge_tiles
from megatron_mode.kernels.mode_loss.lm_pass import add_product, operand, product
from megatron_mode.kernels.mode_loss.mode_kernels import (
    launch_hidden_gradient,
    launch_mode_weight_gradient,
    launch_prologue,
)
from megatron_mode.kernels.mode_loss.mode_terms import effective_lm_weight, token_losses
from megatron_mode.kernels.mode_loss.tokens import Choices, LmTokens, TokenLosses, TokenTargets

# One slice of dlogits: 8192 tokens x 16384 columns in bf16. Small beside the weights, large enough
# for the products to fill a GPU.
SLICE_BYTES = 256 * 2**20


class Kept(NamedTuple):
    """Hold the tensors that the forward pass leaves for the backward pass."""

    hidden_ND: Tensor
    """This rank's tokens under sequence parallelism."""
    lm_weight_VD: Tensor
    mode_weight_D: Tensor | None
    lm_weight_N: Tensor
    """LM weights after blocking."""
    dlogit_N: Tensor
    """Gradient of mode_sum to the mode logit."""
    lse_n: Tensor
    """Log-sum-exp of the logits over all shards."""
    logits_nV: Tensor | None
    """Logits of the shard in the dtype of hidden, where they fit the budget."""


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
        merge = choices.shard.merge
        # Triton launches on the current GPU; the number of a CPU, -1, changes nothing.
        with torch.cuda.device(hidden_ND.get_device()):
            all_ND = tiling.rows_contiguous(choices.shard.all_tokens(hidden_ND))
            mode = launch_prologue(all_ND, mode_weight_D, mode_bias, targets, choices)
            weight_N = effective_lm_weight(targets, mode.blocked_N, choices)
            tokens = targets.lm_tokens(all_ND, weight_N)
            statistics_3n, logits_nV = _statistics(tokens, lm_weight_VD, choices)
        if merge is not None and len(tokens.weight_n):
            statistics_3n = merge(statistics_3n)
        maximum_n, sum_n, target_logit_n = statistics_3n
        log_sum_n = sum_n.log()
        lse_n, nll_n = maximum_n + log_sum_n, (maximum_n - target_logit_n) + log_sum_n
        ctx.targets, ctx.choices = targets, choices
        ctx.save_for_backward(
            *Kept(hidden_ND, lm_weight_VD, mode_weight_D, weight_N, mode.dlogit_N, lse_n, logits_nV)
        )
        losses = token_losses(tokens, nll_n, lse_n, mode, choices)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*losses[2:])
        return losses

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, lm_up: Tensor | None, mode_up: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first four arguments; autograd casts them to their dtypes."""
        kept, targets, wants, shard = (
            Kept(*ctx.saved_tensors), ctx.targets, ctx.choices.wants, ctx.choices.shard
        )  # fmt: skip
        mode_up = None if kept.mode_weight_D is None else mode_up
        gradient_ND, weight_VD, mode_D, bias = None, None, None, None
        with torch.cuda.device(kept.hidden_ND.get_device()):
            hidden_ND = tiling.rows_contiguous(shard.all_tokens(kept.hidden_ND))
            tokens = targets.lm_tokens(hidden_ND, kept.lm_weight_N)
            lm_hidden_nD, rows_n = None, tokens.rows_n
            if lm_up is not None:
                lm_hidden_nD, weight_VD = _lm_gradients(tokens, kept, ctx.choices, lm_up)
            if lm_hidden_nD is not None and shard.reduce is not None:
                if rows_n is not None and shard.gather is not None:
                    # Each rank gets an equal part of all tokens: all of them are in the sum.
                    lm_hidden_nD, rows_n = tokens.spread(lm_hidden_nD, len(hidden_ND)), None
                lm_hidden_nD = shard.reduce(lm_hidden_nD)
            if wants.hidden and (lm_up is not None or mode_up is not None):
                gradient_ND = torch.empty_like(
                    kept.hidden_ND, memory_format=torch.contiguous_format
                )
                dlogit_N = shard.own_tokens(kept.dlogit_N)
                launch_hidden_gradient(
                    gradient_ND,
                    lm_hidden_nD,
                    rows_n,
                    kept.mode_weight_D,
                    dlogit_N,
                    (lm_up, mode_up),
                )
            if mode_up is not None and wants.mode_weight:
                weight_N = targets.mode_weight_N
                mode_D = launch_mode_weight_gradient(hidden_ND, kept.dlogit_N, weight_N) * mode_up
            if mode_up is not None and wants.mode_bias:
                bias = kept.dlogit_N.sum() * mode_up
        return gradient_ND, weight_VD, mode_D, bias, None, None


def _matmul_launch(
    tokens: LmTokens, weight_VD: Tensor, columns: int
) -> tuple[tuple[int], int, dict[str, Any]]:
    """Return grid, tiles of columns, and keyword arguments of a matrix kernel."""
    count, hidden_size = tokens.hidden_nD.shape
    tile = tiling.tile_of(tokens.hidden_nD, weight_VD)
    tiles = triton.cdiv(columns, tile.BLOCK_V)
    arguments = tiling.matmul_arguments(
        tile,
        even=hidden_size % tile.BLOCK_D == 0,
        interpreted=weight_VD.device.type == "cpu",
    )
    return (triton.cdiv(count, tile.BLOCK_N) * tiles,), tiles, arguments


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
    grid, tiles, arguments = _matmul_launch(tokens, lm_weight_VD, columns)
    partial = merged_3n.new_empty(3, tiles, count)
    logits_nV, logits_bytes = None, count * columns * hidden_nD.element_size()
    wants_any = choices.wants.hidden or choices.wants.lm_weight
    if wants_any and logits_bytes <= choices.keep_logits_bytes:
        logits_nV = hidden_nD.new_empty(count, tiling.padded_columns(columns))
    lse_forward[grid](
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
        **arguments,
    )
    blocks = triton.cdiv(count, tiling.MERGE["BLOCK_N"])
    merge_tiles[(blocks,)](partial, merged_3n, count, tiles, **tiling.MERGE)
    return merged_3n, logits_nV


def _lm_gradients(
    tokens: LmTokens, kept: Kept, choices: Choices, lm_up: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return dH in fp32 for upstream 1 and dW scaled by the upstream gradient, slice by slice."""
    wants, hidden_nD = choices.wants, tokens.hidden_nD
    if not (wants.hidden or wants.lm_weight):
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
    hidden_nD, (count, columns) = tokens.hidden_nD, out_nV.shape
    logits_nV = None if kept.logits_nV is None else kept.logits_nV[:, begin:]
    grid, _, arguments = _matmul_launch(tokens, weight_VD, columns)
    dlogits[grid](
        hidden_nD,
        weight_VD,
        tokens.target_n,
        kept.lse_n,
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
        **arguments,
    )
