"""Hold placements against a list of rows from which each level takes its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.errors import ConfigError
from megatron_mode.mix.edits.placement import Explicit, Placements, add_cohort


def explicit_at(rows: list[int]) -> Explicit:
    numbers = np.arange(len(rows), dtype=np.int64)
    return Explicit(np.array(sorted(rows), np.int64), numbers % 3, numbers * 7)


windows = st.tuples(st.integers(0, 180), st.integers(1, 120), st.floats(0, 1))


@given(st.sets(st.integers(0, 250), max_size=12), st.lists(windows, max_size=4))
@settings(max_examples=150, deadline=None)
def test_levels_equal_taking_from_a_list(
    rows: set[int], cohorts: list[tuple[int, int, float]]
) -> None:
    total = 320
    placements = Placements(explicit_at(sorted(rows)))
    truth: dict[int, tuple[int, int, int]] = {}
    for number, row in enumerate(sorted(rows)):
        truth[row] = (number % 3, -1, number * 7)
    for index, (begin, length, part) in enumerate(cohorts):
        free = [r for r in range(begin, begin + length) if r not in truth]
        exposures = int(part * len(free))
        stream = 10 + index
        placements = add_cohort(placements, (begin, begin + length), exposures, stream, "c")
        before = 0
        for place, row in enumerate(free, start=1):
            upto = place * exposures // len(free)
            if upto > before:
                truth[row] = (stream, before, -1)
            before = upto
        assert sum(s == stream for s, _, _ in truth.values()) == exposures
    for first, count in ((0, total), (37, 100), (250, 1), (5, 0)):
        placed = placements.take(first, count)
        found = {
            first + int(o): (int(s), int(q), int(r)) for o, s, q, r in zip(*placed, strict=True)
        }
        assert found == {r: v for r, v in truth.items() if first <= r < first + count}
    left = [placements.offered(r) for r in range(total + 1)]
    assert [left[r] == left[r + 1] for r in range(total)] == [r in truth for r in range(total)]
    position = {cohort.stream: index for index, cohort in enumerate(placements.cohorts)}
    for row, (stream, sequence, _) in truth.items():
        if sequence >= 0:
            assert placements.row_of_exposure(position[stream], sequence) == row


def test_far_out_a_cohort_is_exact() -> None:
    placements = add_cohort(Placements(), (10**12, 3 * 10**12), 10**9 + 7, 4, "facts")
    for sequence in (0, 1, 10**9 + 6):
        row = placements.row_of_exposure(0, sequence)
        placed = placements.take(row - 2, 5)
        assert placed.offset.tolist() == [2]
        assert placed.sequence.tolist() == [sequence]
    assert placements.offered(3 * 10**12) == 3 * 10**12 - 10**9 - 7


def test_a_window_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shows facts 11 times.*10 rows.*widen"):
        add_cohort(Placements(), (5, 15), 11, 0, "facts")
    full = add_cohort(Placements(), (5, 15), 10, 0, "facts")
    assert full.take(0, 20).offset.tolist() == list(range(5, 15))
    assert full.offered(20) == 10
    assert not Placements()
