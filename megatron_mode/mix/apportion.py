"""Deal the rows of one mode to its sources.

Sources stand in config order. The first takes its share of the mode's rows by the rule of the
schedule, floor of the planned count; the second takes its share of the rows left over, and so on;
the last takes what remains. Weights may change at points of the mode's rows: between two points
the share of a source against those after it is a line, so the planned count is a quadratic and its
floors are exact. A source that has used up its epochs is dry: the row it would take next opens a
new phase, in which the others share by their weights. What a source had been owed at that point
(its carry) is kept, so the realised count stays within a row of the integral of the share.

A user plans in tokens seen, and a weight is a line between points. Shares are lines over the mode's
own rows, which they are not while a weight changes. So a changing stretch is cut into PIECES. On a
ramp from nothing to the weight of all others together the share is at most 0.0003 away from weight
over weights, on one to ten times that weight 0.017 (in its first piece).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, assert_never

import numpy as np

from megatron_mode.config.mix import SourceConfig
from megatron_mode.mix.floors import IntArray, floor_quadratic

PIECES = 32
WEIGHT_GRID = 10**15  # parts of the larger end's weight; so sums keep short denominators
LONGEST_DENOMINATOR = 2**96
HORIZON_ROWS = 2**62  # no run is longer


class Supply(NamedTuple):
    """Hold what one source has to give.

    `points` are (row of the mode, weight), lines between them, flat outside; two points at one row
    are a jump. `rows_max` is the number of rows it may give (None: no limit).
    """

    points: Sequence[tuple[int, Fraction]]
    rows_max: int | None

    def weight(self, row: int, *, before: bool = False) -> Fraction:
        """Return the weight at a row of the mode; `before` takes the value left of a jump."""
        rows = [point[0] for point in self.points]
        index = (bisect_left if before else bisect_right)(rows, row)
        if index in (0, len(rows)):
            return self.points[max(index - 1, 0)][1]
        (begin, start), (end, stop) = self.points[index - 1 : index + 1]
        return start + (stop - start) * Fraction(row - begin, end - begin)


class Level(NamedTuple):
    """Hold one source's part in a phase: after n rows offered it has taken floor(planned(n)).

    Its share begins at `start` and changes by 2 * `curve` a row; `carry` in [0, 1) is planned minus
    taken at the begin of the phase, `taken` the rows taken before it.
    """

    start: Fraction
    curve: Fraction
    carry: Fraction
    taken: int

    @property
    def is_idle(self) -> bool:
        """Say whether the source takes nothing in this phase."""
        return not (self.start or self.curve)

    def planned(self, offered: int) -> Fraction:
        """Return carry plus the planned part of `offered` rows."""
        return self.carry + self.start * offered + self.curve * offered * offered


class Phase(NamedTuple):
    """Hold the shares from row `begin` of the mode on, one level a source."""

    begin: int
    levels: tuple[Level, ...]

    def after(self, offset: int) -> list[tuple[int, Fraction]]:
        """Return (taken, carry) of each source `offset` rows into the phase."""
        state = []
        for level in self.levels:
            planned = level.planned(offset)
            rows = math.floor(planned)
            state.append((level.taken + rows, planned - rows))
            offset -= rows
        return state


class Apportionment:
    """Answer which source takes row m of a mode, as which row of its own, and the inverse.

    `dry` lists (source, row of the mode) in the order in which sources run dry. `rows_max` is the
    number of rows that the mode can give in all (None: no limit); `is_starved` says that it ends
    because no source has a weight there.
    """

    def __init__(self, supplies: Sequence[Supply]) -> None:
        """Work out the phases: one for each point and each source that runs dry, at most."""
        self.dry: list[tuple[int, int]] = []
        self.rows_max: int | None = None
        self.phases: list[Phase] = []
        knots = sorted({row for supply in supplies for row, _ in supply.points if row > 0})
        begin, state = 0, [(0, Fraction(0))] * len(supplies)
        while begin < HORIZON_ROWS:
            end = next((row for row in knots if row > begin), None)
            phase = Phase(begin, self._levels(supplies, begin, end, state))
            self.phases.append(phase)
            if all(level.is_idle for level in phase.levels):
                self.rows_max = begin
                break
            offset = (HORIZON_ROWS if end is None else end) - begin
            if ends := _dry_ends(supplies, phase, offset):
                offset, source = min(ends)
                self.dry.append((source, begin + offset))
            # A denominator would grow from phase to phase; the cut is less than 1e-28 rows.
            state = [(taken, _cut(carry)) for taken, carry in phase.after(offset)]
            begin += offset
        self.is_starved = self.rows_max is not None and len(self.dry) < len(supplies)
        self._begins = [phase.begin for phase in self.phases]

    def counts(self, mode_row: int) -> list[int]:
        """Return the rows that each source has taken before row `mode_row` of the mode."""
        phase = self._phase_of(mode_row)
        return [taken for taken, _ in phase.after(mode_row - phase.begin)]

    def shares(self, mode_row: int) -> list[float]:
        """Return each source's planned share of the mode at a row of it; they sum to 1 or 0."""
        phase = self._phase_of(mode_row)
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
        source, sequence = np.empty(count, np.int64), np.empty(count, np.int64)
        row, end = first, first + count
        while row < end:
            number = bisect_right(self._begins, row)
            stop = min([end, *self._begins[number : number + 1]])
            part = slice(row - first, stop - first)
            _deal(self.phases[number - 1], row, source[part], sequence[part])
            row = stop
        return source, sequence

    def mode_row(self, source: int, sequence: int, mode_rows: int = HORIZON_ROWS) -> int:
        """Return which of the first rows of the mode a source takes as its row `sequence`."""
        rows = range(mode_rows)
        return bisect_right(rows, sequence, key=lambda row: self.counts(row + 1)[source])

    def _phase_of(self, mode_row: int) -> Phase:
        return self.phases[bisect_right(self._begins, mode_row) - 1]

    def _levels(
        self,
        supplies: Sequence[Supply],
        begin: int,
        end: int | None,
        state: Sequence[tuple[int, Fraction]],
    ) -> tuple[Level, ...]:
        """Return the levels of a phase, each offered what the one before leaves."""
        starts = [supply.weight(begin) for supply in supplies]
        stops = starts.copy()
        if end is not None:
            stops = [supply.weight(end, before=True) for supply in supplies]
        for source, _ in self.dry:
            starts[source] = stops[source] = Fraction(0)
        levels = []
        length = 0 if end is None else end - begin
        for source, (taken, carry) in enumerate(state):
            start, stop = (_share(weights[source:]) for weights in (starts, stops))
            # Where nothing is left to weigh, the other end's share is the limit.
            start = (stop if start is None else start) or Fraction(0)
            rise = 0 if stop is None else stop - start
            curve = Fraction(rise, 2 * length) if length else Fraction(0)
            levels.append(level := Level(start, curve, carry, taken))
            length -= math.floor(level.planned(length))
        return tuple(levels)


