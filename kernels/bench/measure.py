"""Measure one implementation: seconds of a call, the mode head's share, peak memory.

Memory is measured in a process of its own: in a shared one an allocator keeps what an earlier
implementation freed, and hides the next one's need. What counts is all that the call allocates, the
gradients among it, on top of inputs and of what the first call of a library leaves behind.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_mode.kernels.bench.implementations import Implementation, Loss
from megatron_mode.kernels.bench.problem import Case, Inputs, make_inputs

PROCESS = Path("/proc/self")
# Enough to load libraries and to compile; for calls that take minutes.
SHORT_WARM_UP_TOKENS = 16


class Interval(NamedTuple):
    """Hold a median and its 95 % interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median of at least six values and the 95 % interval of the sign test.

    The true median is between the k-th smallest and the k-th largest of n values with probability
    1 - 2 P(Binomial(n, 1/2) < k); k is the largest with at least 95 %, and none of five values.
    """
    count, ordered = len(values), sorted(values)
    k, tail_outcomes = 0, 1  # outcomes with at most k heads, of 2^n
    while 40 * tail_outcomes <= 2**count:
        k += 1
        tail_outcomes += math.comb(count, k)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[count - k])


def call_seconds(loss: Loss, inputs: Inputs) -> float:
    """Return the seconds of one forward and backward pass; the gradients stay on the leaves."""
    inputs.clear_gradients()
    gc.collect()
    _wait(inputs)
    began = time.perf_counter()
    torch.autograd.backward(loss(inputs))
    _wait(inputs)
    return time.perf_counter() - began


def _wait(inputs: Inputs) -> None:
    if inputs.hidden_ND.is_cuda:
        torch.cuda.synchronize()


def head_share(
    with_head: Loss, without_head: Loss, inputs: Inputs, *, rounds: int, step: Callable[[], object]
) -> Interval:
    """Return the time that the mode head adds, as a share of the time without it.

    Two calls in a row see the same state of the machine, so their ratio is steadier than either
    time; which of them is the first changes from pair to pair. Calls `step` after every call.
    """
    shares = []
    for turn in range(rounds):
        seconds = {}
        for loss in (with_head, without_head) if turn % 2 else (without_head, with_head):
            seconds[loss] = call_seconds(loss, inputs)
            step()
        shares.append(seconds[with_head] / seconds[without_head] - 1)
    return median_interval(shares)


def extra_bytes_in_fresh_process(
    implementation: Implementation, case: Case, *, short_warm_up: bool
) -> int:
    """Return the extra bytes of one call; raises what ended the process that made it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(extra_bytes, implementation, case, short_warm_up).result()


def extra_bytes(implementation: Implementation, case: Case, short_warm_up: bool) -> int:
    """Return the peak memory of one call in this process above what was in use before it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(case.threads)
    inputs = make_inputs(case)
    warm_up = inputs.first(SHORT_WARM_UP_TOKENS) if short_warm_up else inputs
    call_seconds(implementation.loss, warm_up)
    warm_up.clear_gradients()
    gc.collect()
    if case.device != "cuda":
        return _extra_resident_bytes(implementation, inputs)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call_seconds(implementation.loss, inputs)
    return torch.cuda.max_memory_allocated() - before


def _extra_resident_bytes(implementation: Implementation, inputs: Inputs) -> int:
    """Read the kernel's own high-water mark: no allocation of any library escapes it."""
    # Freed blocks below 32 MiB stay with glibc and would be used again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    (PROCESS / "clear_refs").write_text("5")  # the mark falls to what is resident now
    before = _status_bytes("VmRSS")
    call_seconds(implementation.loss, inputs)
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(key: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) * 1024
