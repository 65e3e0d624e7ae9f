"""Count what a compiled kernel uses, from its PTX and from the log of ptxas, and judge it.

Limits of a multiprocessor: CUDA C++ programming guide, table "technical specifications per compute
capability".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

WARP_THREADS, MOST_WARPS, MOST_BLOCKS = 32, 64, 32
PARTITIONS, PARTITION_REGISTERS = 4, 16384
REGISTER_STEP = 8  # registers a thread are handed out in multiples of this
SHARED_STEP_BYTES = 128
RESERVED_SHARED_BYTES = 1024  # shared memory that the system takes beside every block
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Shared memory of a multiprocessor by compute capability, 90 for sm_90."""

HEADINGS = (
    "kernel", "arch", "divisible", "warps", "registers", "spill B", "shared B", "tensor core",
    "cp.async", "atomics", "occupancy",
)  # fmt: skip
HELD_ARCHES = ("sm_80", "sm_90")

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


class Job(NamedTuple):
    """Name one compilation."""

    kernel: str
    arch: int  # such as 90
    divisible: bool  # pointers, strides and sizes are divisible by 16
    dtype: str  # of the hidden states: bf16, fp16 or fp32


@dataclass(frozen=True)
class Resources:
    """Hold what one kernel uses on one architecture."""

    kernel: str
    arch: str  # such as sm_90
    dtype: str
    divisible: bool
    multiplies: bool  # it multiplies matrices
    num_warps: int
    registers: int  # per thread
    spill_bytes: int  # stores plus loads, per thread
    shared_bytes: int  # per block
    tensor_core: str | None  # instruction of the matrix products: wgmma, tcgen05, mma.sync
    cp_async: bool  # it copies to shared memory asynchronously
    atomics: int  # atomic instructions on global memory
    wide_products: int  # of 64 bits: without one per matrix, tile starts overflow at 2^31 elements
    occupancy: float  # resident warps as a share of what a multiprocessor can hold


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
        occupancy=occupancy(job.arch, registers, shared_bytes, num_warps),
    )


def occupancy(arch: int, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Return the share of the multiprocessor's warps that can be resident; 0: no block fits.

    `registers` counts per thread, `shared_bytes` per block. Each of the four partitions of a
    multiprocessor has its own registers, so the warps that fit are counted per partition.
    """
    warp_registers = -(-registers // REGISTER_STEP) * REGISTER_STEP * WARP_THREADS
    register_warps = PARTITIONS * (PARTITION_REGISTERS // warp_registers)
    block_bytes = -(-shared_bytes // SHARED_STEP_BYTES) * SHARED_STEP_BYTES + RESERVED_SHARED_BYTES
    blocks = min(
        MOST_BLOCKS,
        min(MOST_WARPS, register_warps) // num_warps,
        SHARED_BYTES[arch] // block_bytes,
    )
    return blocks * num_warps / MOST_WARPS


def cells(row: Resources) -> tuple[str, ...]:
    """Return the line of the table under HEADINGS."""
    return (
        row.kernel,
        row.arch,
        "yes" if row.divisible else "no",
        str(row.num_warps),
        str(row.registers),
        str(row.spill_bytes),
        str(row.shared_bytes),
        row.tensor_core or "-",
        "yes" if row.cp_async else "-",
        str(row.atomics),
        f"{row.occupancy:.1%}",
    )


def offences(found: Iterable[Resources]) -> list[str]:
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
        if row.multiplies and row.dtype != "fp32" and row.tensor_core is None:
            named.append(f"{name} uses no tensor core")
        if not row.occupancy:
            named.append(f"{name} fits no multiprocessor ({row.shared_bytes} bytes shared)")
    return named
