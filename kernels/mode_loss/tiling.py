"""Choose tiles and launch arguments by dtype, device and alignment: device-specific numbers.

Measured ahead of time with `python -m megatron_mode.kernels.aot`, never on a GPU: registers, spills
and shared memory decide here, not time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes of a pointer, and elements of a stride or size, that the launcher specialises on."""


@dataclass(frozen=True)
class MatmulTile:
    """Hold the tile and the launch options of `lse_forward` and `dlogits`."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP_N: int
    num_warps: int
    num_stages: int


HOPPER = MatmulTile(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, GROUP_N=8, num_warps=8, num_stages=3)
AMPERE = MatmulTile(BLOCK_N=128, BLOCK_V=128, BLOCK_D=32, GROUP_N=8, num_warps=8, num_stages=4)
# Loads of rows that are not a multiple of 16 elements cannot be wide or asynchronous: a tile of
# 128 x 128 spills 268 to 1040 bytes there, this one none.
UNALIGNED = MatmulTile(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32, GROUP_N=8, num_warps=4, num_stages=3)
# fp32 without TF32 runs on the ordinary cores, from registers.
FULL_PRECISION = MatmulTile(
    BLOCK_N=64, BLOCK_V=64, BLOCK_D=16, GROUP_N=8, num_warps=8, num_stages=2
)
# Small, so that small inputs meet several tiles, blocks and groups.
INTERPRETER = MatmulTile(BLOCK_N=32, BLOCK_V=64, BLOCK_D=32, GROUP_N=2, num_warps=1, num_stages=1)

# Fused multiply-add stays on: Triton asks for the choice to be made.
FUSED = {"enable_fp_fusion": True}
PROLOGUE = {"BLOCK_N": 16, "BLOCK_D": 256, **FUSED}
MERGE = {"BLOCK_N": 128, **FUSED}
HIDDEN_GRADIENT = {"BLOCK_N": 32, "BLOCK_D": 128, **FUSED}
MODE_WEIGHT_GRADIENT = {"ROWS": 512, "BLOCK_N": 32, "BLOCK_D": 128, **FUSED}


def matmul_tile(dtype: torch.dtype, capability: int, *, aligned: bool) -> MatmulTile:
    """Return the tile for a compute capability such as 90, or 0 for the interpreter."""
    if capability == 0:
        return INTERPRETER
    if dtype == torch.float32:
        return FULL_PRECISION
    if not aligned:
        return UNALIGNED
    # Others, sm_120 among them, have too little shared memory for the large tile.
    return HOPPER if capability in (90, 100, 103) else AMPERE


def tile_of(*matrices: Tensor) -> MatmulTile:
    """Return the tile for the operands' dtype, device and alignment."""
    aligned = all(
        matrix.data_ptr() % ALIGNMENT == 0
        and matrix.stride(0) % ALIGNMENT == 0
        and matrix.shape[1] % HOPPER.BLOCK_D == 0  # a multiple of every tile's BLOCK_D
        for matrix in matrices
    )
    capability = 0  # the interpreter
    if matrices[0].device.type != "cpu":
        major, minor = torch.cuda.get_device_capability(matrices[0].device)
        capability = major * 10 + minor
    return matmul_tile(matrices[0].dtype, capability, aligned=aligned)


def matmul_arguments(tile: MatmulTile, *, even: bool, interpreted: bool) -> dict[str, Any]:
    """Return compile-time arguments and options of a matrix kernel; `even`: BLOCK_D divides D."""
    return {"EVEN_D": even, "UPCAST": interpreted, **asdict(tile), **FUSED}


def padded_columns(columns: int) -> int:
    """Return the columns of a buffer whose rows all begin aligned.

    With an odd row stride the kernel that reads kept logits spills 440 to 4748 bytes.
    """
    return -(-columns // ALIGNMENT) * ALIGNMENT


def rows_contiguous(matrix: Tensor) -> Tensor:
    """Return the matrix with the elements of a row side by side; rows may stand apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
