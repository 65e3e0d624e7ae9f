"""Hold the integral against slow oracles: exact midpoint sums and 60-digit quadrature."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import get_args

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.config.mix import Mode2FractionConfig, Shape
from megatron_mode.mix.schedule import Integral

TRILLION = 10**12
LINES, CURVES = ("constant", "linear", "step", "piecewise"), ("cosine",)


def oracle_fraction(config: Mode2FractionConfig, x: Fraction, total_tokens: int) -> Fraction:
    """Integrate the share; for a cosine the caller must not be inside the ramp."""
    start = Fraction(config.start)
    if config.shape == "constant":
        return start
    if config.shape == "piecewise":
        points = [(at, Fraction(v)) for at, v in config.points]
        if x <= points[0][0]:
            return points[0][1]
        for (a, v), (b, w) in itertools.pairwise(points):
            if a <= x <= b:
                return v + (w - v) * Fraction(x - a) / (b - a)
        return points[-1][1]
    stop, begin = Fraction(config.end), config.begin_tokens
    if config.shape == "step":
        return stop if x >= begin else start
    end = total_tokens if config.end_tokens is None else config.end_tokens
    if x <= begin:
        return start
    return stop if x >= end else start + (stop - start) * Fraction(x - begin) / (end - begin)


def oracle_floor(config: Mode2FractionConfig, row: int, seq_len: int, total_tokens: int) -> int:
    """Integrate between the kinks: the midpoint rule is exact on lines."""
    kinks = {0, row * seq_len, config.begin_tokens}
    kinks |= {total_tokens if config.end_tokens is None else config.end_tokens}
    if config.shape == "piecewise":
        kinks |= {point[0] for point in config.points}
    edges = sorted(k for k in kinks if k <= row * seq_len)
    area = Fraction(0)
    wave = mpmath.mpf(0)
    for a, b in itertools.pairwise(edges):
        middle = Fraction(a + b, 2)
        value = oracle_fraction(config, middle, total_tokens) * (b - a)
        end = total_tokens if config.end_tokens is None else config.end_tokens
        ramp = config.shape == "cosine" and config.start != config.end
        if ramp and config.begin_tokens <= a < b <= end:
            if b == end:
                value = (Fraction(config.start) + Fraction(config.end)) / 2 * (b - a)
            else:
                value = Fraction(0)
                wave = oracle_ramp(config, b, end) / seq_len
        area += value / seq_len
    total = wave + mpmath.mpf(area.numerator) / area.denominator
    return int(mpmath.floor(total)) if wave else math.floor(area)


def oracle_ramp(config: Mode2FractionConfig, upto: int, end: int) -> mpmath.mpf:
    """Integrate the cosine ramp from its begin by Gauss-Legendre quadrature, no closed form."""
    start, stop = mpmath.mpf(str(config.start)), mpmath.mpf(str(config.end))
    length = end - config.begin_tokens

    def share(u: mpmath.mpf) -> mpmath.mpf:
        return start + (stop - start) * (1 - mpmath.cos(mpmath.pi * u)) / 2

    part = mpmath.mpf(upto - config.begin_tokens) / length
    return mpmath.quad(share, mpmath.linspace(0, part, 3), method="gauss-legendre") * length


def decimals(digits: int) -> st.SearchStrategy[Decimal]:
    return st.integers(0, 10**digits).map(lambda n: Decimal(n).scaleb(-digits))


def test_every_shape_meets_an_oracle() -> None:
    assert sorted(LINES + CURVES) == sorted(get_args(Shape))


@st.composite
def schedules(draw: st.DrawFn, shapes: tuple[str, ...]) -> Mode2FractionConfig:
    shape = draw(st.sampled_from(shapes))
    share = decimals(draw(st.sampled_from([1, 2, 5, 17])))
    reach = draw(st.sampled_from([200, 10**6, 10**15]))
    points = draw(st.lists(st.integers(0, reach), min_size=1, max_size=4, unique=True))
    marks = sorted(draw(st.lists(st.integers(0, reach), min_size=2, max_size=2)))
    return Mode2FractionConfig(
        shape=shape,
        start=draw(share),
        end=draw(share),
        begin_tokens=marks[0],
        end_tokens=draw(st.sampled_from([marks[1], None])) if marks[0] == 0 else marks[1],
        points=tuple((at, draw(share)) for at in sorted(points)),
    )


def check(config: Mode2FractionConfig, begin: int, count: int, seq_len: int) -> None:
    total_rows = begin + count + 50
    integral = Integral(config, seq_len, total_rows)
    window = integral.mode2_rows_window(begin, begin + count)
    truth = [
        oracle_floor(config, row, seq_len, total_rows * seq_len)
        for row in range(begin, begin + count + 1)
    ]
    assert window.tolist() == truth
    assert [integral.mode_rows(2, begin + k) for k in range(count + 1)] == truth


@given(
    config=schedules(LINES),
    begin=st.one_of(st.integers(0, 300), st.integers(TRILLION - 10**6, TRILLION)),
    seq_len=st.sampled_from([1, 7, 128, 4096]),
)
@settings(max_examples=150, deadline=None)
def test_rational_floors_equal_exact_midpoint_sums(
    config: Mode2FractionConfig, begin: int, seq_len: int
) -> None:
    check(config, begin, 40, seq_len)


@given(
    config=schedules(CURVES),
    begin=st.one_of(st.integers(0, 300), st.integers(10**11, TRILLION)),
    seq_len=st.sampled_from([1, 128, 4096]),
)
@settings(max_examples=15, deadline=None)
def test_cosine_floors_equal_quadrature(
    config: Mode2FractionConfig, begin: int, seq_len: int
) -> None:
    with mpmath.workdps(60):
        check(config, begin, 3, seq_len)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("begin", [0, 1, TRILLION // 2 - 2, TRILLION - 30_000])
def test_long_windows_near_hits_equal_single_rows(shape: str, begin: int) -> None:
    """A slope near 1/2 and whole anchors: float64 alone cannot tell these floors."""
    config = Mode2FractionConfig(shape=shape, start=Decimal("0.5"), end=Decimal(0))
    integral = Integral(config, 4096, TRILLION)
    window = integral.mode2_rows_window(begin, begin + 3000)
    assert window.tolist() == [integral.mode_rows(2, begin + k) for k in range(3001)]


def test_float_path_with_long_decimals_is_exact() -> None:
    share = Decimal("0.50000000000000000000000001")
    integral = Integral(Mode2FractionConfig(start=share), 1, TRILLION)
    begin = TRILLION - 500
    truth = [int(share.scaleb(26)) * (begin + k) // 10**26 for k in range(501)]
    assert integral.mode2_rows_window(begin, TRILLION).tolist() == truth


def test_a_row_across_a_step_counts_its_parts() -> None:
    """Step at token 15 of rows of 10: row 1 is half Mode 1, half Mode 2."""
    config = Mode2FractionConfig(shape="step", start=Decimal(0), end=Decimal(1), begin_tokens=15)
    integral = Integral(config, 10, 4)
    assert [integral.planned(row) for row in range(5)] == [0, 0, 0.5, 1.5, 2.5]
    assert integral.mode2_rows_window(0, 4).tolist() == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_planned_is_the_integral_of_the_share(shape: str) -> None:
    config = Mode2FractionConfig(
        shape=shape, start=Decimal("0.1"), end=Decimal("0.7"), begin_tokens=304, end_tokens=1904
    )
    integral = Integral(config, 8, 300)
    part = np.clip((8 * np.arange(300) + 4 - 304) / 1600, 0, 1)
    weight = part if shape == "linear" else (1 - np.cos(np.pi * part)) / 2
    planned = np.diff([integral.planned(row) for row in range(301)])
    np.testing.assert_allclose(planned, 0.1 + 0.6 * weight, atol=2e-5)


def test_piecewise_is_flat_outside_its_table() -> None:
    points = ((100, Decimal("0.2")), (200, Decimal("0.6")))
    integral = Integral(Mode2FractionConfig(shape="piecewise", points=points), 1, 1000)
    planned = np.diff([integral.planned(row) for row in range(1001)])
    assert planned[[0, 99, 200, 999]] == pytest.approx([0.2, 0.2, 0.6, 0.6])
    assert planned[149:151].mean() == pytest.approx(0.4)


def test_row_of_inverts_the_count() -> None:
    config = Mode2FractionConfig(shape="cosine", start=Decimal("0.1"), end=Decimal("0.9"))
    integral = Integral(config, 16, 700)
    floors = integral.mode2_rows_window(0, 700)
    mode2 = np.flatnonzero(np.diff(floors)).tolist()
    mode1 = np.flatnonzero(np.diff(floors) == 0).tolist()
    assert [integral.row_of(2, m) for m in range(len(mode2))] == mode2
    assert [integral.row_of(1, m) for m in range(len(mode1))] == mode1
    with pytest.raises(ValueError, match="mode 2 has no row"):
        integral.row_of(2, len(mode2))
