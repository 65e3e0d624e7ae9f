"""Compare implementations on one case: errors, then times in alternating rounds, then memory.

An implementation that fails is left out with one line on stderr.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from tqdm import tqdm

from megatron_mode.errors import ConfigError
from megatron_mode.kernels.bench.case import Case, Effort, MeasurementError, reason
from megatron_mode.kernels.bench.implementations import (
    CHUNKED,
    CHUNKED_WITHOUT_HEAD,
    Implementation,
)
from megatron_mode.kernels.bench.memory import extra_bytes_in_fresh_process
from megatron_mode.kernels.bench.problem import (
    Inputs,
    Truth,
    exact,
    grad_error,
    loss_error,
    make_inputs,
)
from megatron_mode.kernels.bench.timing import Interval, call_seconds, head_share, rotated

COLUMNS = (
    "implementation", "median s", "ratio", "min s", "calls", "extra MiB", "ratio", "loss error",
    "grad error",
)  # fmt: skip
NOTHING = "-"

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
        values: dict[str, Any] = {
            "name": self.name,
            "median_seconds": self.median_seconds,
            "min_seconds": min(self.seconds),
            "rounds": len(self.seconds),
            "extra_bytes": self.extra_bytes,
            "loss_error": self.loss_error,
            "grad_error": self.grad_error,
        }
        if self.mode_head_share is not None:
            values["mode_head_share"] = self.mode_head_share._asdict()
        return values


def compare(case: Case, implementations: Sequence[Implementation], effort: Effort) -> list[Row]:
    """Return a row for each implementation that ran, in the order given.

    Raises ConfigError for a shape that does not fit the memory.
    """
    inputs, truths = _inputs_and_truths(case)
    pairs = effort.head_rounds if {CHUNKED, CHUNKED_WITHOUT_HEAD} <= {*implementations} else 0
    calls = len(implementations) * (effort.rounds + 2) + 2 * pairs
    with tqdm(total=calls, desc=case.dtype, unit="call", leave=False, disable=None) as bar:
        rows = _warm_up(implementations, inputs, truths, bar)
        del truths
        _time_rounds(rows, inputs, effort, bar)
        if pairs and {CHUNKED.name, CHUNKED_WITHOUT_HEAD.name} <= {*rows}:
            rows[CHUNKED.name].mode_head_share = _attempt(
                "share of the mode head not measured",
                head_share,
                CHUNKED.loss,
                CHUNKED_WITHOUT_HEAD.loss,
                inputs,
                rounds=pairs,
                step=bar.update,
            )
        del inputs  # the measuring processes share the device and the machine
        if case.device == "cuda":
            torch.cuda.empty_cache()
        for row in rows.values():
            row.extra_bytes = _attempt(
                f"memory of {row.name} not measured",
                extra_bytes_in_fresh_process,
                row.implementation,
                case,
                short_warm_up=row.median_seconds > effort.limit_seconds,
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
            f"shape is {sizes}: accepted is one whose inputs and fp64 gradients fit the memory; "
            f"choose a smaller one ({reason(error)})"
        ) from error


def _warm_up(
    implementations: Sequence[Implementation],
    inputs: Inputs,
    truths: tuple[Truth, Truth],
    bar: tqdm[NoReturn],
) -> dict[str, Row]:
    """Call each implementation once, untimed, and hold the result against the truth."""
    with_head, lm_alone = truths
    rows = {}
    for implementation in implementations:
        truth = with_head if implementation.mode_head else lm_alone
        row = _attempt(
            f"{implementation.name} left out", _first_call, implementation, inputs, truth
        )
        if row is not None:
            rows[implementation.name] = row
        bar.update()
    return rows


def _first_call(implementation: Implementation, inputs: Inputs, truth: Truth) -> Row:
    inputs.clear_gradients()
    loss = implementation.loss(inputs)
    torch.autograd.backward(loss)
    row = Row(implementation, loss_error(loss, truth), grad_error(inputs, truth))
    if not (isfinite(row.loss_error) and isfinite(row.grad_error)):
        raise MeasurementError("its loss or a gradient is not finite")
    return row


def _time_rounds(rows: dict[str, Row], inputs: Inputs, effort: Effort, bar: tqdm[NoReturn]) -> None:
    """Call all implementations in turn, round after round; drop one that fails on the way."""
    for turn in range(effort.rounds):
        for name in rotated(list(rows), turn):
            if effort.allows_another(rows[name].seconds):
                seconds = _attempt(
                    f"{name} left out", call_seconds, rows[name].implementation.loss, inputs
                )
                if seconds is None:
                    del rows[name]
                else:
                    rows[name].seconds.append(seconds)
            bar.update()


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
        tqdm.write(f"{what}: {reason(error)}", file=sys.stderr)
        return None


def table(case: Case, rows: Sequence[Row]) -> str:
    """Return the table; the ratios of time and memory are to the peer with the least median."""
    peer = min(
        (row for row in rows if not row.implementation.ours),
        key=lambda row: row.median_seconds,
        default=None,
    )
    lines = [COLUMNS, *(_cells(row, peer) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = [_title(case, peer)]
    for first, *numbers in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        text.append("  ".join(cells))
    text += [
        f"mode head: {_share(row.mode_head_share)} of the time of {row.name} without it"
        for row in rows
        if row.mode_head_share is not None
    ]
    return "\n".join(text)


def _title(case: Case, peer: Row | None) -> str:
    tokens, hidden_size, vocab_size = case.shape
    where = f"{case.threads} threads" if case.device == "cpu" else "cuda"
    title = f"N={tokens} D={hidden_size} V={vocab_size}, {case.dtype}, {where}, forward + backward"
    return title if peer is None else f"{title}; ratios to {peer.name}, the fastest peer"


def _cells(row: Row, peer: Row | None) -> tuple[str, ...]:
    time_ratio = memory_ratio = memory = NOTHING
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


def _share(share: Interval) -> str:
    return f"{share.median:+.2%} (95 % interval {share.low:+.2%} to {share.high:+.2%})"
