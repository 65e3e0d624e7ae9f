"""Collect encoded batches into units: sorted files that a killed preparation need not make again.

    unit-NNNNNN.records   RECORD, by source and key       .payload   in the order of the records
    unit-NNNNNN.json      what is where; its appearance says that the unit is complete

Units follow each other through the input; each says where it ends. How they are cut has no
influence on the prepared sources.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_mode.atomic import write_whole
from megatron_mode.tokens.prepare.encode import EncodedBatch
from megatron_mode.tokens.prepare.records import (
    RECORD,
    Block,
    codes,
    sizes_bytes,
    without_copies,
)
from megatron_mode.tokens.prepare.verdicts import SHOWN_BAD_LINES

UNIT_BYTES = 48 << 20
"""Records and payload of a unit; making one takes about twice as much memory."""
RECORDS, PAYLOAD = ".records", ".payload"


class Place(NamedTuple):
    """Name the last line that a unit covers."""

    input_index: int
    line: int


@dataclass
class Span:
    """Say which records of a unit belong to a source, and how many copies were dropped before."""

    mode: int
    begin: int
    end: int
    payload_bytes: int
    duplicates: int
    codes: list[int]


@dataclass
class Unit:
    """Describe one unit."""

    base: Path
    tokens: int = 0
    sources: dict[str, Span] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Bytes by suffix."""
    facts: dict[str, Any] = field(default_factory=dict)

    def path(self, suffix: str) -> Path:
        """Return one of the files."""
        return self.base.with_name(self.base.name + suffix)

    @classmethod
    def open(cls, base: Path) -> Unit | None:
        """Read a unit's description; None where it is missing or a file is cut off."""
        try:
            stored = json.loads(base.with_name(f"{base.name}.json").read_text(encoding="utf-8"))
            sources = {name: Span(**span) for name, span in stored.pop("sources").items()}
            unit = cls(base, sources=sources, **stored)
            sizes = {suffix: unit.path(suffix).stat().st_size for suffix in (RECORDS, PAYLOAD)}
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return unit if sizes == unit.files else None


class UnitWriter:
    """Collect batches, and write a unit whenever there is enough."""

    def __init__(self, folder: Path, token_dtype: str) -> None:
        self._folder, self._token_bytes = folder, np.dtype(token_dtype).itemsize
        folder.mkdir(exist_ok=True)
        self.units = finished_units(folder)
        self._batches: list[EncodedBatch] = []
        self._size_bytes = 0

    @property
    def end(self) -> Place:
        """Return the last line that finished units cover."""
        return Place(*self.units[-1].facts["end"]) if self.units else Place(0, 0)

    def add(self, batch: EncodedBatch) -> None:
        """Take the next batch of the input."""
        self._batches.append(batch)
        for block in batch.blocks.values():
            self._size_bytes += block.records.nbytes + len(block.payload)
        if self._size_bytes >= UNIT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was collected, if anything."""
        if not self._batches:
            return
        unit = Unit(self._folder / f"unit-{len(self.units):06d}")
        found = [(b.end[0], *bad_line) for b in self._batches for bad_line in b.bad_lines]
        unit.facts = {
            "end": self._batches[-1].end,
            # By input index as text: JSON has no other keys.
            "bad_lines": dict(Counter(str(index) for index, _, _ in found)),
            "first_bad_lines": found[:SHOWN_BAD_LINES],
            "ignored_fields": dict(Counter(n for b in self._batches for n in b.ignored.elements())),
        }
        self._write(unit)
        stored = asdict(unit)
        del stored["base"]
        write_whole(unit.path(".json"), json.dumps(stored))
        self.units.append(unit)
        self._batches, self._size_bytes = [], 0

    def _write(self, unit: Unit) -> None:
        with unit.path(RECORDS).open("wb") as records, unit.path(PAYLOAD).open("wb") as payload:
            for source, mode in sorted({key for b in self._batches for key in b.blocks}):
                found_blocks = [b.blocks.pop((source, mode), None) for b in self._batches]
                block, duplicates = joined([b for b in found_blocks if b], self._token_bytes)
                begin = records.tell() // RECORD.itemsize
                end = begin + len(block.records)
                present = np.unique(codes(block.records)).tolist()
                size_bytes = len(block.payload)
                unit.sources[source] = Span(mode, begin, end, size_bytes, duplicates, present)
                unit.tokens += int(block.records["tokens"].sum(dtype=np.int64))
                block.records["begin"] += payload.tell()
                records.write(block.records.tobytes())
                payload.write(block.payload)
            for suffix, stream in ((RECORDS, records), (PAYLOAD, payload)):
                unit.files[suffix] = stream.tell()
                stream.flush()
                os.fsync(stream.fileno())


def joined(blocks: list[Block], token_bytes: int) -> tuple[Block, int]:
    """Join the documents of a source in order, without copies; count the copies."""
    offset = 0
    for block in blocks:
        block.records["begin"] += offset
        offset += len(block.payload)
    payload = memoryview(b"".join(block.payload for block in blocks))
    records, duplicates = without_copies(np.concatenate([block.records for block in blocks]))
    begins, sizes = records["begin"].astype(np.int64), sizes_bytes(records, token_bytes)
    pieces = map(slice, begins.tolist(), (begins + sizes).tolist())
    records["begin"] = np.cumsum(sizes) - sizes
    return Block(records, b"".join(map(payload.__getitem__, pieces))), duplicates


def finished_units(folder: Path) -> list[Unit]:
    """Return the complete units of a folder up to the first one missing."""
    units: list[Unit] = []
    while (unit := Unit.open(folder / f"unit-{len(units):06d}")) is not None:
        units.append(unit)
    return units
