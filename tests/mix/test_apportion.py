"""Hold apportioning against a plain walk over rows in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
from slow_order import walk

from megatron_mode.mix.apportion import Apportionment, Supply


def points_of(pairs: list[tuple[int, Fraction]]) -> tuple[tuple[int, Fraction], ...]:
    return tuple(sorted(pairs, key=lambda pair: pair[0]))


weights = st.builds(Fraction, st.integers(0, 50), st.sampled_from([1, 3, 10, 1000]))
supplies = st.lists(
    st.builds(
        Supply,
        points=st.lists(
            st.tuples(st.sampled_from([0, 7, 60, 61, 200]), weights), min_size=1, max_size=4
        ).map(points_of),
        rows_max=st.one_of(st.none(), st.integers(0, 60)),
    ),
    min_size=1,
    max_size=5,
)


@given(supplies=supplies)
@settings(max_examples=100, deadline=None)
def test_dealing_equals_a_walk_over_rows(supplies: list[Supply]) -> None:
    part = Apportionment(supplies)
    truth = walk(supplies, 300)
    if len(truth) < 300:
        assert part.rows_max == len(truth)
    else:
        assert part.rows_max is None or part.rows_max >= 300
    source, sequence = part.take(0, len(truth))
    assert list(zip(source.tolist(), sequence.tolist(), strict=True)) == truth
    middle = len(truth) // 3
    source, sequence = part.take(middle, len(truth) - middle)
    assert list(zip(source.tolist(), sequence.tolist(), strict=True)) == truth[middle:]
    assert [part.mode_row(s, j) for s, j in truth] == list(range(len(truth)))
    for row in (0, middle, len(truth)):
        assert part.counts(row) == [
            sum(s == number for s, _ in truth[:row]) for number in range(len(supplies))
        ]


@given(
    weights=st.lists(st.integers(1, 10**18), min_size=2, max_size=6),
    first=st.integers(10**12 - 10**6, 10**12),
)
@settings(max_examples=50, deadline=None)
def test_shares_hold_far_out_with_long_weights(weights: list[int], first: int) -> None:
    part = Apportionment([Supply(((0, Fraction(w)),), None) for w in weights])
    left = first
    for number, count in enumerate(part.counts(first)):
        plan = Fraction(weights[number], sum(weights[number:])) * left
        assert count == math.floor(plan)  # each against the rest, over the rows the rest is left
        left -= count
    source, sequence = part.take(first, 50)
    back = [part.mode_row(s, j) for s, j in zip(source.tolist(), sequence.tolist(), strict=True)]
    assert back == list(range(first, first + 50))


def test_a_dry_source_hands_its_share_on_from_the_row_it_cannot_fill() -> None:
    """Shares 1/2, 1/4, 1/4; the first gives three rows, then the others alternate."""
    part = Apportionment(
        [Supply(((0, Fraction(w)),), m) for w, m in ((2, 3), (1, None), (1, None))]
    )
    source, _ = part.take(0, 13)
    assert source.tolist() == [2, 0, 1, 0, 2, 0, 1, 2, 1, 2, 1, 2, 1]
    assert part.phases[1].begin == 7
    assert part.dry == [(0, 7)]
