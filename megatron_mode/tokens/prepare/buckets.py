"""Sort what memory cannot hold: spread rows over buckets by a prefix of their hash.

Rows begin with a hash, so that equal stretches of its range hold about equally many. Bucket b is
one such stretch and one file, small enough to be sorted in memory:

    sorted rows   |--0--|-1-|--2--|      each stretch is appended to the file of its bucket
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.prepare.units import Block, Records

BUCKET_BYTES = 4 << 20
"""Size of a bucket, on average; buckets of a source beyond 16 GiB are larger."""
MOST_BUCKETS = 1 << 12  # each unit is appended to all of them
SCANNED_ENTRIES = 1 << 16
# An id: a document that has it (0 and its position), or a number that is taken behind it (1).
IS_DOCUMENT, IS_TAKEN = 0, 1
ENTRY = np.dtype([("name", "S16"), ("kind", "u1"), ("value", ">u8"), ("prefix", "S8")])
# The number of a document that repeats an id; the prefix of its key says in which bucket it is.
NUMBER = np.dtype([("prefix", "S8"), ("position", ">u8"), ("number", ">u8")])


class Buckets:
    """Append sorted rows, and the payload where rows are records, to one file a bucket."""

    def __init__(self, folder: Path, count: int, row: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        folder.mkdir(parents=True)
        self._folder, self._row, self.count = folder, row, count
        self._borders = np.array([-(-(number << 64) // count) for number in range(count)], "u8")

    def add(self, rows: NDArray[Any], payload: bytes = b"") -> None:
        """Take sorted rows; with a payload their `size` says how much of it is of each."""
        prefixes = rows[self._row.names[0]].astype("S8").view(">u8").astype("u8")
        cuts = [*np.searchsorted(prefixes, self._borders).tolist(), len(rows)]
        ends = [0, *np.cumsum(rows["size"], dtype=np.int64).tolist()] if payload else []
        for bucket, (begin, end) in enumerate(itertools.pairwise(cuts)):
            if begin == end:
                continue
            with (self._folder / str(bucket)).open("ab") as stream:
                stream.write(rows[begin:end].tobytes())
            if payload:
                with (self._folder / f"{bucket}.payload").open("ab") as stream:
                    stream.write(memoryview(payload)[ends[begin] : ends[end]])

    def rows(self, bucket: int) -> NDArray[Any]:
        """Return the rows of a bucket as they were added; they stay on the disk."""
        path = self._folder / str(bucket)
        return np.memmap(path, self._row, "r+") if path.exists() else np.empty(0, self._row)

    def take(self, bucket: int) -> Block:
        """Return the documents of a bucket as they were added, and free their disk space."""
        records, path = np.array(self.rows(bucket)), self._folder / f"{bucket}.payload"
        payload = path.read_bytes() if path.exists() else b""
        for file in (path, self._folder / str(bucket)):
            file.unlink(missing_ok=True)
        return Block(records, payload)


class Identifiers:
    """Make the ids of a source unique in bounded memory.

    The first document of an id keeps it; the others become id#2, id#3, ..., passing over ids that
    exist. All ids are sorted by their digest, each followed by the numbers that others have already
    put behind it ("a#2" exists: 2 is taken for "a").
    """

    def __init__(self, folder: Path, documents: int, buckets: int) -> None:
        """Expect so many documents, in so many buckets."""
        count = 1 + 2 * documents * ENTRY.itemsize // BUCKET_BYTES
        self._ids = Buckets(folder / "ids", count, ENTRY)
        self._numbers = Buckets(folder / "numbers", buckets, NUMBER)

    def add(self, records: Records) -> None:
        """Take documents, one record of each."""
        taken = records[records["number"] > 0]
        entries = np.zeros(len(records) + len(taken), ENTRY)
        documents, numbers = entries[: len(records)], entries[len(records) :]
        documents["name"], documents["value"] = records["name"], records["at"]
        documents["prefix"] = records["digest"].astype("S8")
        numbers["name"], numbers["value"] = taken["base"], taken["number"]
        numbers["kind"] = IS_TAKEN
        self._ids.add(in_order(entries))

    def repeats(self) -> Iterator[tuple[int, int, bytes, int]]:
        """Yield where a document and the next one of the same id are, its prefix and number."""
        current, free = b"", iter(range(0))
        for bucket in range(self._ids.count):
            found = in_order(self._ids.rows(bucket))
            for begin in range(0, len(found), SCANNED_ENTRIES):
                chain = found[max(0, begin - 1) : begin + SCANNED_ENTRIES]
                same = chain["name"][1:] == chain["name"][:-1]
                for index in np.flatnonzero(same & (chain["kind"][1:] == IS_DOCUMENT)):
                    before, repeat = chain[index : index + 2]
                    if repeat["name"] != current:
                        current, free = repeat["name"], free_numbers(taken_numbers(found, repeat))
                    yield int(before["value"]), int(repeat["value"]), repeat["prefix"], next(free)

    def number(self) -> None:
        """Give the repeats their numbers, once all documents are there."""
        rows = ((prefix, at, number) for _, at, prefix, number in self.repeats())
        while batch := sorted(itertools.islice(rows, SCANNED_ENTRIES)):
            self._numbers.add(np.array(batch, NUMBER))

    def numbers_of(self, bucket: int, records: Records) -> list[int]:
        """Return the number of each document of a bucket, 0 where it keeps its id."""
        rows = self._numbers.rows(bucket)
        known = dict(zip(rows["position"].tolist(), rows["number"].tolist(), strict=True))
        return [known.get(at, 0) for at in records["at"].tolist()]


def in_order(entries: NDArray[np.void]) -> NDArray[np.void]:
    """Sort entries in place, on the disk where they are there."""
    entries.view(f"S{ENTRY.itemsize}").sort()
    return entries


def taken_numbers(entries: NDArray[np.void], like: np.void) -> Iterator[int]:
    """Yield the numbers that are taken behind the id of an entry, in order."""
    name = bytes(like["name"]).ljust(ENTRY["name"].itemsize, b"\0")
    flat = entries.view(f"S{ENTRY.itemsize}")
    begin, end = (flat.searchsorted(name + bytes([k])) for k in (IS_TAKEN, IS_TAKEN + 1))
    yield from map(int, entries["value"][begin:end])


def free_numbers(taken: Iterable[int]) -> Iterator[int]:
    """Yield 2, 3, ... without the ascending numbers that are taken."""
    number = 2
    for other in taken:
        yield from range(number, other)
        number = max(number, other + 1)
    yield from itertools.count(number)
