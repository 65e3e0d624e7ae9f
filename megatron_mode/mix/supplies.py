"""Turn the sources of a mode into supplies: weights over the mode's rows, and rows to give.

A source's points are stated in tokens seen, because that is what a user plans in, and its weight is
a line between them. Apportioning is exact where shares are lines over the mode's own rows, which
they are not while a weight changes. So a changing stretch is cut into PIECES; inside a piece the
share is a line. On a ramp from nothing to the weight of all others together it is at most 0.0003
away from weight over weights, on one to ten times that weight 0.017 (in its first piece).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import assert_never

from megatron_mode.config.mix import MixConfig, SourceConfig
from megatron_mode.errors import DataError
from megatron_mode.mix.apportion import Apportionment, Supply

PIECES = 32
WEIGHT_GRID = 10**15  # parts of the larger end's weight; so sums keep short denominators


def source_rows(mix: MixConfig, seq_len: int, rows_by_source: Mapping[str, int]) -> list[int]:
    """Return the rows of each source in config order; DataError for a source without any."""
    for mode, section in ((1, mix.mode1), (2, mix.mode2)):
        for source in section.sources:
            if rows_by_source[source.name] < 1:
                raise DataError(
                    f"source '{source.name}' in mix.mode{mode}.sources has "
                    f"{rows_by_source[source.name]} rows, but at least 1 row of {seq_len} + 1 "
                    "tokens is needed; add text or lower model.seq_len"
                )
    return [rows_by_source[source.name] for source in (*mix.mode1.sources, *mix.mode2.sources)]


def weight_points(source: SourceConfig) -> list[tuple[int, Fraction]]:
    """Return (tokens seen, weight) of a source; two points at one place are a jump."""
    if source.weight_points:
        return refined([(at, Fraction(weight)) for at, weight in source.weight_points])
    weight, onset = Fraction(source.weight), source.onset_tokens
    if not onset and not source.ramp_tokens:
        return [(0, weight)]
    return refined([(onset, Fraction(0)), (onset + source.ramp_tokens, weight)])


def refined(points: Sequence[tuple[int, Fraction]]) -> list[tuple[int, Fraction]]:
    """Cut the stretches in which a weight changes into PIECES."""
    found = list(points[:1])
    for (begin, start), (end, stop) in itertools.pairwise(points):
        inside = sorted({begin + (end - begin) * k // PIECES for k in range(1, PIECES)} - {begin})
        top = max(start, stop)
        for at in inside if start != stop else ():
            weight = start + (stop - start) * Fraction(at - begin, end - begin)
            found.append((at, Fraction(round(weight / top * WEIGHT_GRID), WEIGHT_GRID) * top))
        found.append((end, stop))
    return found


def rows_limit(source: SourceConfig, size: int) -> int | None:
    """Return after how many rows a source gives no more, None for never."""
    match source.when_dry:
        case "repeat":
            return None
        case "share" | "error":
            return rows_max(source, size)
        case _:
            assert_never(source.when_dry)


def rows_max(source: SourceConfig, size: int) -> int | None:
    """Return the rows within epochs_max, None without a limit."""
    return None if source.epochs_max is None else math.floor(Fraction(source.epochs_max) * size)


def apportionment(
    sources: Sequence[SourceConfig],
    sizes: Sequence[int],
    seq_len: int,
    mode_row: Callable[[int], int],
) -> Apportionment:
    """Return the apportionment of a mode; `mode_row` counts its rows before a row of the run."""
    supplies = []
    for source, size in zip(sources, sizes, strict=True):
        points = tuple((mode_row(-(-at // seq_len)), w) for at, w in weight_points(source))
        supplies.append(Supply(points, rows_limit(source, size)))
    return Apportionment(supplies)
