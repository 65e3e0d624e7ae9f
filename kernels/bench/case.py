"""Say what is compared: shape, dtype, device, time limit; and why something was not measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

REASON_CHARACTERS = 200
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Dtypes of hidden states and weights, by the name on the command line."""


class Shape(NamedTuple):
    """Hold the sizes of the problem."""

    tokens: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Case:
    """Name one table of the benchmark."""

    shape: Shape
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True)
class Effort:
    """Bound the time of a case."""

    rounds: int
    """Timed calls of each implementation."""
    head_rounds: int
    """Pairs of calls with and without the mode head; 0 leaves them out."""
    limit_seconds: float
    """Time for the timed calls of one implementation; at least one call is made."""

    def allows_another(self, seconds: list[float]) -> bool:
        """Tell whether one more call like the slowest of those made stays within the limit."""
        return not seconds or sum(seconds) + max(seconds) <= self.limit_seconds


class MeasurementError(RuntimeError):
    """Report that a measurement gave no usable number; the message is the reason."""


def reason(error: BaseException) -> str:
    """Return kind and first line of an error; of ours the message, which says it all."""
    lines = str(error).strip().splitlines() or ["no message"]
    kind = "" if isinstance(error, MeasurementError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:REASON_CHARACTERS]
