"""Compare implementations on one case: errors, then times in alternating rounds, then memory.

An implementation that fails is left out with one line on stderr.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ParamSpec, TypeVar

import torch
from tqdm import tqdm

from megatron_mode.command_line import aligned
from megatron_mode.errors import ConfigError
from megatron_mode.kernels.bench.implementations import (
    CHUNKED,
    CHUNKED_WITHOUT_HEAD,
    Implementation,
)
from megatron_mode.kernels.bench.measure import (
    Interval,
    call_seconds,
    extra_bytes_in_fresh_process,
    head_share,
)
from megatron_mode.kernels.bench.problem import (
    Case,
    Inputs,
    MeasurementError,
    Truth,
    errors,
    exact,
    make_inputs,
)

COLUMNS = (
    "implementation", "median s", "ratio", "min s", "calls", "extra MiB", "ratio", "loss error",
    "grad error",
)  # fmt: skip
REASON_CHARACTERS = 200
# Time for the timed calls of one implementation, which makes one in any case: bf16 is slow on a CPU
# without instructions for it.
LIMIT_SECONDS = 120

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass
class Row:
    """Collect what is measured of one implementation."""

    implementation: Implementation
    loss_error: float
    grad_error: float
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    """None: it could not be measured."""
    mode_head_share: Interval | None = None
    """Only on the row that the share was measured with."""

    @property
    def name(self) -> str:
        """Name of the implementation."""
        return self.implementation.name

    @property
    def median_seconds(self) -> float:
        """Median of the timed calls."""
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        """Return the row as an object of the JSON output."""
        share = self.mode_head_share
        return {
            "name": self.name,
            "median_seconds": self.median_seconds,
            "min_seconds": min(self.seconds),
            "rounds": len(self.seconds),
            "extra_bytes": self.extra_bytes,
            "loss_error": self.loss_error,
            "grad_error": self.grad_error,
        } | ({} if share is None else {"mode_head_share": share._asdict()})


def compare(
    case: Case, implementations: Sequence[Implementation], rounds: int, head_rounds: int
) -> list[Row]:
    """Return a row for each implementation that ran, in the order given.

    `rounds` counts the timed calls of each, `head_rounds` pairs of calls with and without the mode
    head. Raises ConfigError for a shape that does not fit the memory.
    """
    inputs, truths = _inputs_and_truths(case)
    pairs = head_rounds if {CHUNKED, CHUNKED_WITHOUT_HEAD} <= {*implementations} else 0
    calls = len(implementations) * (rounds + 2) + 2 * pairs
    rows: dict[str, Row] = {}
    with tqdm(total=calls, desc=case.dtype, unit="call", leave=False, disable=None) as bar:
        for one in implementations:
            truth = truths[0 if one.mode_head else 1]
            row = _attempt(f"{one.name} left out", _first_call, one, inputs, truth)
            if row is not None:
                rows[one.name] = row
            bar.update()
        del truths, truth
        for turn in range(rounds):
            for name in rotated(list(rows), turn):
                if allows_another(rows[name].seconds):
                    loss = rows[name].implementation.loss
                    seconds = _attempt(f"{name} left out", call_seconds, loss, inputs)
                    if seconds is None:
                        del rows[name]
                    else:
                        rows[name].seconds.append(seconds)
                bar.update()
        if pairs and {CHUNKED.name, CHUNKED_WITHOUT_HEAD.name} <= {*rows}:
            what, losses = "mode head not measured", (CHUNKED.loss, CHUNKED_WITHOUT_HEAD.loss)
            share = _attempt(what, head_share, *losses, inputs, rounds=pairs, step=bar.update)
            rows[CHUNKED.name].mode_head_share = share
        del inputs  # the measuring processes share the device and the machine
        if case.device == "cuda":
            torch.cuda.empty_cache()
        for row in rows.values():
            row.extra_bytes = _attempt(
                f"memory of {row.name} not measured",
                extra_bytes_in_fresh_process,
                row.implementation,
                case,
                short_warm_up=row.median_seconds > LIMIT_SECONDS,
            )
            bar.update()
    return list(rows.values())


def _inputs_and_truths(case: Case) -> tuple[Inputs, tuple[Truth, Truth]]:
    try:
        inputs = make_inputs(case)
        return inputs, exact(inputs)
    except (RuntimeError, MemoryError) as error:
        sizes = " ".join(map(str, case.shape))
        raise ConfigError(
            f"shape is {sizes}, but its inputs and fp64 gradients do not fit the memory: choose a "
            f"smaller one ({_reason(error)})"
        ) from error


def _first_call(implementation: Implementation, inputs: Inputs, truth: Truth) -> Row:
    """Call it once, untimed, and hold the result against the truth."""
    inputs.clear_gradients()
    loss = implementation.loss(inputs)
    torch.autograd.backward(loss)
    row = Row(implementation, *errors(loss, inputs, truth))
    if not (isfinite(row.loss_error) and isfinite(row.grad_error)):
        raise MeasurementError("its loss or a gradient is not finite")
    return row


def rotated(names: list[str], turn: int) -> list[str]:
    """Return the names in the order of one round, so that none is always the first."""
    first = turn % max(len(names), 1)
    return names[first:] + names[:first]


def allows_another(seconds: list[float]) -> bool:
    """Tell whether one more call like the slowest of those made stays within the limit."""
    return not seconds or sum(seconds) + max(seconds) <= LIMIT_SECONDS


def _attempt(
    what: str,
    function: Callable[Arguments, Result],
    *arguments: Arguments.args,
    **options: Arguments.kwargs,
) -> Result | None:
    """Return what the function returns; None where it fails, with the reason in one line."""
    try:
        return function(*arguments, **options)
    except Exception as error:  # whatever a peer raises
        tqdm.write(f"{what}: {_reason(error)}", file=sys.stderr)
        return None


def _reason(error: BaseException) -> str:
    """Return kind and first line of an error; of ours the message, which says it all."""
    lines = str(error).strip().splitlines() or ["no message"]
    kind = "" if isinstance(error, MeasurementError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:REASON_CHARACTERS]


def table(case: Case, rows: Sequence[Row]) -> str:
    """Return the table; the ratios of time and memory are to the peer with the least median."""
    peers = [row for row in rows if not row.implementation.ours]
    peer = min(peers, key=lambda row: row.median_seconds, default=None)
    tokens, hidden_size, vocab_size = case.shape
    where = f"{case.threads} threads" if case.device == "cpu" else "cuda"
    title = f"N={tokens} D={hidden_size} V={vocab_size}, {case.dtype}, {where}, forward + backward"
    if peer is not None:
        title += f"; ratios to {peer.name}, the fastest peer"
    lines = [title, aligned([COLUMNS, *(_cells(row, peer) for row in rows)])]
    for row in rows:
        if row.mode_head_share is not None:
            median, low, high = row.mode_head_share
            interval = f"95 % interval {low:+.2%} to {high:+.2%}"
            lines.append(f"mode head: {median:+.2%} ({interval}) of the time of {row.name} "
                         "without it")  # fmt: skip
    return "\n".join(lines)


def _cells(row: Row, peer: Row | None) -> tuple[str, ...]:
    time_ratio = memory_ratio = memory = "-"
    if peer is not None:
        time_ratio = f"{row.median_seconds / peer.median_seconds:.2f}"
    if row.extra_bytes is not None:
        memory = f"{row.extra_bytes / 2**20:.1f}"
        if peer is not None and peer.extra_bytes:
            memory_ratio = f"{row.extra_bytes / peer.extra_bytes:.2f}"
    return (
        row.name,
        f"{row.median_seconds:.4g}",
        time_ratio,
        f"{min(row.seconds):.4g}",
        str(len(row.seconds)),
        memory,
        memory_ratio,
        f"{row.loss_error:.1e}",
        f"{row.grad_error:.1e}",
    )
