"""Collect encoded batches into units: sorted runs that a killed preparation need not make again.

Units follow each other through the input; each says where it ends. How they are cut has no
influence on the prepared sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_mode.tokens.prepare.encode import EncodedBatch
from megatron_mode.tokens.prepare.encoded import Block, is_primary
from megatron_mode.tokens.prepare.runs import Run, RunWriter, exclusive_sum, in_order
from megatron_mode.tokens.prepare.sorting import Copies
from megatron_mode.tokens.prepare.verdicts import SHOWN_BAD_LINES

UNIT_BYTES = 48 << 20
"""Payload of a unit; making one takes about twice as much memory."""


class Place(NamedTuple):
    """Name the last line that a unit covers."""

    input_index: int
    line: int


class UnitWriter:
    """Collect batches, and write a unit whenever there is enough."""

    def __init__(self, folder: Path, token_dtype: str) -> None:
        self._folder, self._token_dtype = folder, np.dtype(token_dtype)
        folder.mkdir(exist_ok=True)
        self.runs = list(finished_units(folder))
        self._batches: list[EncodedBatch] = []
        self._size_bytes = 0

    @property
    def end(self) -> Place:
        """Return the last line that finished units cover."""
        return Place(*self.runs[-1].facts["end"]) if self.runs else Place(0, 0)

    def add(self, batch: EncodedBatch) -> None:
        """Take the next batch of the input."""
        self._batches.append(batch)
        self._size_bytes += len(batch.block.tokens) + len(batch.block.flags)
        if self._size_bytes >= UNIT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was collected, if anything."""
        if not self._batches:
            return
        base = self._folder / f"unit-{len(self.runs):06d}"
        facts: dict[str, Any] = {
            "end": self._batches[-1].end,
            "bad_lines": bad_lines_by_input(self._batches),
            "first_bad_lines": first_bad_lines(self._batches),
        }
        with RunWriter(base, self._token_dtype.itemsize) as writer:
            for source, mode, duplicates, block in self._sorted_sources():
                writer.add_source(source, mode, duplicates)
                writer.append(block)
            self.runs.append(writer.finish(**facts))
        self._batches, self._size_bytes = [], 0

    def _sorted_sources(self) -> Iterator[tuple[str, int, int, Block]]:
        """Yield source, mode, copies dropped and the documents left, by source."""
        modes = dict(source for batch in self._batches for source in batch.sources)
        names = sorted(modes)
        records = self._joined_records(names)
        payload = [
            b"".join(getattr(batch.block, kind) for batch in self._batches)
            for kind in ("tokens", "flags", "ids")
        ]
        self._batches.clear()
        width = self._token_dtype.itemsize
        records = records[np.argsort(records["key"], kind="stable")]
        records = records[np.argsort(records["source"], kind="stable")]
        borders = np.searchsorted(records["source"], np.arange(len(names) + 1)).tolist()
        for name, begin, end in zip(names, borders[:-1], borders[1:], strict=True):
            found = records[begin:end]
            kept = found[Copies().is_first(found["key"])]
            duplicates = int(is_primary(found).sum() - is_primary(kept).sum())
            begins, lengths = kept["begin"].astype(np.int64), kept["tokens"].astype(np.int64)
            yield (
                name,
                modes[name],
                duplicates,
                Block(
                    kept,
                    in_order(payload[0], begins * width, lengths * width),
                    in_order(payload[1], begins, lengths),
                    in_order(payload[2], kept["id_begin"].astype(np.int64), kept["id_bytes"]),
                ),
            )

    def _joined_records(self, names: list[str]) -> Any:
        """Return the records of all batches, their sources and offsets those of the unit."""
        tokens = exclusive_sum(np.array([len(b.block.flags) for b in self._batches]))
        ids = exclusive_sum(np.array([len(b.block.ids) for b in self._batches]))
        joined = []
        for batch, token_offset, id_offset in zip(self._batches, tokens, ids, strict=True):
            records = batch.block.records
            numbers = np.array([names.index(name) for name, _ in batch.sources], np.uint32)
            records["source"] = numbers[records["source"]]
            records["begin"] += token_offset
            records["id_begin"] += id_offset
            joined.append(records)
        return np.concatenate(joined)


def bad_lines_by_input(batches: list[EncodedBatch]) -> dict[str, int]:
    """Count the bad lines by input index (as text: JSON has no other keys)."""
    counts: dict[str, int] = {}
    for batch in batches:
        if batch.bad_lines:
            key = str(batch.end[0])
            counts[key] = counts.get(key, 0) + len(batch.bad_lines)
    return counts


def first_bad_lines(batches: list[EncodedBatch]) -> list[tuple[int, int, str]]:
    """Return input index, line and reason of the first bad lines."""
    found = [(b.end[0], number, reason) for b in batches for number, reason in b.bad_lines]
    return found[:SHOWN_BAD_LINES]


def finished_units(folder: Path) -> Iterator[Run]:
    """Yield the complete units of a folder up to the first one missing."""
    number = 0
    while (run := Run.open(folder / f"unit-{number:06d}")) is not None:
        yield run
        number += 1
