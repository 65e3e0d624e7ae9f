"""Draw a line chart as inline SVG: thinned curves, range bands, round ticks, units on the axes.

Colours are CSS classes (`c0` to `c5`), so that one drawing serves a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

Point = tuple[float, float]
Dash = Literal["solid", "dashed", "dotted"]

CURVE_POINTS = 160  # about one a pixel pair at the width of a phone
_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 40


@dataclass(frozen=True)
class Line:
    """Hold one curve; `band` gives (x, lowest, highest) of the values behind each point."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    dash: Dash = "solid"
    markers: bool = False
    band: Sequence[tuple[float, float, float]] = field(default=())


@dataclass(frozen=True)
class Axis:
    """Describe an axis: label with unit, tick format, and bounds that the data may not shrink."""

    label: str
    text: Callable[[float], str]
    low: float | None = None
    high: float | None = None
    log2: bool = False


def thin(points: Sequence[Point], most: int = CURVE_POINTS) -> Line:
    """Average runs of neighbouring points until at most `most` are left, and keep their range.

    The last point is an average too, so a curve's end reads as the level, not as one noisy step.
    """
    if len(points) <= most:
        return Line("", points)
    kept, band = [], []
    for index in range(most):
        part = points[index * len(points) // most : (index + 1) * len(points) // most]
        x = sum(point[0] for point in part) / len(part)
        values = [point[1] for point in part]
        kept.append((x, sum(values) / len(values)))
        band.append((x, min(values), max(values)))
    return Line("", kept, band=band)


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


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    # The first step that is large enough; the one before had more than `most`, so one is inside.
    for step in (power * k for k in (1, 2, 5, 10)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [index * step for index in range(first, last + 1)]


def line_chart(lines: Sequence[Line], x_axis: Axis, y_axis: Axis) -> str:
    """Return an `<svg>` that scales with its box; lines without points are left out."""
    lines = [line for line in lines if line.points]
    x_values, y_values = ([p[i] for line in lines for p in line.points] for i in (0, 1))
    x_scale = _Scale.over(x_values, x_axis, (_LEFT, _WIDTH - _RIGHT), air=0.0)
    y_scale = _Scale.over(y_values, y_axis, (_HEIGHT - _BOTTOM, _TOP), air=0.04)
    body = [_grid(x_scale, y_scale, x_axis, y_axis)]
    body += [_band(line, x_scale, y_scale) for line in lines if line.band]
    body += [_curve(line, x_scale, y_scale, y_axis) for line in lines]
    label = escape(f"{y_axis.label} over {x_axis.label}", quote=True)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        + "".join(body)
        + "</svg>"
    )


@dataclass(frozen=True)
class _Scale:
    """Map data to pixels; the first pixel belongs to `low`."""

    low: float
    high: float
    first_pixel: float
    last_pixel: float
    log2: bool

    @classmethod
    def over(
        cls, values: Sequence[float], axis: Axis, pixels: tuple[float, float], air: float
    ) -> _Scale:
        if axis.log2:
            values = [math.log2(value) for value in values]
        bounds = [bound for bound in (axis.low, axis.high) if bound is not None]
        low, high = min([*values, *bounds], default=0.0), max([*values, *bounds], default=1.0)
        if not high > low:
            low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
        margin = air * (high - low)
        # Bounds the caller set are kept to the pixel; free ends get air, but not across zero.
        if axis.low != low:
            low = low - margin if low < 0 or low > margin else 0.0
        if axis.high != high:
            high += margin
        return cls(low, high, *pixels, axis.log2)

    def __call__(self, value: float) -> float:
        value = math.log2(value) if self.log2 else value
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.first_pixel + share * (self.last_pixel - self.first_pixel)

    def ticks(self, most: int) -> list[float]:
        if not self.log2:
            return ticks(self.low, self.high, most)
        exponents = range(math.ceil(self.low), math.floor(self.high) + 1)
        every = max(-(-len(exponents) // 10), 1)
        return [2.0**exponent for exponent in exponents[::every]]


def _grid(x_scale: _Scale, y_scale: _Scale, x_axis: Axis, y_axis: Axis) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in y_scale.ticks(8):
        y = y_scale(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(y_axis.text(value))}</text>"
        )
    for value in x_scale.ticks(7):
        x = x_scale(value)
        parts.append(f'<path class="tick" d="M{x:.1f} {bottom}v4"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{escape(x_axis.text(value))}</text>"
        )
    middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
    parts.append(f'<path class="tick" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(
        f'<text class="axis" x="{middle_x}" y="{_HEIGHT - 5}" text-anchor="middle">'
        f"{escape(x_axis.label)}</text>"
        f'<text class="axis" transform="translate(11 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_axis.label)}</text>"
    )
    return "".join(parts)


def _band(line: Line, x_scale: _Scale, y_scale: _Scale) -> str:
    upper = [f"{x_scale(x):.1f},{y_scale(high):.1f}" for x, _, high in line.band]
    lower = [f"{x_scale(x):.1f},{y_scale(low):.1f}" for x, low, _ in reversed(line.band)]
    return f'<polygon class="band c{line.colour}" points="{" ".join(upper + lower)}"/>'


def _curve(line: Line, x_scale: _Scale, y_scale: _Scale, y_axis: Axis) -> str:
    pixels = [(x_scale(x), y_scale(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    drawn = f'<polyline class="curve {line.dash}" points="{path}"/>'
    parts = [drawn] if len(pixels) > 1 else []
    if line.markers or len(pixels) == 1:
        for (x, y), (_, value) in zip(pixels, line.points, strict=True):
            title = escape(f"{line.label}: {y_axis.text(value)}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{title}</title></circle>')
    return f'<g class="c{line.colour}">{"".join(parts)}</g>'
