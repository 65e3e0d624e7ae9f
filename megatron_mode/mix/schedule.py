"""Schedule the share of Mode 2 rows and integrate it exactly.

A schedule is a list of segments on which the share f is a line or half a cosine wave. F, the
integral of f over rows from the start of the run, is a rational number at the end of each segment,
so an error never travels from one segment to the next:

    line    F = area + start*d + (stop - start)*d*d / (2*L)
    cosine  F = area + (start + stop)/2*d - (stop - start)/2 * L/pi * sin(pi*d/L)

with d rows since the segment's begin and L its length in rows. On lines, floor(F) is decided in
exact integers. On cosines it is decided in float64 with the bound stated at `_cosine_floors`, and
within the bound in 60-digit decimals.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction
from typing import assert_never

import numpy as np

from megatron_mode.config.mix import Mode2FractionConfig
from megatron_mode.mix.floors import IntArray, floor_quadratic, settle

DIGITS = 60
UNDECIDED = Decimal("1e-40")
PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803"
)


@dataclass(frozen=True)
class Segment:
    """Hold one piece of a schedule: share `start` at `begin`, `stop` at `end` (None: endless)."""

    begin: Fraction
    end: Fraction | None
    start: Fraction
    stop: Fraction
    area: Fraction
    cosine: bool = False


def segments(
    config: Mode2FractionConfig, total_tokens: int, seq_len: int = 1
) -> tuple[Segment, ...]:
    """Cut a schedule into segments; begin, end and area are in units of `seq_len` tokens."""
    knots = _knots(config, total_tokens)
    cosine = config.shape == "cosine"
    pieces: list[Segment] = []
    area = Fraction(0)
    for (begin, start), (end, stop) in itertools.pairwise(knots):
        if begin == end:
            continue
        a, b = Fraction(begin, seq_len), Fraction(end, seq_len)
        pieces.append(Segment(a, b, start, stop, area, cosine and start != stop))
        area += (start + stop) / 2 * (b - a)
    last_begin, last_share = knots[-1]
    pieces.append(Segment(Fraction(last_begin, seq_len), None, last_share, last_share, area))
    return tuple(pieces)


def resolved_end_tokens(config: Mode2FractionConfig, total_tokens: int) -> int:
    """Return the tokens seen at which a ramp ends: the end of the run where it is not set."""
    return total_tokens if config.end_tokens is None else config.end_tokens


def _knots(config: Mode2FractionConfig, total_tokens: int) -> list[tuple[int, Fraction]]:
    """List (tokens, share) from token 0 on; two knots at the same token are a jump.

    The rules of config/mix_rules.py hold: a ramp has an end after its begin, a table rises.
    """
    start, begin_tokens = Fraction(config.start), config.begin_tokens
    match config.shape:
        case "constant":
            return [(0, start)]
        case "piecewise":
            table = [(at, Fraction(share)) for at, share in config.points]
            return table if table[0][0] == 0 else [(0, table[0][1]), *table]
        case "step":
            assert config.end is not None
            return [(0, start), (begin_tokens, start), (begin_tokens, Fraction(config.end))]
        case "linear" | "cosine":
            end_tokens = resolved_end_tokens(config, total_tokens)
            assert config.end is not None
            assert begin_tokens <= end_tokens
            return [(0, start), (begin_tokens, start), (end_tokens, Fraction(config.end))]
    assert_never(config.shape)


class Integral:
    """Integrate a schedule over rows: F(i) is the planned number of Mode 2 rows before row i."""

    def __init__(self, config: Mode2FractionConfig, seq_len: int, total_rows: int) -> None:
        """Cut the schedule at its kinks; `seq_len` is tokens in a row."""
        self.segments = segments(config, total_rows * seq_len, seq_len)
        self._begins = [piece.begin for piece in self.segments]

    def planned(self, row: int) -> float:
        """Return F(row), rounded once to float64."""
        piece = self.segments[self._segment_of(row)]
        rational, wave = _value(piece, row)
        if wave is None:
            return float(rational)
        with localcontext(Context(prec=DIGITS)):
            return float(_decimal(rational) - wave)

    def mode2_rows(self, row: int) -> int:
        """Return floor(F(row)), the number of Mode 2 rows before `row`, exactly."""
        return _exact_floor(self.segments[self._segment_of(row)], row)

    def mode2_rows_window(self, begin_row: int, end_row: int) -> IntArray:
        """Return floor(F(i)) for i = begin_row .. end_row, both included, exactly.

        Meant for windows of up to some 10,000 rows: float64's error grows with the window's
        length, not with the row index.
        """
        parts: list[IntArray] = []
        row = begin_row
        while row <= end_row:
            index = self._segment_of(row)
            last = end_row
            if index + 1 < len(self.segments):
                last = min(last, math.ceil(self._begins[index + 1]) - 1)
            parts.append(_floors(self.segments[index], row, last - row))
            row = last + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def row_of(self, mode: int, mode_row: int, total_rows: int) -> int:
        """Return the index of row number `mode_row` (from 0) of a mode, by bisection.

        Raises ValueError where the first `total_rows` rows hold fewer rows of the mode.
        """
        low, high = 0, total_rows
        while low < high:
            middle = (low + high) // 2
            taken = self.mode2_rows(middle + 1)
            if mode == 1:
                taken = middle + 1 - taken
            low, high = (low, middle) if taken > mode_row else (middle + 1, high)
        if low == total_rows:
            raise ValueError(f"mode {mode} has no row {mode_row} in {total_rows} rows")
        return low

    def _segment_of(self, row: int) -> int:
        return bisect_right(self._begins, row) - 1


def _floors(piece: Segment, row: int, count: int) -> IntArray:
    """Return floor(F) at `row` .. `row + count`, all of them in one segment."""
    if piece.cosine:
        return _cosine_floors(piece, row, count)
    slope, curve = piece.start, Fraction(0)
    if piece.end is not None and piece.start != piece.stop:
        curve = (piece.stop - piece.start) / (2 * (piece.end - piece.begin))
        slope += 2 * curve * (row - piece.begin)
    return floor_quadratic(_value(piece, row)[0], slope, curve, count)


def _cosine_floors(piece: Segment, row: int, count: int) -> IntArray:
    """Return floor(F) on a cosine segment.

    With d = row - begin, F(row + k) - F(row) is, free of cancellation,
    (start + stop)/2*k - (stop - start)*L/pi * cos(pi*(2*d + k)/(2*L)) * sin(pi*k/(2*L)).
    Both terms are at most k, and sin and cos err by a few units in the last place, so float64 is
    within (k + 1) * 2**-48 of the truth: 1.2e-10 rows at the end of a window of 32,768.
    """
    assert piece.end is not None
    length = float(piece.end - piece.begin)
    anchor = _exact_floor(piece, row)
    rational, wave = _value(piece, row)
    with localcontext(Context(prec=DIGITS)):
        rest = float(_decimal(rational - anchor) - (wave or 0))
    k = np.arange(count + 1, dtype=np.float64)
    half_angle = k * (math.pi / (2 * length))
    phase = math.pi * float((row - piece.begin) / (piece.end - piece.begin))
    swing = float(piece.stop - piece.start) * length / math.pi
    approximation = rest + k * float((piece.start + piece.stop) / 2)
    approximation -= swing * np.cos(half_angle + phase) * np.sin(half_angle)
    bound = math.ldexp(count + 1, -48)
    return settle(approximation, bound, lambda at: _exact_floor(piece, row + at) - anchor) + anchor


def _value(piece: Segment, row: int) -> tuple[Fraction, Decimal | None]:
    """Return F(row) as a rational and, inside a cosine, the wave to subtract from it."""
    d = row - piece.begin
    if piece.end is None or piece.start == piece.stop:
        return piece.area + piece.start * d, None
    length, rise = piece.end - piece.begin, piece.stop - piece.start
    if not piece.cosine:
        return piece.area + piece.start * d + rise * d * d / (2 * length), None
    rational = piece.area + (piece.start + piece.stop) / 2 * d
    if d == 0:
        return rational, None
    with localcontext(Context(prec=DIGITS)):
        # sin(pi - x) = sin(x) keeps the series short and the argument's error small.
        wave = _sin(PI * _decimal(min(d, length - d) / length))
        return rational, wave * _decimal(rise * length / 2) / PI


def _exact_floor(piece: Segment, row: int) -> int:
    """Return floor(F(row)), exactly: F is irrational inside a cosine, so 60 digits decide it."""
    rational, wave = _value(piece, row)
    if wave is None:
        return math.floor(rational)
    with localcontext(Context(prec=DIGITS)):
        value = _decimal(rational) - wave
        floor = value.to_integral_value(ROUND_FLOOR)
        rest = value - floor
        assert UNDECIDED < rest < 1 - UNDECIDED, "60 digits do not decide this row"
    return int(floor)


def _decimal(value: Fraction) -> Decimal:
    """Round a fraction to the current decimal context."""
    return Decimal(value.numerator) / Decimal(value.denominator)


def _sin(angle: Decimal) -> Decimal:
    """Sum the sine's Taylor series in the current decimal context; 0 <= angle <= pi/2."""
    term = total = angle
    square = angle * angle
    order = 1
    while abs(term) > abs(total).scaleb(-DIGITS - 2):
        order += 2
        term = -term * square / (order * (order - 1))
        total += term
    return total
