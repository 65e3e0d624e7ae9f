"""Count what a compiled kernel uses, from its PTX and from the log of ptxas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mode.kernels.aot.occupancy import occupancy

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
