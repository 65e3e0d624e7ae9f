"""Compile every Triton kernel without a GPU: registers, spills, shared memory, tensor cores.

Each kernel is compiled as the launcher specialises it for training (pointers, strides and sizes
divisible by 16) and for odd shapes. Status 1 names kernels that spill, use atomics or miss the
tensor cores at the training shapes. Nothing here is a measurement of time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product

from tqdm import tqdm

from megatron_mode.command_line import CommandParser, Formatter, aligned, run_program
from megatron_mode.errors import ConfigError
from megatron_mode.kernels.aot.resources import (
    HEADINGS,
    SHARED_BYTES,
    Job,
    Resources,
    cells,
    offences,
)

# LLVM takes most of the time, on one core a kernel.
PROCESSES = 2


def main(arguments: Sequence[str]) -> int:
    """Compile, print, and return the exit status; `--help` imports nothing heavy."""
    parser = CommandParser(
        prog="python -m megatron_mode.kernels.aot",
        description=__doc__,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    arches = list(SHARED_BYTES)
    text = "compute capabilities, 90 for sm_90"
    parser.add_argument("--arch", type=int, nargs="+", choices=arches, default=arches, help=text)
    text = "dtype of hidden states and LM weight"
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help=text)
    text = "write a list of objects instead of the table"
    parser.add_argument("--json", action="store_true", help=text)
    options = parser.parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ConfigError(
            "TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it"
        )
    found = compile_all(options.arch, options.dtype)
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=2))
    else:
        print(aligned([HEADINGS, *map(cells, found)]))
        print("\nspill B: stores plus loads per thread; shared B: per block; -: none")
    sys.stdout.flush()
    named = offences(found)
    if named:
        print(f"error: at the training shapes {', '.join(named)}", file=sys.stderr)
    return 1 if named else 0


def compile_all(arches: Sequence[int], dtype: str) -> list[Resources]:
    """Compile all kernels for all architectures, in the order of the table."""
    from megatron_mode.kernels.aot.launches import KERNELS, measure

    keys = product(KERNELS, dict.fromkeys(arches), (True, False))
    jobs = [Job(kernel, arch, divisible, dtype) for kernel, arch, divisible in keys]
    with ProcessPoolExecutor(
        PROCESSES,
        # A fork would inherit the threads of torch.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        found = pool.map(measure, jobs)
        return list(tqdm(found, "compile", len(jobs), unit="kernel", leave=False, disable=None))


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv[1:])))
