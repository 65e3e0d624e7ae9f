"""Sort and drop copies bucket by bucket: what one bucket holds fits in memory.

The documents of a source have keys that begin with a hash, so that equal stretches of the range of
the hash hold about equally many. Bucket b is one such stretch, and one slice of every sorted unit:

    unit 0   |--0--|-1-|--2--|      bucket 1 = the slices 1 of all units, sorted in memory
    unit 1   |-0-|--1--|-2-|
"""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.prepare.records import (
    RECORD,
    Block,
    Records,
    Rows,
    as_rows,
    sizes_bytes,
    without_copies,
)
from megatron_mode.tokens.prepare.units import PAYLOAD, RECORDS, Unit

BUCKET_BYTES = 8 << 20
"""Records and payload of a bucket, on average."""
SPREAD_BYTES = 4 << 20
PREFIX_BYTES = 8


class Part(NamedTuple):
    """Name one source's records [begin, end) of a unit."""

    records_path: Path
    payload_path: Path
    begin: int
    end: int

    def cut(self, border: bytes, begin: int) -> int:
        """Return the first record from begin on whose key is not below a border."""
        records = np.memmap(self.records_path, RECORD, "r", shape=(self.end,))
        return bisect_left(records, border, begin, self.end, key=itemgetter("key"))

    def read(self, begin: int, end: int) -> Records:
        """Return some of the records."""
        offset = begin * RECORD.itemsize
        return np.fromfile(self.records_path, RECORD, end - begin, offset=offset)


class Buckets:
    """Read the documents of a source in the order of their keys, bucket by bucket."""

    def __init__(self, units: Iterable[Unit], source: str, token_bytes: int) -> None:
        found = [(unit, unit.sources[source]) for unit in units if source in unit.sources]
        self._parts = [Part(u.path(RECORDS), u.path(PAYLOAD), s.begin, s.end) for u, s in found]
        self._token_bytes = token_bytes
        self.documents = sum(span.end - span.begin for _, span in found)
        self._payload_bytes = sum(span.payload_bytes for _, span in found)
        self.duplicates = sum(span.duplicates for _, span in found)
        """Copies dropped on the way into the units."""

    @property
    def borders(self) -> NDArray[np.uint64]:
        """Return the least prefix of a key in each bucket."""
        count = 1 + (self._payload_bytes + self.documents * RECORD.itemsize) // BUCKET_BYTES
        return np.array([-(-(number << 64) // count) for number in range(count)], np.uint64)

    def records(self) -> Iterator[tuple[Records, int]]:
        """Yield the sorted records of each bucket without later copies, and count those."""
        for slices in self._slices():
            yield without_copies(np.concatenate([part.read(*span) for part, *span in slices]))

    def blocks(self) -> Iterator[Block]:
        """Yield each bucket with its payload."""
        for slices in self._slices():
            found, payload = [], bytearray()
            for part, begin, end in slices:
                records = part.read(begin, end)
                if len(records):
                    first = int(records["begin"][0])
                    size = int(sizes_bytes(records, self._token_bytes).sum())
                    records["begin"] -= first
                    records["begin"] += len(payload)
                    with part.payload_path.open("rb") as stream:
                        stream.seek(first)
                        payload += stream.read(size)
                found.append(records)
            yield Block(without_copies(np.concatenate(found))[0], payload)

    def _slices(self) -> Iterator[list[tuple[Part, int, int]]]:
        begins = [part.begin for part in self._parts]
        for border in self.borders[1:].tolist():
            key = border.to_bytes(PREFIX_BYTES, "big").rstrip(b"\0")  # as numpy returns keys
            ends = [p.cut(key, begin) for p, begin in zip(self._parts, begins, strict=True)]
            yield list(zip(self._parts, begins, ends, strict=True))
            begins = ends
        yield [(p, begin, p.end) for p, begin in zip(self._parts, begins, strict=True)]


class Spread:
    """Spread rows of bytes over one file a bucket by their prefix, and read each bucket sorted."""

    def __init__(self, folder: Path, width: int, borders: NDArray[np.uint64]) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        folder.mkdir(parents=True)
        self._folder, self._width, self._borders = folder, width, borders
        self._held: list[Rows] = []
        self._held_bytes = 0

    def add(self, rows: Rows) -> None:
        """Take rows in any order."""
        if len(rows):
            self._held.append(rows)
        self._held_bytes += rows.nbytes
        if self._held_bytes >= SPREAD_BYTES:
            self._spill()

    def read(self, bucket: int) -> Rows:
        """Return the rows of a bucket in order, once all are there; they stay on the disk."""
        self._spill()
        path = self._folder / str(bucket)
        if not path.exists():
            return np.empty((0, self._width), np.uint8)
        entries = np.memmap(path, f"S{self._width}", "r+")
        entries.sort()
        return as_rows(entries)

    def _spill(self) -> None:
        if not self._held:
            return
        rows = np.concatenate(self._held)
        prefixes = np.ascontiguousarray(rows[:, :PREFIX_BYTES]).view(">u8").reshape(len(rows))
        buckets = np.searchsorted(self._borders, prefixes.astype(np.uint64), side="right") - 1
        order = np.argsort(buckets, kind="stable")
        rows = rows[order]
        present, begins = np.unique(buckets[order], return_index=True)
        for bucket, part in zip(present.tolist(), np.split(rows, begins[1:]), strict=True):
            with (self._folder / str(bucket)).open("ab") as stream:
                stream.write(part.tobytes())
        self._held, self._held_bytes = [], 0
