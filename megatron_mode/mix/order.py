"""Answer which row of which source is taken at which row index of the run, and the inverse.

Step s takes rows [s*Gb, (s+1)*Gb), Gb being `batch.global_rows`. Row i is Mode 2 where floor(F)
rises (`schedule`); its place among the rows of its mode picks the source (`apportion`); its place
j among the rows of its source is row P(j mod R_s) of epoch j div R_s (`permutation`). Nothing here
depends on ranks, micro-batches or worker counts, and nothing is stored that grows with the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction

import numpy as np

from megatron_mode.config.fields import MixConfig, SourceConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.apportion import Apportionment, Supply
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.permutation import epoch_key, invert, permute, stream_key
from megatron_mode.mix.schedule import Integral

WINDOW_ROWS = 32_768  # 256 KiB an array; with 8,192, calls cost as much as arithmetic


@dataclass(frozen=True)
class Rows:
    """Hold rows of the run, one int64 array a field.

    `row` is the index in the run, `mode` 1 or 2, `source` the index in Order.source_names,
    `source_row` the row of that source (after the permutation), `epoch` the pass over the source.
    """

    row: IntArray
    mode: IntArray
    source: IntArray
    source_row: IntArray
    epoch: IntArray

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.row)

    def __getitem__(self, index: IntArray | slice) -> Rows:
        """Pick rows by slice or by an array of positions."""
        return Rows(*(getattr(self, field.name)[index] for field in fields(self)))


class Order:
    """Map row indices of a run to rows of its sources; immutable, so threads may share it."""

    def __init__(
        self,
        mix: MixConfig,
        seq_len: int,
        total_rows: int,
        seed: int,
        rows_by_source: Mapping[str, int],
    ) -> None:
        """Plan a run of `total_rows` rows of `seq_len` tokens over sources of the given rows.

        Raises ConfigError for sources that are missing or named twice and for a scheduled mode
        without sources, DataError for a source without a single row and for a mode that runs dry.
        """
        self.seq_len, self.total_rows, self.seed = seq_len, total_rows, seed
        self.integral = Integral(mix.mode2_fraction, seq_len, total_rows)
        self.configs = (*mix.mode1.sources, *mix.mode2.sources)
        self.source_names = tuple(source.name for source in self.configs)
        self._first_source = {1: 0, 2: len(mix.mode1.sources)}
        sizes = _source_rows(mix, seq_len, rows_by_source)
        self._sizes = np.array(sizes, np.int64)
        self._keys = np.array([stream_key(seed, n) for n in self.source_names], np.uint64)
        split = self._first_source[2]
        self._parts = {
            1: _apportionment(self.configs[:split], sizes[:split]),
            2: _apportionment(self.configs[split:], sizes[split:]),
        }
        planned_mode2 = self.integral.mode2_rows(total_rows)
        self._mode_rows = {1: total_rows - planned_mode2, 2: planned_mode2}
        for mode in (1, 2):
            self._check_supply(mode)

    def rows(self, begin_row: int, end_row: int) -> Rows:
        """Return the rows begin_row .. end_row - 1 of the run.

        Raises ValueError outside [0, total_rows]: the plan says nothing there.
        """
        if not 0 <= begin_row <= end_row <= self.total_rows:
            raise ValueError(
                f"rows {begin_row} .. {end_row} are not within the run's {self.total_rows} rows"
            )
        count = end_row - begin_row
        rows = Rows(*(np.empty(count, np.int64) for _ in fields(Rows)))
        for begin in range(0, count, WINDOW_ROWS):
            part = slice(begin, min(begin + WINDOW_ROWS, count))
            self._fill(begin_row + begin, rows[part])
        return rows

    def planned_mode2(self, row: int) -> float:
        """Return F(row), the planned number of Mode 2 rows before `row`."""
        return self.integral.planned(row)

    def realised_mode2(self, row: int) -> int:
        """Return the number of Mode 2 rows before `row`: floor(F(row))."""
        return self.integral.mode2_rows(row)

    def rows_of_source(self, source: int) -> int:
        """Return the number of rows that the run takes from a source, repeats included."""
        mode = self.mode_of(source)
        taken = self._parts[mode].counts(self._mode_rows[mode])
        return taken[source - self._first_source[mode]]

    def mode_of(self, source: int) -> int:
        """Return the mode of a source by its index in `source_names`."""
        return 1 if source < self._first_source[2] else 2

    def rows_seen(self, source: int, source_row: int) -> IntArray:
        """Return the row indices at which a row of a source is taken, one an epoch, ascending.

        Raises ValueError for a row that the source does not have.
        """
        size = int(self._sizes[source])
        epochs = np.arange(-(-self.rows_of_source(source) // size), dtype=np.int64)
        place = invert(
            np.full(len(epochs), source_row), size, epoch_key(self._keys[source], epochs)
        )
        sequence = epochs * size + place
        taken = sequence[sequence < self.rows_of_source(source)]
        return np.array([self._row_of(source, int(number)) for number in taken], np.int64)

    def deal(self, step: int, global_rows: int) -> IntArray:
        """Return a step's dealing: entry p is the offset in the step of the row in slot p.

        Slots are counted micro-batch by micro-batch, in each rank by rank. The permutation is
        keyed by (seed, step) alone, so every layout deals the same rows.
        """
        key = epoch_key(stream_key(self.seed, "deal"), step)
        return permute(np.arange(global_rows), global_rows, key)

    def warnings(self) -> list[str]:
        """Say which sources repeat or run dry, and when."""
        messages = []
        for source, config in enumerate(self.configs):
            mode, size = self.mode_of(source), int(self._sizes[source])
            taken = self.rows_of_source(source)
            if taken > size:
                messages.append(
                    f"source '{config.name}' (mode {mode}) repeats: {taken / size:.2f} epochs by "
                    f"the end of the run, the second begins at {self._when(source, size)}"
                )
        for mode in (1, 2):
            part, first = self._parts[mode], self._first_source[mode]
            for local, phase in zip(part.dry_order, part.phases[1:], strict=True):
                if phase.begin >= self._mode_rows[mode]:
                    continue
                config = self.configs[first + local]
                row = self.integral.row_of(mode, phase.begin, self.total_rows)
                messages.append(
                    f"source '{config.name}' (mode {mode}) runs dry after epochs_max "
                    f"{config.epochs_max}, at {self._at(row)}; the other sources of mode {mode} "
                    "take its share"
                )
        return messages

    def _fill(self, begin_row: int, out: Rows) -> None:
        """Compute one window of rows, in place."""
        count = len(out)
        floors = self.integral.mode2_rows_window(begin_row, begin_row + count)
        is_mode2 = floors[1:] > floors[:-1]
        before_mode2 = int(floors[0])
        out.row[:] = np.arange(begin_row, begin_row + count)
        np.add(is_mode2, 1, out=out.mode)
        sequence = out.source_row
        for mode, mask in ((1, ~is_mode2), (2, is_mode2)):
            where = np.flatnonzero(mask)
            if not where.size:
                continue
            first = before_mode2 if mode == 2 else begin_row - before_mode2
            source, number = self._parts[mode].take(first, where.size)
            out.source[where] = source + self._first_source[mode]
            sequence[where] = number
        size = self._sizes[out.source]
        np.floor_divide(sequence, size, out=out.epoch)
        sequence -= out.epoch * size
        key = epoch_key(self._keys[out.source], out.epoch)
        out.source_row[:] = permute(sequence, size, key)

    def _row_of(self, source: int, sequence: int) -> int:
        """Return the row index at which a source gives its row number `sequence`."""
        mode = self.mode_of(source)
        mode_row = self._parts[mode].mode_row(source - self._first_source[mode], sequence)
        return self.integral.row_of(mode, mode_row, self.total_rows)

    def _when(self, source: int, sequence: int) -> str:
        return self._at(self._row_of(source, sequence))

    def _at(self, row: int) -> str:
        return f"row {row:,} ({row * self.seq_len:,} tokens)"

    def _check_supply(self, mode: int) -> None:
        """Refuse a run whose plan asks a mode for more rows than its sources give."""
        needed, given = self._mode_rows[mode], self._parts[mode].rows_max
        if given is None or needed <= given:
            return
        row = self.integral.row_of(mode, given, self.total_rows)
        if not self._parts[mode].supplies:
            raise ConfigError(
                f"mix.mode{mode}.sources is empty, but mix.mode2_fraction plans {needed:,} Mode "
                f"{mode} rows from row {row:,} on; add a source or set the fraction to "
                f"{2 - mode} throughout"
            )
        raise DataError(
            f"mode {mode} runs dry at {self._at(row)}: the run needs {needed:,} Mode {mode} rows "
            f"and mix.mode{mode}.sources gives {given:,} within epochs_max; raise or unset "
            "epochs_max, add a source, change mix.mode2_fraction or lower run.steps"
        )


def _source_rows(mix: MixConfig, seq_len: int, rows_by_source: Mapping[str, int]) -> list[int]:
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


def _apportionment(configs: tuple[SourceConfig, ...], sizes: list[int]) -> Apportionment:
    """Give each source its weight and the rows that epochs_max allows it."""
    return Apportionment(
        [
            Supply(Fraction(config.weight), _rows_max(config.epochs_max, size))
            for config, size in zip(configs, sizes, strict=True)
        ]
    )


def _rows_max(epochs_max: Decimal | None, size: int) -> int | None:
    return None if epochs_max is None else math.floor(Fraction(epochs_max) * size)
