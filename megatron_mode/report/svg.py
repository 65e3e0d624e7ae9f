"""Lay out line charts for templates/figure.html: thinned curves, range bands, round ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

Point = tuple[float, float]
Dash = Literal["solid", "dashed", "dotted"]

CURVE_POINTS = 160  # about one a pixel pair at the width of a phone


@dataclass(frozen=True)
class Line:
    """Hold one curve; `band` is the outline of the values behind the points."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    dash: Dash = "solid"
    markers: bool = False
    band: Sequence[Point] = ()


@dataclass(frozen=True)
class Axis:
    """Describe an axis: label with unit, tick format, and bounds that the data may not shrink."""

    label: str
    text: Callable[[float], str]
    low: float | None = None
    high: float | None = None


class Entry(NamedTuple):
    """Hold an entry of a legend: a label, a value or a name in bold, and a sample of a curve."""

    label: str
    strong: str
    colour: str
    dash: Dash = "solid"
    markers: bool = False


@dataclass(frozen=True)
class Figure:
    """Hold a chart, a drawing of 420 by 250 pixels; every line has points."""

    title: str
    lines: Sequence[Line]
    x_axis: Axis
    y_axis: Axis
    legend: Sequence[Entry] = ()

    @cached_property
    def x(self) -> Scale:
        """Return the scale from left to right."""
        return Scale.over(
            [x for line in self.lines for x, _ in line.points], self.x_axis, (58, 406)
        )

    @cached_property
    def y(self) -> Scale:
        """Return the scale from bottom to top."""
        values = [y for line in self.lines for _, y in line.points]
        return Scale.over(values, self.y_axis, (210, 10), air=0.04)

    def path(self, points: Iterable[Point]) -> str:
        """Return points as SVG writes them."""
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)


@dataclass(frozen=True)
class Scale:
    """Map data to pixels with one decimal; the pixel `first` belongs to `low`."""

    axis: Axis
    low: float
    high: float
    first: int
    last: int

    @classmethod
    def over(
        cls, values: Sequence[float], axis: Axis, pixels: tuple[int, int], air: float = 0.0
    ) -> Scale:
        """Fit values and the axis's bounds; free ends get a share of air, but not across zero."""
        bounds = [bound for bound in (axis.low, axis.high) if bound is not None]
        low, high = min([*values, *bounds]), max([*values, *bounds])
        if not high > low:
            low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
        margin = air * (high - low)
        if axis.low != low:
            low = low - margin if low < 0 or low > margin else 0.0
        if axis.high != high:
            high += margin
        return cls(axis, low, high, *pixels)

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; what is outside stands at the end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)

    def ticks(self, most: int) -> list[float]:
        """Return at most `most` multiples of 1, 2 or 5 times a power of ten on the scale."""
        power = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        # The first step that is large enough; the one before had more than `most`, so one is there.
        for step in (power * k for k in (1, 2, 5, 10)):
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            if last - first < most:
                break
        return [index * step for index in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = CURVE_POINTS) -> Line:
    """Average runs of neighbouring points until at most `most` are left, and keep their range.

    The last point is an average too, so a curve's end reads as the level, not as one noisy step.
    """
    if len(points) <= most:
        return Line("", points)
    kept, upper, lower = [], [], []
    for part in stretches(points, most):
        x = sum(point[0] for point in part) / len(part)
        values = [point[1] for point in part]
        kept.append((x, sum(values) / len(values)))
        upper.append((x, max(values)))
        lower.append((x, min(values)))
    return Line("", kept, band=upper + lower[::-1])


def stretches(points: Sequence[Point], most: int) -> list[Sequence[Point]]:
    """Cut points into at most `most` runs of neighbours."""
    count = min(most, len(points))
    ends = [index * len(points) // count for index in range(count + 1)] if count else []
    return [points[begin:end] for begin, end in pairwise(ends)]


def short_number(value: float) -> str:
    """Write a number in at most about six characters: 2.5e-4, 0.05, 12, 1.5k, 20M."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}" if value else "0"


def percent(value: float) -> str:
    """Write a share as per cent."""
    return f"{100 * value:.4g}%"
