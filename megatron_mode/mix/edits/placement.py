"""Put chosen rows in the place of rows of a mode, in closed form, without moving any other row.

A mode's rows pass through levels. The first holds explicit places (row of the mode -> document);
each cohort after it takes its places among the rows that the levels before it leave over, spread
evenly inside its window: of the n rows from the window's begin on, floor(n * E / M) are taken, with
E exposures in M rows, so exactly E at its end. What no level takes stays as it was planned.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from megatron_mode.errors import ConfigError
from megatron_mode.mix.apportion import HORIZON_ROWS
from megatron_mode.mix.floors import IntArray, floor_quadratic

NOT_A_SEQUENCE = -1


class Placed(NamedTuple):
    """Hold rows that are taken: offset from the first row asked for, stream, and which row of it.

    `sequence` counts a cohort's exposures from 0 and is -1 for explicit places, whose `stream_row`
    is given; a cohort's is -1, as the order permutes it.
    """

    offset: IntArray
    stream: IntArray
    sequence: IntArray
    stream_row: IntArray


class Explicit(NamedTuple):
    """Hold places row by row; `row` ascends without repeats."""

    row: IntArray
    stream: IntArray
    stream_row: IntArray

    def taken_before(self, row: int) -> int:
        """Count the rows taken among the first `row` rows offered."""
        return int(np.searchsorted(self.row, row))

    def take(self, first: int, count: int) -> Placed:
        """Return what is taken of the offered rows first .. first + count - 1."""
        mine = slice(self.taken_before(first), self.taken_before(first + count))
        row = self.row[mine]
        none = np.full_like(row, NOT_A_SEQUENCE)
        return Placed(row - first, self.stream[mine], none, self.stream_row[mine])


NOWHERE = Explicit(*(np.empty(0, np.int64) for _ in Explicit._fields))


class Cohort(NamedTuple):
    """Spread `exposures` rows of a stream over the offered rows [begin, end)."""

    begin: int
    end: int
    exposures: int
    stream: int

    def taken_before(self, row: int) -> int:
        """Count the rows taken among the first `row` rows offered."""
        inside = min(max(row - self.begin, 0), self.end - self.begin)
        return inside * self.exposures // (self.end - self.begin)

    def take(self, first: int, count: int) -> Placed:
        """Return what is taken of the offered rows first .. first + count - 1."""
        low = min(max(first, self.begin), self.end)
        high = max(low, min(first + count, self.end))
        share = Fraction(self.exposures, self.end - self.begin)
        floors = floor_quadratic(share * (low - self.begin), share, Fraction(0), high - low)
        offset = np.flatnonzero(floors[1:] > floors[:-1])
        none = np.full_like(offset, NOT_A_SEQUENCE)
        stream = np.full_like(offset, self.stream)
        return Placed(offset + (low - first), stream, floors[offset], none)


@dataclass(frozen=True)
class Placements:
    """Hold the levels of one mode; false where nothing is placed at all."""

    explicit: Explicit = NOWHERE
    cohorts: Sequence[Cohort] = ()

    @property
    def levels(self) -> tuple[Explicit | Cohort, ...]:
        """Return the explicit places, then the cohorts."""
        return (self.explicit, *self.cohorts)

    def __bool__(self) -> bool:
        """Say whether anything is placed at all."""
        return len(self.explicit.row) > 0 or len(self.cohorts) > 0

    def counts(self, mode_row: int) -> list[int]:
        """Count the rows that each level takes of the first `mode_row` rows of the mode."""
        found: list[int] = []
        for level in self.levels:
            found.append(level.taken_before(mode_row - sum(found)))
        return found

    def offered(self, mode_row: int) -> int:
        """Count the rows that are left of the first `mode_row` rows of the mode."""
        return mode_row - sum(self.counts(mode_row))

    def take(self, first: int, count: int) -> Placed:
        """Return what is placed among the mode's rows first .. first + count - 1."""
        left = np.arange(count)
        found = []
        for level in self.levels:
            placed = level.take(first, len(left))
            found.append(placed._replace(offset=left[placed.offset]))
            left = np.delete(left, placed.offset)
            first -= level.taken_before(first)
        return Placed(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def row_of_exposure(self, cohort: int, sequence: int) -> int:
        """Return the row of the mode at which a cohort, by position, shows its exposure."""
        rows = range(HORIZON_ROWS)
        return bisect_right(rows, sequence, key=lambda row: self.counts(row + 1)[1 + cohort])


def add_cohort(
    placements: Placements, window: tuple[int, int], exposures: int, stream: int, name: str
) -> Placements:
    """Return the placements with one more cohort in the mode's rows window[0] .. window[1] - 1.

    Raises ConfigError where the window leaves fewer rows than exposures.
    """
    begin, end = (placements.offered(row) for row in window)
    if exposures > end - begin:
        raise ConfigError(
            f"mix.edits.cohorts shows {name} {exposures:,} times, but its window has "
            f"{end - begin:,} rows of that mode left; widen the window, lower exposures or "
            "lengthen the run"
        )
    if not exposures:
        return placements
    cohort = Cohort(begin, end, exposures, stream)
    return Placements(placements.explicit, (*placements.cohorts, cohort))
