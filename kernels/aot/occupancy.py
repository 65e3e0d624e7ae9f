"""Compute how full a multiprocessor gets from what one block of threads uses.

Limits: CUDA C++ programming guide, table "technical specifications per compute capability".
"""

from __future__ import annotations

from dataclasses import dataclass

WARP_THREADS = 32
PARTITIONS = 4
PARTITION_REGISTERS = 16384
REGISTER_STEP = 8
"""Registers a thread are handed out in multiples of this."""
SHARED_STEP_BYTES = 128
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the system takes beside every block."""


@dataclass(frozen=True)
class Multiprocessor:
    """Hold the limits of one streaming multiprocessor that differ between architectures."""

    warps: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared_bytes=164 * 1024),
    90: Multiprocessor(warps=64, blocks=32, shared_bytes=228 * 1024),
    100: Multiprocessor(warps=64, blocks=32, shared_bytes=228 * 1024),
}


def occupancy(arch: int, *, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Return the share of the multiprocessor's warps that can be resident; 0: no block fits.

    `registers` counts per thread, `shared_bytes` per block. Each of the four partitions of a
    multiprocessor has its own registers, so the warps that fit are counted per partition.
    """
    limits = MULTIPROCESSORS[arch]
    warp_registers = _round_up(registers, REGISTER_STEP) * WARP_THREADS
    register_warps = PARTITIONS * (PARTITION_REGISTERS // warp_registers)
    block_shared_bytes = _round_up(shared_bytes, SHARED_STEP_BYTES) + RESERVED_SHARED_BYTES
    blocks = min(
        limits.blocks,
        min(limits.warps, register_warps) // num_warps,
        limits.shared_bytes // block_shared_bytes,
    )
    return blocks * num_warps / limits.warps


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
