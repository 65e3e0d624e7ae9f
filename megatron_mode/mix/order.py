"""Answer which row of which source is taken at which row index of the run, and the inverse.

Step s takes rows [s*Gb, (s+1)*Gb), Gb being `batch.global_rows`. Row i is Mode 2 where floor(F)
rises (`schedule`); its place among the rows of its mode picks the source (`apportion`); its place
j among the rows of its source is row P(j mod R_s) of epoch j div R_s (`permutation`). Edits show
other rows in some of these places (`placement`) and move none. Nothing here depends on ranks,
micro-batches or worker counts, and nothing is stored that grows with the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np

from megatron_mode.config.mix import MixConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.edits.overrides import NO_EDITS, PlannedEdits
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.permutation import epoch_key, invert, permute, stream_key
from megatron_mode.mix.schedule import Integral
from megatron_mode.mix.supplies import apportionment, source_rows

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
        *,
        edits: PlannedEdits = NO_EDITS,
    ) -> None:
        """Plan a run of `total_rows` rows of `seq_len` tokens over sources of the given rows.

        Raises DataError for a source without a single row and for one that runs dry against its
        when_dry, or a mode that does, and ConfigError for a scheduled mode without any weight.
        """
        self.seq_len, self.total_rows, self.seed = seq_len, total_rows, seed
        self.integral = Integral(mix.mode2_fraction, seq_len, total_rows)
        self.configs = (*mix.mode1.sources, *mix.mode2.sources)
        self.edits = edits
        self.source_names = (
            *(source.name for source in self.configs),
            *(stream.name for stream in edits.streams),
        )
        sizes = source_rows(mix, seq_len, rows_by_source)
        self._sizes = np.array([*sizes, *(s.rows for s in edits.streams)], np.int64)
        keys = [stream_key(seed, source.name) for source in self.configs]
        keys += [stream_key(seed, "edit", s.name, s.packing) for s in edits.streams]
        self._keys = np.array(keys, np.uint64)
        split = len(mix.mode1.sources)
        self._first_source = {1: 0, 2: split}
        mode2_rows = self.integral.mode2_rows
        self._parts = {
            1: apportionment(
                self.configs[:split], sizes[:split], seq_len, lambda row: row - mode2_rows(row)
            ),
            2: apportionment(self.configs[split:], sizes[split:], seq_len, mode2_rows),
        }
        self._mode_rows = {mode: self.mode_rows(mode, total_rows) for mode in (1, 2)}
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

    def mode_rows(self, mode: int, row: int) -> int:
        """Return the number of rows of a mode before row `row` of the run."""
        mode2_rows = self.integral.mode2_rows(row)
        return mode2_rows if mode == 2 else row - mode2_rows

    def size_of(self, source: int) -> int:
        """Return the number of rows that a source holds."""
        return int(self._sizes[source])

    def mode_of(self, source: int) -> int:
        """Return the mode of a source by its index in `source_names`."""
        if source >= len(self.configs):
            return self.edits.streams[source - len(self.configs)].mode
        return 1 if source < self._first_source[2] else 2

    def rows_of_source(self, source: int, end_row: int | None = None) -> int:
        """Return the rows that the run plans to take from a source of the mix before `end_row`.

        Repeats count, and so do places in which edits show something else.
        """
        mode = self.mode_of(source)
        rows = self._mode_rows[mode] if end_row is None else self.mode_rows(mode, end_row)
        return self._parts[mode].counts(rows)[source - self._first_source[mode]]

    def planned_shares(self, row: int) -> list[float]:
        """Return each source's planned share of its mode's rows at a row of the run."""
        return [
            share
            for mode in (1, 2)
            for share in self._parts[mode].shares(min(self.mode_rows(mode, row), self._last(mode)))
        ]

    def rows_seen(self, source: int, source_row: int) -> IntArray:
        """Return the row indices at which a row of a source is shown, ascending.

        Raises ValueError for a row that the source does not have.
        """
        if source >= len(self.configs):
            return np.array([row for row, _ in self.edit_rows(source, source_row)], np.int64)
        size = int(self._sizes[source])
        planned = self.rows_of_source(source)
        epochs = np.arange(-(-planned // size), dtype=np.int64)
        place = invert(
            np.full(len(epochs), source_row), size, epoch_key(self._keys[source], epochs)
        )
        sequence = epochs * size + place
        mode = self.mode_of(source)
        part, placements = self._parts[mode], self.edits.placements[mode]
        rows = []
        for number in sequence[sequence < planned].tolist():
            mode_row = part.mode_row(source - self._first_source[mode], number)
            if not placements.takes(mode_row):
                rows.append(self.integral.row_of(mode, mode_row, self.total_rows))
        return np.array(rows, np.int64)

    def row_of(self, source: int, sequence: int) -> int:
        """Return the row index at which a source of the mix is due with its row `sequence`."""
        mode = self.mode_of(source)
        mode_row = self._parts[mode].mode_row(source - self._first_source[mode], sequence)
        return self.integral.row_of(mode, mode_row, self.total_rows)

    def dry_rows(self) -> Iterator[tuple[int, int]]:
        """Yield (source, row index at which it is due but dry) for all that run dry in the run."""
        for mode in (1, 2):
            for local, mode_row in self._parts[mode].dry:
                if mode_row < self._mode_rows[mode]:
                    row = self.integral.row_of(mode, mode_row, self.total_rows)
                    yield self._first_source[mode] + local, row

    def deal(self, step: int, global_rows: int) -> IntArray:
        """Return a step's dealing: entry p is the offset in the step of the row in slot p.

        Slots are counted micro-batch by micro-batch, in each rank by rank. The permutation is
        keyed by (seed, step) alone, so every layout deals the same rows.
        """
        dealt: IntArray = self.deals(step, step + 1, global_rows)[0]
        return dealt

    def deals(self, begin_step: int, end_step: int, global_rows: int) -> IntArray:
        """Return the dealings of steps begin_step .. end_step - 1, [steps, global_rows]."""
        steps = np.arange(begin_step, end_step)
        keys = np.repeat(epoch_key(stream_key(self.seed, "deal"), steps), global_rows)
        slots = np.tile(np.arange(global_rows), len(steps))
        dealt: IntArray = permute(slots, global_rows, keys).reshape(len(steps), global_rows)
        return dealt

    def _fill(self, begin_row: int, out: Rows) -> None:
        """Compute one window of rows, in place."""
        count = len(out)
        floors = self.integral.mode2_rows_window(begin_row, begin_row + count)
        is_mode2 = floors[1:] > floors[:-1]
        before_mode2 = int(floors[0])
        out.row[:] = np.arange(begin_row, begin_row + count)
        np.add(is_mode2, 1, out=out.mode)
        sequence = out.source_row
        explicit = []
        for mode, mask in ((1, ~is_mode2), (2, is_mode2)):
            where = np.flatnonzero(mask)
            if not where.size:
                continue
            first = before_mode2 if mode == 2 else begin_row - before_mode2
            source, number = self._parts[mode].take(first, where.size)
            out.source[where] = source + self._first_source[mode]
            sequence[where] = number
            if self.edits.placements[mode]:
                placed = self.edits.placements[mode].take(first, where.size)
                at = where[placed.offset]
                out.source[at] = placed.stream + len(self.configs)
                sequence[at] = np.maximum(placed.sequence, 0)
                explicit.append((at, placed.stream_row))
        size = self._sizes[out.source]
        np.floor_divide(sequence, size, out=out.epoch)
        sequence -= out.epoch * size
        key = epoch_key(self._keys[out.source], out.epoch)
        out.source_row[:] = permute(sequence, size, key)
        for at, row in explicit:
            given = row >= 0
            out.source_row[at[given]] = row[given]

    def edit_rows(self, source: int, source_row: int) -> list[tuple[int, str]]:
        """Return (row index, inject or cohort) of all places of a row of an edit's stream."""
        stream, mode = source - len(self.configs), self.mode_of(source)
        if not 0 <= source_row < self._sizes[source]:
            raise ValueError(f"the stream has no row {source_row}")
        placements = self.edits.placements[mode]
        here = placements.explicit
        mine = here.row[(here.stream == stream) & (here.stream_row == source_row)]
        mode_rows = [(row, "inject") for row in mine.tolist()]
        size = int(self._sizes[source])
        for index, cohort in enumerate(placements.cohorts):
            if cohort.stream != stream:
                continue
            for epoch in range(-(-cohort.exposures // size)):
                key = epoch_key(self._keys[source], epoch)
                sequence = epoch * size + int(invert(source_row, size, key)[0])
                if sequence < cohort.exposures:
                    mode_rows.append((placements.rows_of_exposure(index, sequence), "cohort"))
        total = self.total_rows
        return sorted((self.integral.row_of(mode, row, total), kind) for row, kind in mode_rows)

    def _check_supply(self, mode: int) -> None:
        """Refuse a run whose plan asks a mode for more rows than its sources give."""
        needed, given = self._mode_rows[mode], self._parts[mode].rows_max
        for source, row in self.dry_rows():
            if self.configs[source].when_dry == "error" and self.mode_of(source) == mode:
                name, epochs = self.configs[source].name, self.configs[source].epochs_max
                raise DataError(
                    f"source '{name}' in mix.mode{mode}.sources runs dry after epochs_max {epochs} "
                    f"at {self._at(row)} and its when_dry is error; raise epochs_max, lower its "
                    "weight or run.steps, or set when_dry to share or repeat"
                )
        if given is None or needed <= given:
            return
        row = self.integral.row_of(mode, given, self.total_rows)
        if self._parts[mode].is_starved:
            raise ConfigError(
                f"no source in mix.mode{mode}.sources has a weight at {self._at(row)}, where "
                f"mix.mode2_fraction plans Mode {mode} rows; set an earlier onset_tokens, or "
                "weight_points that leave one source above 0"
            )
        raise DataError(
            f"mode {mode} runs dry at {self._at(row)}: the run needs {needed:,} Mode {mode} rows "
            f"and mix.mode{mode}.sources gives {given:,} within epochs_max; raise or unset "
            "epochs_max, add a source, change mix.mode2_fraction or lower run.steps"
        )

    def _last(self, mode: int) -> int:
        return max(self._mode_rows[mode] - 1, 0)

    def _at(self, row: int) -> str:
        return f"row {row:,} ({row * self.seq_len:,} tokens)"
