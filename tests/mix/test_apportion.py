"""Hold apportioning against a plain walk over rows in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.mix.apportion import Apportionment, Supply


def walk(supplies: list[Supply], rows: int) -> list[tuple[int, int]]:
    """Deal row by row: each live source against the rest; stop where all are dry."""
    owed = [Fraction(0)] * len(supplies)  # planned rows of each source so far
    taken = [0] * len(supplies)
    live = set(range(len(supplies)))
    dealt: list[tuple[int, int]] = []
    while len(dealt) < rows and live:
        before = list(owed)
        for source in range(len(supplies)):
            rest = sum((supplies[s].weight for s in live if s >= source), Fraction(0))
            if source in live:
                owed[source] += supplies[source].weight / rest
                if math.floor(owed[source]) > math.floor(before[source]):
                    break
        limit = supplies[source].rows_max
        if limit is not None and taken[source] == limit:
            live.remove(source)
            owed = before
            continue
        dealt.append((source, taken[source]))
        taken[source] += 1
    return dealt


supplies = st.lists(
    st.builds(
        Supply,
        weight=st.builds(Fraction, st.integers(1, 50), st.sampled_from([1, 3, 10, 1000])),
        rows_max=st.one_of(st.none(), st.integers(0, 60)),
    ),
    min_size=1,
    max_size=5,
)


@given(supplies=supplies)
@settings(max_examples=60, deadline=None)
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
    part = Apportionment([Supply(Fraction(w), None) for w in weights])
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
    part = Apportionment([Supply(Fraction(w), m) for w, m in ((2, 3), (1, None), (1, None))])
    source, _ = part.take(0, 13)
    assert source.tolist() == [2, 0, 1, 0, 2, 0, 1, 2, 1, 2, 1, 2, 1]
    assert part.phases[1].begin == 7
    assert part.dry_order == [0]
