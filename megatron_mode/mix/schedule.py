"""Schedule the share of Mode 2 rows and integrate it exactly.

A schedule is a list of segments on which the share f is a line or half a cosine wave. F, the
integral of f over rows from the start of the run, is a rational number at the end of each segment,
so an error never travels from one segment to the next:

    line    F = area + start*d + curve*d*d, curve = (stop - start) / (2*L)
    cosine  F = area + (start + stop)/2*d - (stop - start)/2 * L/pi * sin(pi*d/L)

with d rows since the segment's begin and L its length in rows. On lines, floor(F) is decided in
exact integers. On cosines it is decided in float64 with the bound stated at `_cosine_floors`, and
within the bound in 60-digit decimals.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction
from typing import Literal, NamedTuple, assert_never

import numpy as np

from megatron_mode.config.mix import Mode2FractionConfig, Shape
from megatron_mode.mix.floors import IntArray, floor_quadratic, settle

DIGITS = 60
UNDECIDED = Decimal("1e-40")
PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803"
)


Form = Literal["line", "cosine"]


class Segment(NamedTuple):
    """Hold one piece of a schedule: share `start` at row `begin`, `stop` after `length` rows.

    The last piece is endless and constant; its length is 0. `area` is F at the begin.
    """

    begin: Fraction
    length: Fraction
    start: Fraction
    stop: Fraction
    area: Fraction
    form: Form

    @property
    def curve(self) -> Fraction:
        """Return the coefficient of d*d on a line."""
        return (self.stop - self.start) / (2 * self.length) if self.length else Fraction(0)


def resolved_end_tokens(config: Mode2FractionConfig, total_tokens: int) -> int:
    """Return the tokens seen at which a ramp ends: the end of the run where it is not set."""
    return total_tokens if config.end_tokens is None else config.end_tokens


def _knots(config: Mode2FractionConfig, total_tokens: int) -> list[tuple[int, Fraction]]:
    """List (tokens, share) from token 0 on; two knots at the same token are a jump.

    The rules of the config hold: a ramp has an end after its begin, a table rises.
    """
    start = Fraction(config.start)
    knots = [(0, start), (config.begin_tokens, start)]
    match config.shape:
        case "constant":
            return knots[:1]
        case "piecewise":
            table = [(at, Fraction(share)) for at, share in config.points]
            return [(0, table[0][1]), *table]
        case "step":
            assert config.end is not None
            return [*knots, (config.begin_tokens, Fraction(config.end))]
        case "linear" | "cosine":
            assert config.end is not None
            return [*knots, (resolved_end_tokens(config, total_tokens), Fraction(config.end))]
    assert_never(config.shape)


def _form(shape: Shape) -> Form:
    """Return the form of a shape's pieces; both cover (start + stop) / 2 of their length."""
    match shape:
        case "constant" | "piecewise" | "step" | "linear":
            return "line"
        case "cosine":
            return "cosine"
    assert_never(shape)


class Integral:
    """Integrate a schedule over rows: F(i) is the planned number of Mode 2 rows before row i."""

    def __init__(self, config: Mode2FractionConfig, seq_len: int, total_rows: int) -> None:
        """Cut the schedule of a run of so many rows of `seq_len` tokens at its kinks."""
        self.total_rows = total_rows
        knots = _knots(config, total_rows * seq_len)
        self.segments: list[Segment] = []
        area, zero = Fraction(0), Fraction(0)
        for (begin, start), (end, stop) in itertools.pairwise(knots):
            if begin < end:
                length = Fraction(end - begin, seq_len)
                form: Form = _form(config.shape) if start != stop else "line"
                at = Fraction(begin, seq_len)
                self.segments.append(Segment(at, length, start, stop, area, form))
                area += (start + stop) / 2 * length
        at, last = Fraction(knots[-1][0], seq_len), knots[-1][1]
        self.segments.append(Segment(at, zero, last, last, area, "line"))
        self._begins = [piece.begin for piece in self.segments]

    def planned(self, row: int) -> float:
        """Return F(row), rounded once to float64."""
        rational, wave = _value(self._segment_of(row), row)
        if wave is None:
            return float(rational)
        with localcontext(Context(prec=DIGITS)):
            return float(_decimal(rational) - wave)

    def mode_rows(self, mode: int, row: int) -> int:
        """Return the number of rows of a mode before row `row` of the run, exactly."""
        mode2_rows = _exact_floor(self._segment_of(row), row)
        return mode2_rows if mode == 2 else row - mode2_rows

    def mode2_rows_window(self, begin_row: int, end_row: int) -> IntArray:
        """Return floor(F(i)) for i = begin_row .. end_row, both included, exactly.

        Meant for windows of up to some 10,000 rows: float64's error grows with the window's
        length, not with the row index.
        """
        parts: list[IntArray] = []
        row = begin_row
        while row <= end_row:
            number = bisect_right(self._begins, row)
            nexts = (math.ceil(begin) - 1 for begin in self._begins[number : number + 1])
            last = min([end_row, *nexts])
            parts.append(_floors(self.segments[number - 1], row, last - row))
            row = last + 1
        return np.concatenate(parts)

    def row_of(self, mode: int, mode_row: int) -> int:
        """Return the index of row number `mode_row` (from 0) of a mode, by bisection.

        Raises ValueError where the run holds fewer rows of the mode.
        """
        rows = range(self.total_rows)
        row = bisect_right(rows, mode_row, key=lambda row: self.mode_rows(mode, row + 1))
        if row == self.total_rows:
            raise ValueError(f"mode {mode} has no row {mode_row} in {row} rows")
        return row

    def _segment_of(self, row: int) -> Segment:
        return self.segments[bisect_right(self._begins, row) - 1]


