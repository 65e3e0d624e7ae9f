"""Count what a compiled kernel uses, from its PTX and from the log of ptxas, and judge it.

Limits of a multiprocessor: CUDA C++ programming guide, table "technical specifications per compute
capability".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WARP_THREADS = 32
PARTITIONS = 4
PARTITION_REGISTERS = 16384
REGISTER_STEP = 8
"""Registers a thread are handed out in multiples of this."""
SHARED_STEP_BYTES = 128
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the system takes beside every block."""

HEADINGS = (
    "kernel", "arch", "divisible", "warps", "registers", "spill B", "shared B", "tensor core",
    "cp.async", "atomics", "occupancy",
)  # fmt: skip
HELD_ARCHES = ("sm_80", "sm_90")
TENSOR_CORE_DTYPES = ("bf16", "fp16")

TENSOR_CORES = {
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05": r"\btcgen05\.mma\.",
    "mma.sync": r"\bmma\.sync\.",
}
CP_ASYNC = r"\bcp\.async\.c[ag]\."
# `red` is an atomic without a result. One that names no memory may be on global memory.
ATOMICS = r"^\s*(?:@!?%p\d+\s+)?(?:atom|red|multimem\.red)\.(?!\S*\bshared\b)"
# Starts of tiles; nothing else that Triton multiplies here has two 64-bit operands.
WIDE_PRODUCTS = r"\bmul\.lo\.s64\b"
REGISTERS = r"Used (\d+) registers"
SPILLS = r"(\d+) bytes spill (?:stores|loads)"


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


class Job(NamedTuple):
    """Name one compilation."""

    kernel: str
    arch: int
    divisible: bool
    dtype: str


@dataclass(frozen=True)
class Resources:
    """Hold what one kernel uses on one architecture."""

    kernel: str
    arch: str
    """Such as sm_90."""
    dtype: str
    """Of the hidden states: bf16, fp16 or fp32."""
    divisible: bool
    """Pointers, strides and sizes are divisible by 16."""
    multiplies: bool
    """It multiplies matrices."""
    num_warps: int
    registers: int
    """Per thread."""
    spill_bytes: int
    """Stores plus loads, per thread."""
    shared_bytes: int
    """Per block."""
    tensor_core: str | None
    """Instruction of the matrix products: wgmma, tcgen05, mma.sync; None: no such instruction."""
    cp_async: bool
    """It copies to shared memory asynchronously."""
    atomics: int
    """Atomic instructions on global memory."""
    wide_products: int
    """64-bit products: without one per matrix, its tile starts overflow at 2^31 elements."""
    occupancy: float
    """Resident warps as a share of what a multiprocessor can hold."""


def count(
    job: Job, *, multiplies: bool, num_warps: int, shared_bytes: int, ptx: str, log: str
) -> Resources:
    """Return what the kernel uses; `log` is what ptxas -v wrote."""
    registers = int(re.findall(REGISTERS, log)[-1])
    found = [name for name, pattern in TENSOR_CORES.items() if re.search(pattern, ptx)]
    return Resources(
        kernel=job.kernel,
        arch=f"sm_{job.arch}",
        dtype=job.dtype,
        divisible=job.divisible,
        multiplies=multiplies,
        num_warps=num_warps,
        registers=registers,
        spill_bytes=sum(map(int, re.findall(SPILLS, log))),
        shared_bytes=shared_bytes,
        tensor_core=found[0] if found else None,
        cp_async=re.search(CP_ASYNC, ptx) is not None,
        atomics=len(re.findall(ATOMICS, ptx, flags=re.MULTILINE)),
        wide_products=len(re.findall(WIDE_PRODUCTS, ptx)),
        occupancy=occupancy(
            job.arch, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps
        ),
    )


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


def resource_table(found: Sequence[Resources]) -> str:
    """Write one line per kernel, architecture and variant."""
    return aligned([HEADINGS, *map(_cells, found)], left_columns=(0, 1, 2, 7))


def _cells(row: Resources) -> tuple[str, ...]:
    return (
        row.kernel,
        row.arch,
        "yes" if row.divisible else "no",
        f"{row.num_warps}",
        f"{row.registers}",
        f"{row.spill_bytes}",
        f"{row.shared_bytes}",
        row.tensor_core or "-",
        "yes" if row.cp_async else "-",
        f"{row.atomics}",
        f"{row.occupancy:.1%}",
    )


def offences(found: Sequence[Resources]) -> list[str]:
    """Name what the divisible variants may not do: spill, use atomics, miss the tensor cores."""
    named = []
    for row in found:
        if not row.divisible or row.arch not in HELD_ARCHES:
            continue
        name = f"{row.kernel} on {row.arch}"
        if row.spill_bytes:
            named.append(f"{name} spills {row.spill_bytes} bytes")
        if row.atomics:
            named.append(f"{name} has {row.atomics} atomic instructions")
        if row.multiplies and row.dtype in TENSOR_CORE_DTYPES and row.tensor_core is None:
            named.append(f"{name} uses no tensor core")
        if not row.occupancy:
            named.append(f"{name} fits no multiprocessor ({row.shared_bytes} bytes shared)")
    return named


def aligned(rows: Sequence[tuple[str, ...]], *, left_columns: tuple[int, ...]) -> str:
    """Write rows as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
