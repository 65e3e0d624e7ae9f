"""Measure the peak memory that one call adds, each implementation in a process of its own.

In a shared process an allocator keeps what an earlier implementation freed, and hides the next
one's need. What counts is all that the call allocates, the gradients among it, on top of inputs and
of what the first call of a library leaves behind.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch

from megatron_mode.kernels.bench.case import Case, MeasurementError
from megatron_mode.kernels.bench.implementations import Implementation
from megatron_mode.kernels.bench.problem import Inputs, make_inputs
from megatron_mode.kernels.bench.timing import call_seconds

PROCESS = Path("/proc/self")
# Enough to load libraries and to compile; for calls that take minutes.
SHORT_WARM_UP_TOKENS = 16


def extra_bytes_in_fresh_process(
    implementation: Implementation, case: Case, *, short_warm_up: bool
) -> int:
    """Return the extra bytes of one call; raises MeasurementError with the reason for none."""
    command = [sys.executable, "-m", "megatron_mode.kernels.bench"]
    command += ["--memory-of", implementation.name, "--device", case.device]
    command += ["--dtype", case.dtype, "--threads", str(case.threads)]
    command += ["--shape", *map(str, case.shape)]
    if short_warm_up:
        command.append("--short-warm-up")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        # A process that the system kills for memory says nothing.
        said = done.stderr.splitlines() or [f"its process ended with status {done.returncode}"]
        raise MeasurementError(said[-1])
    return int(done.stdout.splitlines()[-1])


def extra_bytes(implementation: Implementation, case: Case, *, short_warm_up: bool) -> int:
    """Return the peak memory of one call in this process above what was in use before it."""
    inputs = make_inputs(case)
    warm_up = inputs.first(SHORT_WARM_UP_TOKENS) if short_warm_up else inputs
    call_seconds(implementation.loss, warm_up)
    warm_up.clear_gradients()
    gc.collect()
    return (
        _extra_cuda_bytes(implementation, inputs)
        if case.device == "cuda"
        else (_extra_resident_bytes(implementation, inputs))
    )


def _extra_cuda_bytes(implementation: Implementation, inputs: Inputs) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call_seconds(implementation.loss, inputs)
    return torch.cuda.max_memory_allocated() - before


def _extra_resident_bytes(implementation: Implementation, inputs: Inputs) -> int:
    """Read the kernel's own high-water mark: no allocation of any library escapes it."""
    try:
        # Freed blocks below 32 MiB stay with glibc and would be used again unseen.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        (PROCESS / "clear_refs").write_text("5")  # the mark falls to what is resident now
        before = _status_bytes("VmRSS")
    except OSError as error:
        raise MeasurementError(f"{error.filename} cannot be used: {error.strerror}") from error
    call_seconds(implementation.loss, inputs)
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(key: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise MeasurementError(f"{PROCESS / 'status'} has no {key}")
