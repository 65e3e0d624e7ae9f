"""Plan the controlled edits of a run: which rows show something else, which documents change.

Injections and cohorts become placements over the rows of their mode; their sources are streams of
their own behind those of the mix. Dropped and replaced documents keep their place and length, so
they are remembered by document and leave every row where it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from megatron_mode.config.mix import CohortConfig, InjectConfig, MixConfig
from megatron_mode.errors import ConfigError
from megatron_mode.mix.edits.placement import Explicit, Placements, add_cohort
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.permutation import epoch_key, permute, stream_key
from megatron_mode.mix.schedule import Integral

PackingName = Literal["stream", "whole", "document"]
Action = Literal["drop", "replace"]
ACTIONS = ("drop", "replace")


class EditStream(NamedTuple):
    """Name a source that only edits read, with its packing, its rows and its mode."""

    name: str
    packing: PackingName
    rows: int
    mode: int


class ChangedDocument(NamedTuple):
    """Hold a document of the mix that is dropped or replaced.

    `source` is its index in Order.source_names, [begin_token, end_token) its place in the stream,
    `rows` the source rows that read it.
    """

    name: str
    source: int
    document: int
    begin_token: int
    end_token: int
    rows: tuple[int, ...]
    action: Action
    by: str | None = None
    by_rows: tuple[int, ...] = ()
    """Those of `rows` that read any of the document put in its place."""


@dataclass(frozen=True)
class PlannedEdits:
    """Hold what edits do to an order."""

    streams: tuple[EditStream, ...] = ()
    placements: Mapping[int, Placements] = field(
        default_factory=lambda: {mode: Placements.none() for mode in (1, 2)}
    )
    changed: tuple[ChangedDocument, ...] = ()
    notes: tuple[str, ...] = ()
    documents: Mapping[str, int] = field(default_factory=dict)
    """Number of each injected document, by SOURCE/ID."""
    record: Mapping[str, object] = field(default_factory=dict)
    """What of it a resumed run must find again, JSON-ready."""

    def changes(self, row: IntArray, source: IntArray, source_row: IntArray) -> IntArray:
        """Return [K, 4]: row index, source, document and -1 (drop) or -2 (replace) in these rows.

        Ascending by row, then in the order of `changed`.
        """
        found = [
            (at, *change)
            for at, s, r in zip(row.tolist(), source.tolist(), source_row.tolist(), strict=True)
            for change in self._changes_of_row.get((s, r), ())
        ]
        return np.array(found, np.int64).reshape(-1, 4)

    @functools.cached_property
    def _changes_of_row(self) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
        table: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for document in self.changed:
            change = (document.source, document.document, -1 - ACTIONS.index(document.action))
            for row in document.rows:
                table.setdefault((document.source, row), []).append(change)
        return table


NO_EDITS = PlannedEdits()


class Clock(NamedTuple):
    """Turn steps into rows of a mode."""

    integral: Integral
    global_rows: int
    steps: int
    seed: int

    def mode_rows(self, mode: int, step: int) -> int:
        """Return the number of rows of a mode before a step."""
        row = step * self.global_rows
        mode2_rows = self.integral.mode2_rows(row)
        return mode2_rows if mode == 2 else row - mode2_rows


def plan_edits(
    mix: MixConfig,
    clock: Clock,
    streams: Mapping[tuple[str, PackingName], EditStream],
    document_number: Callable[[str], int],
    changed: Sequence[ChangedDocument] = (),
) -> PlannedEdits:
    """Place the injections, then the cohorts in config order.

    `streams` holds an entry for each (source, packing) that they name, `document_number` gives the
    number of SOURCE/ID. Raises ConfigError where there is no room.
    """
    edits = mix.edits
    used: list[EditStream] = []

    def index_of(name: str, packing: PackingName) -> int:
        stream = streams[name, packing]
        if stream not in used:
            used.append(stream)
        return used.index(stream)

    explicit: dict[int, dict[int, tuple[int, int]]] = {1: {}, 2: {}}
    notes: list[str] = []
    documents: dict[str, int] = {}
    for injection in edits.inject:
        name = injection.document.partition("/")[0]
        stream = index_of(name, "document")
        number = documents[injection.document] = document_number(injection.document)
        mode = used[stream].mode
        for step in injection_steps(injection):
            place, shown = _free_place(clock, mode, step, injection.document, explicit[mode])
            explicit[mode][place] = (stream, number)
            if shown != step:
                notes.append(
                    f"{injection.document} is shown at step {shown}, not {step}: the first free "
                    f"row of mode {mode} is there"
                )
    placements = {mode: Placements(_explicit(explicit[mode])) for mode in (1, 2)}
    windows = []
    for cohort in edits.cohorts:
        stream = index_of(cohort.source, cohort.packing)
        mode, rows = used[stream].mode, used[stream].rows
        begin, end = cohort_steps(cohort, clock.steps)
        exposures = rows * cohort.exposures if end > begin else 0
        window = (clock.mode_rows(mode, begin), clock.mode_rows(mode, end))
        placements[mode] = add_cohort(placements[mode], window, exposures, stream, cohort.source)
        windows.append([cohort.source, cohort.packing, begin, end, exposures])
    record = _record(mix, explicit, windows, used, changed)
    return PlannedEdits(tuple(used), placements, tuple(changed), tuple(notes), documents, record)


def injection_steps(injection: InjectConfig) -> list[int]:
    """Return the steps at which an injection asks to be shown."""
    if injection.steps:
        return list(injection.steps)
    return [injection.first_step + n * injection.every_steps for n in range(injection.count)]


def cohort_steps(cohort: CohortConfig, steps: int) -> tuple[int, int]:
    """Return the first step of a cohort's window and the step after its last."""
    if cohort.begin_step is not None and cohort.end_step is not None:
        return cohort.begin_step, cohort.end_step
    thirds = {
        "early": (0, steps // 3),
        "mid": (steps // 3, 2 * steps // 3),
        "late": (2 * steps // 3, steps),
        "spread": (0, steps),
        "never": (0, 0),
    }
    return thirds[cohort.window]


def _free_place(
    clock: Clock, mode: int, step: int, document: str, taken: Mapping[int, object]
) -> tuple[int, int]:
    """Return (row of the mode, step): a drawn row of the step, or the next that is free."""
    end = clock.mode_rows(mode, clock.steps)
    shown = step
    while True:
        begin = clock.mode_rows(mode, shown)
        if begin >= end:
            raise ConfigError(
                f"mix.edits.inject shows {document} at step {step}, but the run has no free row of "
                f"mode {mode} from there on; choose an earlier step or lengthen the run"
            )
        size = clock.mode_rows(mode, shown + 1) - begin
        key = epoch_key(stream_key(clock.seed, "inject", document), shown)
        for place in (begin + permute(np.arange(size), max(size, 1), key)).tolist():
            if place not in taken:
                return place, shown
        # Steps without a row of the mode are passed over at once.
        shown = shown + 1 if size else _step_of(clock, mode, begin)


def _step_of(clock: Clock, mode: int, mode_row: int) -> int:
    row = clock.integral.row_of(mode, mode_row, clock.steps * clock.global_rows)
    return row // clock.global_rows


def _explicit(places: Mapping[int, tuple[int, int]]) -> Explicit:
    rows = sorted(places)
    return Explicit(
        np.array(rows, np.int64),
        np.array([places[row][0] for row in rows], np.int64),
        np.array([places[row][1] for row in rows], np.int64),
    )


def _record(
    mix: MixConfig,
    explicit: Mapping[int, Mapping[int, tuple[int, int]]],
    windows: Sequence[object],
    used: Sequence[EditStream],
    changed: Sequence[ChangedDocument],
) -> dict[str, object]:
    """Return what a resumed run must find again; nothing where there are no edits."""
    record: dict[str, object] = {}
    if mix.edits.inject:
        record["mix.edits.inject"] = [
            [mode, row, used[stream].name, number]
            for mode, places in explicit.items()
            for row, (stream, number) in sorted(places.items())
        ]
    if mix.edits.cohorts:
        record["mix.edits.cohorts"] = list(windows)
    if used:
        record["mix.edits.streams"] = [list(stream) for stream in used]
    if changed:
        record["mix.edits.changed"] = [[c.name, c.document, c.action, c.by] for c in changed]
    return record
