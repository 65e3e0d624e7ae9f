"""Compile every Triton kernel without a GPU: registers, spills, shared memory, tensor cores.

Each kernel is compiled as the launcher specialises it for training (pointers, strides and sizes
divisible by 16) and for odd shapes. Status 1 names kernels that spill, use atomics or miss the
tensor cores at the training shapes. Nothing here is a measurement of time.
"""

from __future__ import annotations

import argparse
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

from megatron_mode.kernels.aot.resources import (
    MULTIPROCESSORS,
    Job,
    Resources,
    offences,
    resource_table,
)
from megatron_mode.kernels.aot.roofline import EXAMPLE, H100, roofline_text, stages

CLEAN, OFFENDED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
# LLVM takes most of the time, on one core a kernel.
PROCESSES = 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mode.kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=tuple(MULTIPROCESSORS),
        default=list(MULTIPROCESSORS),
        help="compute capabilities, 90 for sm_90; default: all",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="dtype of hidden states and LM weight; default: bf16",
    )
    parser.add_argument(
        "--json", action="store_true", help="write a list of objects instead of the tables"
    )
    return parser.parse_args(arguments)


def compile_all(arches: Sequence[int], dtype: str) -> list[Resources]:
    """Compile all kernels for all architectures, in the order of the table."""
    from megatron_mode.kernels.aot.launches import KERNELS, measure

    chosen = list(dict.fromkeys(arches))
    jobs = [Job(*key, dtype) for key in product(KERNELS, chosen, (True, False))]
    with ProcessPoolExecutor(
        PROCESSES,
        # A fork would inherit the threads of torch.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        found = pool.map(measure, jobs)
        return list(tqdm(found, "compile", len(jobs), unit="kernel", leave=False, disable=None))


def print_tables(found: Sequence[Resources]) -> None:
    """Print what was found and the estimate of a step."""
    from torch import bfloat16

    from megatron_mode.kernels.mode_loss.tiling import matmul_tile

    print(resource_table(found))
    print("\nspill B: stores plus loads per thread; shared B: per block; -: none\n")
    parts = stages(EXAMPLE, matmul_tile(bfloat16, 90, aligned=True))
    print(roofline_text(parts, EXAMPLE, H100))


def run(options: argparse.Namespace) -> int:
    """Compile, print, and return the exit status."""
    found = compile_all(options.arch, options.dtype)
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=2))
    else:
        print_tables(found)
    sys.stdout.flush()
    named = offences(found)
    if named:
        print(f"error: at the training shapes {', '.join(named)}", file=sys.stderr)
    return OFFENDED if named else CLEAN


def main(arguments: Sequence[str]) -> int:
    """Check the process, run, and return the exit status."""
    options = parse(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print(
            "error: TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it",
            file=sys.stderr,
        )
        return BAD_INPUT
    try:
        return run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it a place that accepts the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
