"""Plan the controlled edits of a run: which rows show something else, which documents change.

Injections and cohorts become placements over the rows of their mode; their sources are streams of
their own behind those of the mix. Dropped and replaced documents keep their place and length, so
they are remembered by document and leave every row where it was.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from megatron_mode.config.mix import CohortConfig, InjectConfig, MixConfig
from megatron_mode.errors import ConfigError
from megatron_mode.mix.edits.placement import Explicit, Placements, add_cohort
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.packing import PackingName
from megatron_mode.mix.permutation import epoch_key, permute, stream_key
from megatron_mode.mix.schedule import Integral

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
    action: Literal["drop", "replace"]
    by: str | None = None
    by_rows: tuple[int, ...] = ()
    """Those of `rows` that read any of the document put in its place."""


@dataclass(frozen=True)
class PlannedEdits:
    """Hold what edits do to an order."""

    streams: Sequence[EditStream] = ()
    placements: Mapping[int, Placements] = field(
        default_factory=lambda: {1: Placements(), 2: Placements()}
    )
    changed: Sequence[ChangedDocument] = ()
    notes: Sequence[str] = ()
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


def plan_edits(
    mix: MixConfig,
    integral: Integral,
    streams: Sequence[EditStream],
    documents: Mapping[str, int],
    changed: Sequence[ChangedDocument] = (),
    *,
    global_rows: int,
    seed: int,
) -> PlannedEdits:
    """Place the injections, then the cohorts in config order.

    `streams` are those that they name, in this order; `documents` gives the number of each injected
    SOURCE/ID. Raises ConfigError where there is no room.
    """
    steps = integral.total_rows // global_rows

    def before(mode: int, step: int) -> int:
        return integral.mode_rows(mode, step * global_rows)

    number = {(stream.name, stream.packing): n for n, stream in enumerate(streams)}
    explicit: dict[int, dict[int, tuple[int, int]]] = {1: {}, 2: {}}
    notes: list[str] = []
    for injection in mix.edits.inject:
        document = injection.document
        stream = number[document.partition("/")[0], "document"]
        mode, key = streams[stream].mode, stream_key(seed, "inject", document)
        ahead = functools.partial(before, mode)
        for step in injection_steps(injection):
            row, shown = _free_place(ahead, (step, steps), key, explicit[mode])
            explicit[mode][row] = (stream, documents[document])
            notes += _injection_notes(document, mode, step, shown, steps)
    placements = {mode: Placements(_explicit(explicit[mode])) for mode in (1, 2)}
    windows = []
    for cohort in mix.edits.cohorts:
        stream = number[cohort.source, cohort.packing]
        mode = streams[stream].mode
        begin, end = cohort_steps(cohort, steps)
        exposures = streams[stream].rows * cohort.exposures if end > begin else 0
        window = (before(mode, begin), before(mode, end))
        placements[mode] = add_cohort(placements[mode], window, exposures, stream, cohort.source)
        windows.append([cohort.source, cohort.packing, begin, end, exposures])
    record = _record(streams, placements, windows, changed)
    return PlannedEdits(streams, placements, changed, notes, documents, record)


def _injection_notes(document: str, mode: int, asked: int, shown: int, steps: int) -> list[str]:
    """Say where an injection is not shown when asked; raise ConfigError where it never is."""
    if shown == steps:
        raise ConfigError(
            f"mix.edits.inject shows {document} at step {asked}, but the run has no free row of "
            f"mode {mode} from there on; choose an earlier step or lengthen the run"
        )
    if shown == asked:
        return []
    reason = f"the first free row of mode {mode} is there"
    return [f"{document} is shown at step {shown}, not {asked}: {reason}"]


def _record(
    streams: Sequence[EditStream],
    placements: Mapping[int, Placements],
    windows: Sequence[object],
    changed: Sequence[ChangedDocument],
) -> dict[str, object]:
    record = {
        "mix.edits.inject": [
            [mode, row, streams[stream].name, document]
            for mode, placed in placements.items()
            for row, stream, document in np.stack(placed.explicit, axis=1).tolist()
        ],
        "mix.edits.cohorts": windows,
        "mix.edits.streams": [list(stream) for stream in streams],
        "mix.edits.changed": [[c.name, c.document, c.action, c.by] for c in changed],
    }
    return {key: value for key, value in record.items() if value}


def injection_steps(injection: InjectConfig) -> Sequence[int]:
    """Return the steps at which an injection asks to be shown."""
    first, every = injection.first_step, injection.every_steps
    return injection.steps or range(first, first + injection.count * every, every)


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
    before: Callable[[int], int], window: tuple[int, int], key: int, taken: Container[int]
) -> tuple[int, int]:
    """Return (row of the mode, step): a drawn row of the first step, or the next that is free.

    `before(step)` counts the mode's rows before a step. The step is the window's end where no row
    is free.
    """
    step, steps = window
    while (begin := before(step)) < before(steps):
        size = before(step + 1) - begin
        for place in (
            begin + permute(np.arange(size), max(size, 1), epoch_key(key, step))
        ).tolist():
            if place not in taken:
                return place, step
        # Steps without a row of the mode are passed over at once.
        step = step + 1 if size else bisect_right(range(steps), begin, key=before) - 1
    return 0, steps


def _explicit(places: Mapping[int, tuple[int, int]]) -> Explicit:
    columns = np.array([(row, *places[row]) for row in sorted(places)], np.int64)
    return Explicit(*columns.reshape(-1, 3).T)
