"""Turn the sources of a mode into supplies: weights over the mode's rows, and rows to give.

A source's points are stated in tokens seen, because that is what a user plans in. They are turned
once into rows of the mode, where apportioning is exact; between two points the share then goes by
the mode's own rows, which is by tokens wherever the Mode 2 fraction is constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from megatron_mode.config.mix import MixConfig, SourceConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.apportion import Apportionment, Supply


def source_rows(mix: MixConfig, seq_len: int, rows_by_source: Mapping[str, int]) -> list[int]:
    """Check the source names against the data and return their rows in config order."""
    seen: set[str] = set()
    for mode, section in ((1, mix.mode1), (2, mix.mode2)):
        for source in section.sources:
            key = f"mix.mode{mode}.sources"
            if source.name in seen:
                raise ConfigError(
                    f"{key} names '{source.name}' a second time, but a source may stand in one "
                    "mode once; drop one of them or add up their weights"
                )
            if source.name not in rows_by_source:
                raise ConfigError(
                    f"{key} names '{source.name}', but the sources at hand are "
                    f"{sorted(rows_by_source)}; prepare it or correct the name"
                )
            if rows_by_source[source.name] < 1:
                raise DataError(
                    f"source '{source.name}' in {key} has {rows_by_source[source.name]} rows, but "
                    f"at least 1 row of {seq_len} + 1 tokens is needed; add text or lower "
                    "model.seq_len"
                )
            seen.add(source.name)
    return [rows_by_source[source.name] for source in (*mix.mode1.sources, *mix.mode2.sources)]


def weight_points(source: SourceConfig) -> list[tuple[int, Fraction]]:
    """Return (tokens seen, weight) of a source; two points at one place are a jump."""
    if source.weight_points:
        return [(at, Fraction(weight)) for at, weight in source.weight_points]
    weight, onset = Fraction(source.weight), source.onset_tokens
    if not onset and not source.ramp_tokens:
        return [(0, weight)]
    return [(onset, Fraction(0)), (onset + source.ramp_tokens, weight)]


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
        limit = None if source.when_dry == "repeat" else rows_max(source, size)
        supplies.append(Supply(points, limit))
    return Apportionment(supplies)
