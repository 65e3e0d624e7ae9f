"""Deal the rows of one mode to its sources.

Sources stand in config order. The first takes its share of the mode's rows by the rule of the
schedule, floor of the planned count; the second takes its share of the rows left over, and so on;
the last takes what remains. A source that has used up its epochs is dry: the row it would take
next opens a new phase, in which the others share by their weights. What a source had been owed at
that point (its carry) is kept, so the realised count stays within a row of the integral of the
share.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from megatron_mode.mix.floors import IntArray, floor_quadratic


@dataclass(frozen=True)
class Supply:
    """Hold what one source has to give: its weight and the rows it may give (None: no limit)."""

    weight: Fraction
    rows_max: int | None


@dataclass(frozen=True)
class Level:
    """Hold one source's part in a phase.

    `share` is against the rest (0: dry, 1: takes what is left), `carry` in [0, 1) is planned minus
    taken at the begin of the phase, `taken` the rows taken before it.
    """

    share: Fraction
    carry: Fraction
    taken: int

    def first(self, count: int) -> int:
        """Return the rows this level offers before its source has taken `count` of this phase."""
        return math.ceil((count - self.carry) / self.share)

    def planned(self, offered: int) -> Fraction:
        """Return carry plus the planned part of `offered` rows."""
        return self.carry + self.share * offered


@dataclass(frozen=True)
class Phase:
    """Hold the shares from row `begin` of the mode on, one level a source."""

    begin: int
    levels: tuple[Level, ...]


class Apportionment:
    """Answer which source takes row m of a mode, as which row of its own, and the inverse.

    `dry_order` lists the sources in the order in which they run dry: its entry p ends phase p.
    `rows_max` is the number of rows that the mode can give in all (None: no limit).
    """

    def __init__(self, supplies: Sequence[Supply]) -> None:
        """Work out the phases; there is one more than sources that can run dry, at most."""
        self.supplies = tuple(supplies)
        self.phases: list[Phase] = []
        self.dry_order: list[int] = []
        self.rows_max: int | None = None
        levels = tuple(Level(Fraction(0), Fraction(0), 0) for _ in supplies)
        self.phases.append(Phase(0, self._shares(levels)))
        while (ending := self._next_dry(self.phases[-1])) is not None:
            row, source = ending
            self.dry_order.append(source)
            levels = _advance(self.phases[-1], row - self.phases[-1].begin)
            self.phases.append(Phase(row, self._shares(levels)))
        if len(self.dry_order) == len(self.supplies):
            self.rows_max = self.phases[-1].begin
        self._begins = [phase.begin for phase in self.phases]

    def counts(self, mode_row: int) -> list[int]:
        """Return the rows that each source has taken before row `mode_row` of the mode."""
        phase = self.phases[bisect_right(self._begins, mode_row) - 1]
        return [level.taken for level in _advance(phase, mode_row - phase.begin)]

    def take(self, first: int, count: int) -> tuple[IntArray, IntArray]:
        """Return (source, sequence) of the mode's rows first .. first + count - 1.

        The sequence is the number of rows that the source has taken before.
        """
        source = np.empty(count, np.int64)
        sequence = np.empty(count, np.int64)
        row = first
        while row < first + count:
            number = bisect_right(self._begins, row) - 1
            end = first + count
            if number + 1 < len(self.phases):
                end = min(end, self._begins[number + 1])
            part = slice(row - first, end - first)
            _deal(self.phases[number], row, source[part], sequence[part])
            row = end
        return source, sequence

    def mode_row(self, source: int, sequence: int) -> int:
        """Return the row of the mode that a source takes as its row number `sequence`."""
        taken = [phase.levels[source].taken for phase in self.phases]
        phase = self.phases[bisect_right(taken, sequence) - 1]
        return phase.begin + _offset_of(phase, source, sequence - phase.levels[source].taken)

    def _shares(self, levels: Sequence[Level]) -> tuple[Level, ...]:
        weights = [
            Fraction(0) if source in self.dry_order else supply.weight
            for source, supply in enumerate(self.supplies)
        ]
        return tuple(
            replace(level, share=weight / sum(weights[source:]) if weight else Fraction(0))
            for source, (level, weight) in enumerate(zip(levels, weights, strict=True))
        )

    def _next_dry(self, phase: Phase) -> tuple[int, int] | None:
        """Return (row of the mode, source) at which the next source is asked for too much."""
        ends = [
            (phase.begin + _offset_of(phase, source, supply.rows_max - level.taken), source)
            for source, (supply, level) in enumerate(zip(self.supplies, phase.levels, strict=True))
            if level.share and supply.rows_max is not None
        ]
        return min(ends, default=None)


def _advance(phase: Phase, offset: int) -> tuple[Level, ...]:
    """Return the levels with carry and taken as they are `offset` rows into the phase."""
    levels = []
    for level in phase.levels:
        planned = level.planned(offset)
        whole = math.floor(planned)
        levels.append(Level(level.share, planned - whole, level.taken + whole))
        offset -= whole
    return tuple(levels)


def _deal(phase: Phase, row: int, source: IntArray, sequence: IntArray) -> None:
    """Fill source and sequence for the rows of one phase from `row` on, in place."""
    offset = row - phase.begin
    left = np.arange(len(source))
    for number, level in enumerate(phase.levels):
        if not left.size:
            return
        if not level.share:
            continue
        planned = level.planned(offset)
        already = math.floor(planned)
        if level.share == 1:
            mine, left = left, left[:0]
        else:
            floors = floor_quadratic(planned, level.share, Fraction(0), left.size)
            takes = floors[1:] > floors[:-1]
            mine, left = left[takes], left[~takes]
        source[mine] = number
        sequence[mine] = np.arange(mine.size) + (level.taken + already)
        offset -= already


def _offset_of(phase: Phase, source: int, count: int) -> int:
    """Return the offset into a phase of the row that a source takes after `count` others of it.

    Upwards through the levels: the row number x that a source leaves over is the smallest X - 1
    with X - floor(carry + share*X) = ceil((1 - share)*X - carry) > x.
    """
    offset = phase.levels[source].first(count + 1) - 1
    for level in reversed(phase.levels[:source]):
        offset = math.floor((offset + level.carry) / (1 - level.share))
    return offset