def _floors(piece: Segment, row: int, count: int) -> IntArray:
    """Return floor(F) at `row` .. `row + count`, all of them in one segment."""
    match piece.form:
        case "line":
            slope = piece.start + 2 * piece.curve * (row - piece.begin)
            return floor_quadratic(_value(piece, row)[0], slope, piece.curve, count)
        case "cosine":
            return _cosine_floors(piece, row, count)
    assert_never(piece.form)


def _cosine_floors(piece: Segment, row: int, count: int) -> IntArray:
    """Return floor(F) on a cosine segment.

    With d = row - begin, F(row + k) - F(row) is, free of cancellation,
    (start + stop)/2*k - (stop - start)*L/pi * cos(pi*(2*d + k)/(2*L)) * sin(pi*k/(2*L)).
    Both terms are at most k, and sin and cos err by a few units in the last place, so float64 is
    within (k + 1) * 2**-48 of the truth: 1.2e-10 rows at the end of a window of 32,768.
    """
    length = float(piece.length)
    anchor = _exact_floor(piece, row)
    rational, wave = _value(piece, row)
    with localcontext(Context(prec=DIGITS)):
        rest = float(_decimal(rational - anchor) - (wave or 0))
    k = np.arange(count + 1, dtype=np.float64)
    half_angle = k * (math.pi / (2 * length))
    phase = math.pi * float((row - piece.begin) / piece.length)
    swing = float(piece.stop - piece.start) * length / math.pi
    approximation = rest + k * float((piece.start + piece.stop) / 2)
    approximation -= swing * np.cos(half_angle + phase) * np.sin(half_angle)
    bound = math.ldexp(count + 1, -48)
    return settle(approximation, bound, lambda at: _exact_floor(piece, row + at) - anchor) + anchor


def _value(piece: Segment, row: int) -> tuple[Fraction, Decimal | None]:
    """Return F(row) as a rational and, inside a cosine, the wave to subtract from it."""
    d = row - piece.begin
    match piece.form:
        case "line":
            return piece.area + (piece.start + piece.curve * d) * d, None
        case "cosine":
            rational = piece.area + (piece.start + piece.stop) / 2 * d
            return rational, _wave(piece, d) if d else None
    assert_never(piece.form)


def _wave(piece: Segment, d: Fraction) -> Decimal:
    """Return (stop - start)/2 * L/pi * sin(pi*d/L)."""
    with localcontext(Context(prec=DIGITS)):
        # sin(pi - x) = sin(x) keeps the series short and the argument's error small.
        wave = _sin(PI * _decimal(min(d, piece.length - d) / piece.length))
        return wave * _decimal((piece.stop - piece.start) * piece.length / 2) / PI


def _exact_floor(piece: Segment, row: int) -> int:
    """Return floor(F(row)), exactly: F is irrational inside a cosine, so 60 digits decide it."""
    rational, wave = _value(piece, row)
    if wave is None:
        return math.floor(rational)
    with localcontext(Context(prec=DIGITS)):
        value = _decimal(rational) - wave
        floor = value.to_integral_value(ROUND_FLOOR)
        assert UNDECIDED < value - floor < 1 - UNDECIDED, "60 digits do not decide this row"
    return int(floor)


def _decimal(value: Fraction) -> Decimal:
    """Round a fraction to the current decimal context."""
    return Decimal(value.numerator) / Decimal(value.denominator)


def _sin(angle: Decimal) -> Decimal:
    """Sum the sine's Taylor series in the current decimal context; 0 <= angle <= pi/2."""
    term = total = angle
    square, order = angle * angle, 1
    while abs(term) > abs(total).scaleb(-DIGITS - 2):
        order += 2
        term = -term * square / (order * (order - 1))
        total += term
    return total
