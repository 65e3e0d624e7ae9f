"""Pick the arguments with which the matrix kernels are launched. Letters: n tokens, V columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mode.kernels.mode_loss import tiling


def rows_contiguous(matrix: Tensor) -> Tensor:
    """Return the matrix with the elements of a row side by side; rows may stand apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def tile_of(hidden_nD: Tensor, weight_VD: Tensor) -> tiling.MatmulTile:
    """Return the tile for the operands' dtype, device and alignment."""
    aligned = tiling.is_aligned(hidden_nD, weight_VD)
    return tiling.matmul_tile(hidden_nD.dtype, _capability(hidden_nD.device), aligned=aligned)


def _capability(device: torch.device) -> int:
    """Return the compute capability such as 90; 0 for the interpreter."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def matmul_arguments(tile: tiling.MatmulTile, hidden_nD: Tensor) -> dict[str, Any]:
    """Return compile-time arguments and launch options of a matrix kernel."""
    return {
        "EVEN_D": hidden_nD.shape[1] % tile.BLOCK_D == 0,
        "UPCAST": hidden_nD.device.type == "cpu",
        "enable_fp_fusion": tiling.FP_FUSION,
        **tile.constexprs,
        **tile.options,
    }
