"""Time forward and backward passes in alternating rounds; give a median its interval.

Imports no torch at the top, so that `--help` is instant.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_mode.kernels.bench.implementations import Loss

if TYPE_CHECKING:
    from megatron_mode.kernels.bench.problem import Inputs

LEAST_VALUES = 6
"""Five values give 1 - 2 * 0.5^5 = 93.75 % at best."""


class Interval(NamedTuple):
    """Hold a median and its 95 % interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median and the 95 % interval of the sign test.

    The true median lies between the k-th smallest and the k-th largest of n values with probability
    1 - 2 P(Binomial(n, 1/2) < k); k is the largest with at least 95 %.
    Raises ValueError for fewer than six values.
    """
    count = len(values)
    if count < LEAST_VALUES:
        raise ValueError(f"{count} values give no 95 % interval: at least {LEAST_VALUES} do.")
    ordered = sorted(values)
    k, tail_outcomes = 0, 1  # outcomes with at most k heads, of 2^n
    while 40 * tail_outcomes <= 2**count:
        k += 1
        tail_outcomes += math.comb(count, k)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[count - k])


def call_seconds(loss: Loss, inputs: Inputs) -> float:
    """Return the seconds of one forward and backward pass; the gradients stay on the leaves."""
    import torch

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
        import torch

        torch.cuda.synchronize()
