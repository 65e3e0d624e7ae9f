"""Map run row <-> (source, source row).

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
from megatron_mode.mix.apportion import Apportionment, Supply, rows_limit, weight_points
from megatron_mode.mix.edits.overrides import NO_EDITS, PlannedEdits
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.permutation import epoch_key, invert, permute, stream_key
from megatron_mode.mix.schedule import Integral

WINDOW_ROWS = 32_768  # 256 KiB an array; with 8,192, calls cost as much as arithmetic
# A call of `rows` costs 1.5 ms however few rows it is asked for: steps of 8 rows share one.
BLOCK_ROWS = 2048


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
    """Map row indices of a run to rows of its sources; immutable, so threads may share it.

    `source_names`, `modes` and `sizes` (in rows) are those of the sources of the mix, whose plans
    are `configs`, then of the streams that only edits show.
    """

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
        self.seq_len, self.total_rows, self.seed, self.edits = seq_len, total_rows, seed, edits
        self.integral = Integral(mix.mode2_fraction, seq_len, total_rows)
        sections = {1: mix.mode1.sources, 2: mix.mode2.sources}
        self.configs = (*sections[1], *sections[2])
        self._first_source = {1: 0, 2: len(sections[1])}
        self.modes = [mode for mode, sources in sections.items() for _ in sources]
        for mode, config in zip(self.modes, self.configs, strict=True):
            if rows_by_source[config.name] < 1:
                raise DataError(
                    f"source '{config.name}' in mix.mode{mode}.sources has "
                    f"{rows_by_source[config.name]} rows, but at least 1 row of {seq_len} + 1 "
                    "tokens is needed; add text or lower model.seq_len"
                )
        self.modes += [stream.mode for stream in edits.streams]
        names = [config.name for config in self.configs]
        self.source_names = (*names, *(stream.name for stream in edits.streams))
        self.sizes = [rows_by_source[name] for name in names]
        self.sizes += [stream.rows for stream in edits.streams]
        keys = [stream_key(seed, name) for name in names]
        keys += [stream_key(seed, "edit", s.name, s.packing) for s in edits.streams]
        self._size, self._keys = np.array(self.sizes, np.int64), np.array(keys, np.uint64)
        self._parts = {mode: self._apportionment(mode) for mode in (1, 2)}
        self._mode_rows = {mode: self.integral.mode_rows(mode, total_rows) for mode in (1, 2)}
        self._check_supply()

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

    def steps(self, begin: int, end: int, global_rows: int) -> Iterator[Rows]:
        """Yield the rows of steps begin .. end - 1, each in order of their index."""
        size = max(1, BLOCK_ROWS // global_rows)
        for first in range(begin, end, size):
            rows = self.rows(first * global_rows, min(first + size, end) * global_rows)
            for at in range(0, len(rows), global_rows):
                yield rows[slice(at, at + global_rows)]

    def rows_of_source(self, source: int, end_row: int | None = None) -> int:
        """Return the rows that the run plans to take from a source of the mix before `end_row`.

        Repeats count, and so do places in which edits show something else.
        """
        mode = self.modes[source]
        rows = self.integral.mode_rows(mode, self.total_rows if end_row is None else end_row)
        return self._parts[mode].counts(rows)[source - self._first_source[mode]]

    def planned_shares(self, row: int) -> list[float]:
        """Return each source's planned share of its mode's rows at a row of the run."""
        shares = []
        for mode, part in self._parts.items():
            last = max(self._mode_rows[mode] - 1, 0)
            shares += part.shares(min(self.integral.mode_rows(mode, row), last))
        return shares

    def places(self, source: int, source_row: int) -> list[tuple[int, str]]:
        """Return (row index, mix, inject or cohort) of all places that show a row of a source."""
        mode = self.modes[source]
        placements = self.edits.placements[mode]
        if source < len(self.configs):
            planned = self.rows_of_source(source)
            due = (self._mode_row(source, n) for n in self._sequences(source, source_row, planned))
            left = placements.offered
            found = [(row, "mix") for row in due if left(row + 1) > left(row)]
        else:
            stream, explicit = source - len(self.configs), placements.explicit
            mine = (explicit.stream == stream) & (explicit.stream_row == source_row)
            found = [(row, "inject") for row in explicit.row[mine].tolist()]
            for index, cohort in enumerate(placements.cohorts):
                if cohort.stream == stream:
                    shown = self._sequences(source, source_row, cohort.exposures)
                    found += [(placements.row_of_exposure(index, n), "cohort") for n in shown]
        return sorted((self.integral.row_of(mode, row), via) for row, via in found)

    def row_of(self, source: int, sequence: int) -> int:
        """Return the row index at which a source of the mix is due with its row `sequence`."""
        return self.integral.row_of(self.modes[source], self._mode_row(source, sequence))

    def dry_rows(self) -> Iterator[tuple[int, int]]:
        """Yield (source, row index at which it is due but dry) for all that run dry in the run."""
        for mode, part in self._parts.items():
            for local, mode_row in part.dry:
                if mode_row < self._mode_rows[mode]:
                    row = self.integral.row_of(mode, mode_row)
                    yield self._first_source[mode] + local, row

    def deals(self, begin_step: int, end_step: int, global_rows: int) -> IntArray:
        """Return the dealings of steps begin_step .. end_step - 1, [steps, global_rows].

        Entry p of a step is the offset in the step of the row in slot p. Slots are counted
        micro-batch by micro-batch, in each rank by rank. The permutation is keyed by (seed, step)
        alone, so every layout deals the same rows.
        """
        steps = np.arange(begin_step, end_step)
        keys = np.repeat(epoch_key(stream_key(self.seed, "deal"), steps), global_rows)
        slots = np.tile(np.arange(global_rows), len(steps))
        return permute(slots, global_rows, keys).reshape(len(steps), global_rows)

    def _apportionment(self, mode: int) -> Apportionment:
        supplies = []
        for source, config in enumerate(self.configs):
            if self.modes[source] == mode:
                points = [
                    (self.integral.mode_rows(mode, -(-at // self.seq_len)), weight)
                    for at, weight in weight_points(config)
                ]
                supplies.append(Supply(points, rows_limit(config, self.sizes[source])))
        return Apportionment(supplies)

    def _mode_row(self, source: int, sequence: int) -> int:
        mode = self.modes[source]
        local = source - self._first_source[mode]
        return self._parts[mode].mode_row(local, sequence, self._mode_rows[mode])

    def _sequences(self, source: int, source_row: int, count: int) -> list[int]:
        """Return which of the first `count` rows taken from a source are its row `source_row`."""
        size = self.sizes[source]
        epochs = np.arange(-(-count // size), dtype=np.int64)
        key = epoch_key(self._keys[source], epochs)
        sequence = epochs * size + invert(np.full(len(epochs), source_row), size, key)
        return [number for number in sequence.tolist() if number < count]

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
            first = before_mode2 if mode == 2 else begin_row - before_mode2
            source, sequence[where] = self._parts[mode].take(first, where.size)
            out.source[where] = source + self._first_source[mode]
            if self.edits.placements[mode]:
                placed = self.edits.placements[mode].take(first, where.size)
                at = where[placed.offset]
                out.source[at] = placed.stream + len(self.configs)
                sequence[at] = np.maximum(placed.sequence, 0)
                explicit.append((at, placed.stream_row))
        size = self._size[out.source]
        np.floor_divide(sequence, size, out=out.epoch)
        sequence -= out.epoch * size
        key = epoch_key(self._keys[out.source], out.epoch)
        out.source_row[:] = permute(sequence, size, key)
        for at, row in explicit:
            given = row >= 0
            out.source_row[at[given]] = row[given]

    def _check_supply(self) -> None:
        """Refuse a run whose plan asks a mode for more rows than its sources give."""
        for source, row in self.dry_rows():
            config, mode = self.configs[source], self.modes[source]
            if config.when_dry == "error":
                raise DataError(
                    f"source '{config.name}' in mix.mode{mode}.sources runs dry after epochs_max "
                    f"{config.epochs_max} at {self.at(row)} and its when_dry is error; raise "
                    "epochs_max, lower its weight or run.steps, or set when_dry to share or repeat"
                )
        for mode, part in self._parts.items():
            needed, given = self._mode_rows[mode], part.rows_max
            if given is None or needed <= given:
                continue
            at = self.at(self.integral.row_of(mode, given))
            if part.is_starved:
                raise ConfigError(
                    f"no source in mix.mode{mode}.sources has a weight at {at}, where "
                    f"mix.mode2_fraction plans Mode {mode} rows; set an earlier onset_tokens, or "
                    "weight_points that leave one source above 0"
                )
            raise DataError(
                f"mode {mode} runs dry at {at}: the run needs {needed:,} Mode {mode} rows and "
                f"mix.mode{mode}.sources gives {given:,} within epochs_max; raise or unset "
                "epochs_max, add a source, change mix.mode2_fraction or lower run.steps"
            )

    def at(self, row: int) -> str:
        """Say where a row of the run is, for messages."""
        return f"row {row:,} ({row * self.seq_len:,} tokens)"
