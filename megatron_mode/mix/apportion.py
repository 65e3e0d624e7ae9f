"""Deal the rows of one mode to its sources.

Sources stand in config order. The first takes its share of the mode's rows by the rule of the
schedule, floor of the planned count; the second takes its share of the rows left over, and so on;
the last takes what remains. Weights may change at points of the mode's rows: between two points
the share of a source against those after it is a line, so the planned count is a quadratic and its
floors are exact. A source that has used up its epochs is dry: the row it would take next opens a
new phase, in which the others share by their weights. What a source had been owed at that point
(its carry) is kept, so the realised count stays within a row of the integral of the share.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_mode.mix.floors import IntArray, floor_quadratic
from megatron_mode.mix.level import Level

LONGEST_DENOMINATOR = 2**96

Points = tuple[tuple[int, Fraction], ...]


@dataclass(frozen=True)
class Supply:
    """Hold what one source has to give.

    `points` are (row of the mode, weight), lines between them, flat outside; two points at one row
    are a jump. `rows_max` is the number of rows it may give (None: no limit).
    """

    points: Points
    rows_max: int | None

    @classmethod
    def constant(cls, weight: Fraction, rows_max: int | None) -> Supply:
        """Return a supply whose weight never changes."""
        return cls(((0, weight),), rows_max)

    def weight(self, row: Fraction | int, *, before: bool = False) -> Fraction:
        """Return the weight at a row of the mode; `before` takes the value left of a jump."""
        rows = [point[0] for point in self.points]
        index = (bisect_left if before else bisect_right)(rows, row)
        if index == 0:
            return self.points[0][1]
        if index == len(rows):
            return self.points[-1][1]
        (begin, start), (end, stop) = self.points[index - 1 : index + 1]
        return start + (stop - start) * (row - begin) / Fraction(end - begin)


@dataclass(frozen=True)
class Phase:
    """Hold the shares from row `begin` of the mode on, one level a source."""

    begin: int
    levels: tuple[Level, ...]


class Apportionment:
    """Answer which source takes row m of a mode, as which row of its own, and the inverse.

    `dry` lists (source, row of the mode) in the order in which sources run dry. `rows_max` is the
    number of rows that the mode can give in all (None: no limit); `is_starved` tells that it ends
    because no source has a weight there.
    """

    def __init__(self, supplies: Sequence[Supply]) -> None:
        """Work out the phases: one for each point and each source that runs dry, at most."""
        self.supplies = tuple(supplies)
        self.dry: list[tuple[int, int]] = []
        self.rows_max: int | None = None
        self.is_starved = False
        self.phases: list[Phase] = []
        self._knots = sorted({row for supply in supplies for row, _ in supply.points if row > 0})
        self._build()
        self._begins = [phase.begin for phase in self.phases]

    def counts(self, mode_row: int) -> list[int]:
        """Return the rows that each source has taken before row `mode_row` of the mode."""
        phase = self.phases[bisect_right(self._begins, mode_row) - 1]
        return [taken for taken, _ in _advance(phase, mode_row - phase.begin)]

    def shares(self, mode_row: int) -> list[float]:
        """Return each source's planned share of the mode at a row of it; they sum to 1 or 0."""
        phase = self.phases[bisect_right(self._begins, mode_row) - 1]
        offset, left, found = mode_row - phase.begin, 1.0, []
        for level in phase.levels:
            share = float(level.start + 2 * level.curve * offset)
            found.append(left * share)
            left *= 1 - share
            offset -= math.floor(level.planned(offset))
        return found

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
        offset = _offset_of(phase, source, sequence - phase.levels[source].taken)
        assert offset is not None, "the phase is the one in which the source takes this row"
        return phase.begin + offset

    def _build(self) -> None:
        begin = 0
        state = [(0, Fraction(0))] * len(self.supplies)
        while True:
            end = next((row for row in self._knots if row > begin), None)
            phase = Phase(begin, self._levels(begin, end, state))
            self.phases.append(phase)
            if all(level.is_idle for level in phase.levels):
                self.rows_max = begin
                self.is_starved = len(self.dry) < len(self.supplies)
                return
            offset, source = self._next_dry(phase)
            if source is not None:
                self.dry.append((source, begin + offset))
            elif end is None:
                return
            else:
                offset = end - begin
            state = _advance(phase, offset)
            begin += offset

    def _levels(
        self, begin: int, end: int | None, state: Sequence[tuple[int, Fraction]]
    ) -> tuple[Level, ...]:
        """Return the levels of a phase, each offered what the one before leaves."""
        dry = {source for source, _ in self.dry}
        live = {n: supply for n, supply in enumerate(self.supplies) if n not in dry}
        starts = [Fraction(0)] * len(self.supplies)
        stops = list(starts)
        for number, supply in live.items():
            starts[number] = supply.weight(begin)
            stops[number] = starts[number] if end is None else supply.weight(end, before=True)
        levels = []
        length = None if end is None else end - begin
        for source, (taken, carry) in enumerate(state):
            start, stop = (_share(weights[source:]) for weights in (starts, stops))
            # Where nothing is left to weigh, the other end's share is the limit.
            start, stop = (stop if start is None else start), (start if stop is None else stop)
            level = Level(start or Fraction(0), stop or Fraction(0), carry, taken, length)
            levels.append(level)
            if length is not None:
                length -= math.floor(level.planned(length))
        return tuple(levels)

    def _next_dry(self, phase: Phase) -> tuple[int, int | None]:
        """Return (offset into the phase, source) at which the next source is asked for too much."""
        ends = []
        for source, (supply, level) in enumerate(zip(self.supplies, phase.levels, strict=True)):
            if level.is_idle or supply.rows_max is None:
                continue
            length = level.length
            if length is None or level.taken + math.floor(level.planned(length)) > supply.rows_max:
                offset = _offset_of(phase, source, supply.rows_max - level.taken)
                if offset is not None:
                    ends.append((offset, source))
        return min(ends, default=(0, None))


