from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_mode.report.render import render
from megatron_mode.report.svg import Axis, Figure, Line, Scale, short_number, thin


def line_chart(lines, x_axis, y_axis):
    return render("figure.html", figure=Figure("chart", lines, x_axis, y_axis))


numbers = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(numbers, st.floats(1e-6, 1e9), st.integers(3, 9))
@example(1.0, 400000001.0, 3)
def test_ticks_are_few_round_and_inside(low, span, most):
    high = low + span
    if high <= low or span / max(abs(low), 1e-300) < 1e-9:
        return
    found = Scale(Axis("x", short_number), low, high, 0, 100).ticks(most)
    slack = 1e-6 * span
    assert 1 <= len(found) <= most
    assert all(low - slack <= tick <= high + slack for tick in found)
    if len(found) > 1:
        step = span_of = (found[-1] - found[0]) / (len(found) - 1)
        leading = span_of / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(leading - k) for k in (1, 2, 5, 10)) < 1e-3


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=700), st.integers(1, 200))
def test_thinning_keeps_the_mean_and_the_range(values, most):
    points = [(float(index), value) for index, value in enumerate(values)]
    line = thin(points, most)
    assert len(line.points) == min(len(values), most)
    if line.band:
        upper, lower = line.band[:most], line.band[: most - 1 : -1]
        assert min(low for _, low in lower) == min(values)
        assert max(high for _, high in upper) == max(values)
        for (x, y), (low_x, low), (high_x, high) in zip(line.points, lower, upper, strict=True):
            assert x == low_x == high_x
            assert low - 1e-9 <= y <= high + 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.5e-4, "2.5e-4"), (0.05, "0.05"), (12.0, "12"), (1500, "1.5k"), (2e7, "20M"),
     (-3e9, "-3B"), (7e12, "7T")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short_number(value) == text


def test_ticks_stand_where_the_curve_has_their_value():
    drawn = line_chart(
        [Line("all", [(x, 3.0 + x) for x in range(9)])],
        Axis("tokens", short_number),
        Axis("loss", short_number),
    )
    points = [
        tuple(map(float, p.split(","))) for p in re.search(r'points="(.*?)"', drawn)[1].split()
    ]
    labels = re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" dy="\d+" text-anchor="(\w+)">(\d+)<', drawn
    )
    assert len(labels) > 8
    for x, y, anchor, text in labels:
        index = int(text) if anchor == "middle" else int(text) - 3
        if anchor == "middle":
            assert points[index][0] == pytest.approx(float(x), abs=0.06)
        else:
            assert points[index][1] == pytest.approx(float(y), abs=0.06)


@pytest.mark.parametrize("value", [0.0, 1.0, -5.0, 1e-9, 1e11])
def test_a_flat_line_is_drawn(value):
    drawn = line_chart(
        [Line("flat", [(1.0, value), (2.0, value)])],
        Axis("tokens", short_number),
        Axis("loss", short_number),
    )
    assert "nan" not in drawn
    assert "polyline" in drawn
