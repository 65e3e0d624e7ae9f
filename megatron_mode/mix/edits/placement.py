"""Put chosen rows in the place of rows of a mode, in closed form, without moving any other row.

A mode's rows pass through levels. The first holds explicit places (row of the mode -> document);
each cohort after it takes its places among the rows that the levels before it leave over, spread
evenly inside its window: of the n rows from the window's begin on, floor(n * E / M) are taken, with
E exposures in M rows, so exactly E at its end. What no level takes stays as it was planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from megatron_mode.errors import ConfigError
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


class _Level(Protocol):
    def taken_before(self, row: int) -> int:
        """Count the rows taken among the first `row` rows offered."""

    def taken(self, first: int, count: int) -> IntArray:
        """Return the offsets of the rows taken among first .. first + count - 1, ascending."""

    def row_left(self, left: int) -> int:
        """Return the row offered that is left over as row number `left`."""


@dataclass(frozen=True)
class Explicit:
    """Hold places row by row; `row` ascends without repeats."""

    row: IntArray
    stream: IntArray
    stream_row: IntArray

    def taken_before(self, row: int) -> int:
        """Count the rows taken among the first `row` rows offered."""
        return int(np.searchsorted(self.row, row))

    def taken(self, first: int, count: int) -> IntArray:
        """Return the offsets of the rows taken among first .. first + count - 1, ascending."""
        begin, end = self.taken_before(first), self.taken_before(first + count)
        return self.row[begin:end] - first

    def row_left(self, left: int) -> int:
        """Return the row offered that is left over as row number `left`."""
        before = self.row - np.arange(len(self.row))
        return left + int(np.searchsorted(before, left, side="right"))


@dataclass(frozen=True)
class Cohort:
    """Spread `exposures` rows of a stream over the offered rows [begin, end)."""

    begin: int
    end: int
    exposures: int
    stream: int

    def taken_before(self, row: int) -> int:
        """Count the rows taken among the first `row` rows offered."""
        inside = min(max(row - self.begin, 0), self.end - self.begin)
        return inside * self.exposures // (self.end - self.begin) if inside else 0

    def taken(self, first: int, count: int) -> IntArray:
        """Return the offsets of the rows taken among first .. first + count - 1, ascending."""
        low, high = max(first, self.begin), min(first + count, self.end)
        if low >= high:
            return np.empty(0, np.int64)
        share = Fraction(self.exposures, self.end - self.begin)
        floors = floor_quadratic(share * (low - self.begin), share, Fraction(0), high - low)
        taken: IntArray = np.flatnonzero(floors[1:] > floors[:-1]) + (low - first)
        return taken

    def row_left(self, left: int) -> int:
        """Return the row offered that is left over as row number `left`."""
        if left < self.begin:
            return left
        length = self.end - self.begin
        kept = length - self.exposures
        if left - self.begin >= kept:
            return left + self.exposures
        return self.begin + (left - self.begin) * length // kept

    def row_of(self, sequence: int) -> int:
        """Return the row offered that exposure number `sequence` takes."""
        return self.begin + -((-(sequence + 1) * (self.end - self.begin)) // self.exposures) - 1


class Placements:
    """Hold the levels of one mode."""

    def __init__(self, explicit: Explicit, cohorts: Sequence[Cohort] = ()) -> None:
        self.explicit, self.cohorts = explicit, tuple(cohorts)
        self._levels: tuple[_Level, ...] = (explicit, *cohorts)

    @classmethod
    def none(cls) -> Placements:
        """Return placements that take nothing."""
        nothing = np.empty(0, np.int64)
        return cls(Explicit(nothing, nothing, nothing))

    def __bool__(self) -> bool:
        """Tell whether anything is placed at all."""
        return len(self.explicit.row) > 0 or any(cohort.exposures for cohort in self.cohorts)

    def offered(self, mode_row: int) -> int:
        """Count the rows that are left of the first `mode_row` rows of the mode."""
        for level in self._levels:
            mode_row -= level.taken_before(mode_row)
        return mode_row

    def take(self, first: int, count: int) -> Placed:
        """Return what is placed among the mode's rows first .. first + count - 1."""
        left = np.arange(count)
        found = []
        for level in self._levels:
            offsets = level.taken(first, len(left))
            before = level.taken_before(first)
            numbers = before + np.arange(len(offsets))
            none = np.full(len(offsets), NOT_A_SEQUENCE, np.int64)
            if isinstance(level, Cohort):
                stream = np.full(len(offsets), level.stream, np.int64)
                found.append(Placed(left[offsets], stream, numbers, none))
            else:
                explicit = self.explicit
                stream, row = explicit.stream[numbers], explicit.stream_row[numbers]
                found.append(Placed(left[offsets], stream, none, row))
            left = np.delete(left, offsets)
            first -= before
        return Placed(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def takes(self, mode_row: int) -> bool:
        """Tell whether a row of the mode is taken."""
        return self.offered(mode_row + 1) == self.offered(mode_row)

    def rows_of_exposure(self, cohort: int, sequence: int) -> int:
        """Return the row of the mode at which a cohort, by position, shows its exposure."""
        row = self.cohorts[cohort].row_of(sequence)
        for level in reversed(self._levels[: cohort + 1]):
            row = level.row_left(row)
        return row


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