def _share(weights: Sequence[Fraction]) -> Fraction | None:
    """Return the first weight against all of them, None where there is nothing to share."""
    total = sum(weights, Fraction(0))
    return weights[0] / total if total else None


def _advance(phase: Phase, offset: int) -> list[tuple[int, Fraction]]:
    """Return (taken, carry) of each source `offset` rows into the phase."""
    state = []
    for level in phase.levels:
        planned = level.planned(offset)
        whole = math.floor(planned)
        state.append((level.taken + whole, _short(planned - whole)))
        offset -= whole
    return state


def _short(carry: Fraction) -> Fraction:
    """Cut a carry whose denominator would grow from phase to phase; by less than 1e-28 rows."""
    if carry.denominator <= LONGEST_DENOMINATOR:
        return carry
    return Fraction(math.floor(carry * LONGEST_DENOMINATOR), LONGEST_DENOMINATOR)


def _deal(phase: Phase, row: int, source: IntArray, sequence: IntArray) -> None:
    """Fill source and sequence for the rows of one phase from `row` on, in place."""
    offset = row - phase.begin
    left = np.arange(len(source))
    for number, level in enumerate(phase.levels):
        if not left.size:
            return
        if level.is_idle:
            continue
        planned = level.planned(offset)
        already = math.floor(planned)
        if level.start == level.stop == 1:
            mine, left = left, left[:0]
        else:
            slope = level.start + 2 * level.curve * offset
            floors = floor_quadratic(planned, slope, level.curve, left.size)
            takes = floors[1:] > floors[:-1]
            mine, left = left[takes], left[~takes]
        source[mine] = number
        sequence[mine] = np.arange(mine.size) + (level.taken + already)
        offset -= already


def _offset_of(phase: Phase, source: int, count: int) -> int | None:
    """Return the offset into a phase of the row that a source takes after `count` others of it.

    Upwards through the levels: the row number x that a source leaves over is the first one of which
    more than x are left. None where the phase ends before.
    """
    offered = phase.levels[source].first(count)
    for level in reversed(phase.levels[:source]):
        if offered is None:
            return None
        if not level.is_idle:
            offered = level.leaving(offered - 1)
    return None if offered is None else offered - 1