def _share(weights: Sequence[Fraction]) -> Fraction | None:
    """Return the first weight against all of them, None where there is nothing to share."""
    total = sum(weights)
    return weights[0] / total if total else None


def _dry_ends(supplies: Sequence[Supply], phase: Phase, length: int) -> list[tuple[int, int]]:
    """Return (offset into the phase, source) where sources are asked for more than they have."""
    return [
        (bisect_right(range(length), most, key=lambda at: phase.after(at + 1)[source][0]), source)
        for source, (taken, _) in enumerate(phase.after(length))
        if (most := supplies[source].rows_max) is not None and taken > most
    ]


def _cut(carry: Fraction) -> Fraction:
    if carry.denominator <= LONGEST_DENOMINATOR:
        return carry
    return Fraction(math.floor(carry * LONGEST_DENOMINATOR), LONGEST_DENOMINATOR)


def _deal(phase: Phase, row: int, source: IntArray, sequence: IntArray) -> None:
    """Fill source and sequence for the rows of one phase from `row` on, in place."""
    offset = row - phase.begin
    left = np.arange(len(source))
    for number, level in enumerate(phase.levels):
        if level.is_idle:
            continue
        planned = level.planned(offset)
        before = math.floor(planned)
        if level.start == 1 and not level.curve:
            mine, left = left, left[:0]
        else:
            slope = level.start + 2 * level.curve * offset
            floors = floor_quadratic(planned, slope, level.curve, left.size)
            takes = floors[1:] > floors[:-1]
            mine, left = left[takes], left[~takes]
        source[mine] = number
        sequence[mine] = np.arange(mine.size) + (level.taken + before)
        if not left.size:
            return
        offset -= before


def weight_points(source: SourceConfig) -> list[tuple[int, Fraction]]:
    """Return (tokens seen, weight) of a source; two points at one place are a jump.

    Stretches in which the weight changes are cut into PIECES.
    """
    onset, ramp = source.onset_tokens, source.ramp_tokens
    points = [(at, Fraction(weight)) for at, weight in source.weight_points]
    if not points and not onset and not ramp:
        return [(0, Fraction(source.weight))]
    points = points or [(onset, Fraction(0)), (onset + ramp, Fraction(source.weight))]
    found = points[:1]
    for (begin, start), (end, stop) in itertools.pairwise(points):
        inside = sorted({begin + (end - begin) * k // PIECES for k in range(1, PIECES)} - {begin})
        top = max(start, stop)
        for at in inside if start != stop else ():
            weight = start + (stop - start) * Fraction(at - begin, end - begin)
            found.append((at, Fraction(round(weight / top * WEIGHT_GRID), WEIGHT_GRID) * top))
        found.append((end, stop))
    return found


def rows_max(source: SourceConfig, size: int) -> int | None:
    """Return the rows within epochs_max, None without a limit."""
    return None if source.epochs_max is None else math.floor(Fraction(source.epochs_max) * size)


def rows_limit(source: SourceConfig, size: int) -> int | None:
    """Return after how many rows a source gives no more, None for never."""
    match source.when_dry:
        case "repeat":
            return None
        case "share" | "error":
            return rows_max(source, size)
    assert_never(source.when_dry)
