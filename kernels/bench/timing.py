"""Time forward and backward passes in alternating rounds within one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch

from megatron_mode.kernels.bench.implementations import Loss
from megatron_mode.kernels.bench.inputs import Inputs
from megatron_mode.kernels.bench.interval import Interval, median_interval


def call_seconds(loss: Loss, inputs: Inputs) -> float:
    """Return the seconds of one forward and backward pass; the gradients stay on the leaves."""
    inputs.clear_gradients()
    gc.collect()
    _wait(inputs)
    began = time.perf_counter()
    torch.autograd.backward(loss(inputs))
    _wait(inputs)
    return time.perf_counter() - began


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Return the names in the order of one round, so that none is always the first."""
    first = turn % len(names) if names else 0
    return [*names[first:], *names[:first]]


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


def _wait(inputs: Inputs) -> None:
    if inputs.hidden_ND.is_cuda:
        torch.cuda.synchronize()
