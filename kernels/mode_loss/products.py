"""Multiply matrices with fp32 accumulation; a CPU with bf16 instructions rounds each product."""

from __future__ import annotations

import torch
from torch import Tensor


def native_half(matrix: Tensor) -> bool:
    """Tell whether the device multiplies the matrix's half precision faster than fp32.

    A CPU without bf16 instructions multiplies fp32 5 to 80 times faster than bf16 (60 against
    0.8 to 14 GFLOP/s on one AVX2 core), so half precision is widened there, and fp16 on any CPU.
    """
    if matrix.device.type != "cpu":
        return True
    if matrix.dtype != torch.bfloat16:
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def operand(matrix: Tensor) -> Tensor:
    """Return the matrix as the products of this device take it."""
    if matrix.dtype in (torch.bfloat16, torch.float16) and not native_half(matrix):
        return matrix.float()
    return matrix


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return left @ right in the accumulation dtype; an operand in fp32 follows a half one."""
    if left.dtype == right.dtype and left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    half = right.dtype if left.dtype == torch.float32 else left.dtype
    left, right = left.to(half), right.to(half)
    if left.device.type == "cuda":
        result = torch.mm(left, right, out_dtype=torch.float32)
    else:
        result = torch.mm(left, right).float()
    return result if out is None else out.copy_(result)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which is in the accumulation dtype."""
    if left.dtype == right.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += product(left, right)
