"""Hold one source's part in a phase of an apportionment: where it takes rows and leaves them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Level:
    """Hold one source's part in a phase.

    Its share of the `length` rows offered to it goes from `start` to `stop` (0: takes none, 1:
    takes all); `carry` in [0, 1) is planned minus taken at the begin of the phase, `taken` the rows
    taken before it. `length` None is an endless phase, with a constant share.
    """

    start: Fraction
    stop: Fraction
    carry: Fraction
    taken: int
    length: int | None

    @property
    def is_idle(self) -> bool:
        """Tell whether the source takes nothing in this phase."""
        return self.start == self.stop == 0

    @property
    def curve(self) -> Fraction:
        """Return the coefficient of the square of the rows offered."""
        if self.start == self.stop or not self.length:
            return Fraction(0)
        return (self.stop - self.start) / (2 * self.length)

    def planned(self, offered: int) -> Fraction:
        """Return carry plus the planned part of `offered` rows."""
        return self.carry + self.start * offered + self.curve * offered * offered

    def first(self, count: int) -> int | None:
        """Return the fewest rows to offer before the source takes its row `count` (from 0)."""
        if not self.curve:
            offered = math.ceil((count + 1 - self.carry) / self.start) if self.start else None
        else:
            offered = self._bisect(lambda rows: self.planned(rows) >= count + 1)
        return offered if self._fits(offered) else None

    def leaving(self, count: int) -> int | None:
        """Return the fewest rows to offer before the source leaves its row `count` over."""
        if not self.curve:
            if self.start == 1:
                return None
            offered: int | None = math.floor((count + self.carry) / (1 - self.start)) + 1
        else:
            offered = self._bisect(lambda rows: rows - math.floor(self.planned(rows)) > count)
        return offered if self._fits(offered) else None

    def _fits(self, offered: int | None) -> bool:
        return offered is not None and (self.length is None or offered <= self.length)

    def _bisect(self, holds: Callable[[int], bool]) -> int | None:
        assert self.length is not None, "an endless phase has constant shares"
        low, high = 0, self.length
        if not holds(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        return low
