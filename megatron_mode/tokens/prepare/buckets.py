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

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.prepare.units import (
    DIGEST_BYTES,
    DOCUMENT_KEY_BYTES,
    RECORD,
    Block,
    Records,
    Rows,
    as_rows,
    document_keys,
)

BUCKET_BYTES = 4 << 20
"""Size of a bucket, on average."""
PREFIX_BYTES = 8
# Digest of an id; 0 and the position of a document with it, or 1 and a number that is taken; the
# digest of the document.
IS_DOCUMENT, IS_TAKEN = 0, 1
NUMBER_END = DIGEST_BYTES + 1 + 8
ENTRY_BYTES = NUMBER_END + DIGEST_BYTES
SCANNED_ENTRIES = 1 << 16


class Buckets:
    """Append sorted rows, and the payload where rows are records, to one file a bucket."""

    def __init__(self, folder: Path, count: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
        folder.mkdir(parents=True)
        self._folder, self.count = folder, count
        self._borders = np.array([-(-(number << 64) // count) for number in range(count)], "u8")

    def add(self, rows: Rows, payload: bytes = b"", payload_ends: Iterable[int] = ()) -> None:
        """Take sorted rows; payload_ends says where the payload of each ends."""
        prefixes = np.ascontiguousarray(rows[:, :PREFIX_BYTES]).view(">u8").ravel().astype("u8")
        cuts = [*np.searchsorted(prefixes, self._borders).tolist(), len(rows)]
        ends = [0, *payload_ends] if payload else []
        for bucket, (begin, end) in enumerate(itertools.pairwise(cuts)):
            if begin == end:
                continue
            with (self._folder / str(bucket)).open("ab") as stream:
                stream.write(rows[begin:end].tobytes())
            if payload:
                with (self._folder / f"{bucket}.payload").open("ab") as stream:
                    stream.write(memoryview(payload)[ends[begin] : ends[end]])

    def add_block(self, block: Block) -> None:
        """Take sorted documents."""
        ends = np.cumsum(block.records["size"], dtype=np.int64).tolist()
        self.add(as_rows(block.records), block.payload, ends)

    def records(self, bucket: int) -> Records:
        """Return the records of a bucket as they were added."""
        path = self._folder / str(bucket)
        return np.fromfile(path, RECORD) if path.exists() else np.empty(0, RECORD)

    def block(self, bucket: int) -> Block:
        """Return the documents of a bucket as they were added."""
        path = self._folder / f"{bucket}.payload"
        return Block(self.records(bucket), path.read_bytes() if path.exists() else b"")

    def remove(self, bucket: int) -> None:
        """Free the space of a bucket on the disk."""
        for name in (f"{bucket}", f"{bucket}.payload"):
            (self._folder / name).unlink(missing_ok=True)

    def sorted_rows(self, bucket: int, width: int) -> Rows:
        """Return the rows of a bucket in order; they stay on the disk."""
        path = self._folder / str(bucket)
        if not path.exists():
            return np.empty((0, width), np.uint8)
        entries = np.memmap(path, f"S{width}", "r+")
        entries.sort()
        return as_rows(entries)


class Identifiers:
    """Make the ids of a source unique in bounded memory.

    The first document of an id keeps it; the others become id#2, id#3, ..., passing over ids that
    exist. All ids are sorted by their digest, each followed by the numbers that others have already
    put behind it ("a#2" exists: 2 is taken for "a").
    """

    def __init__(self, folder: Path, documents: int, buckets: int) -> None:
        """Expect so many documents, in so many buckets."""
        count = 1 + 2 * documents * ENTRY_BYTES // BUCKET_BYTES
        self._ids = Buckets(folder / "ids", count)
        self._numbers = Buckets(folder / "numbers", buckets)

    def add(self, records: Records) -> None:
        """Take documents, one record of each."""
        keys = document_keys(records)
        taken = records[records["number"] > 0]
        numbers = as_rows(taken["number"].astype(">u8"))
        rows = np.concatenate(
            [
                entries(records["name"], IS_DOCUMENT, keys[:, DIGEST_BYTES:], keys),
                entries(taken["base"], IS_TAKEN, numbers, np.zeros_like(keys[: len(taken)])),
            ]
        )
        self._ids.add(as_rows(np.sort(rows.view(f"S{ENTRY_BYTES}").ravel())))

    def repeats(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield the keys of the document before and of one with the same id, and its number."""
        current, free = b"", iter(range(0))
        for bucket in range(self._ids.count):
            found = self._ids.sorted_rows(bucket, ENTRY_BYTES)
            for begin in range(0, len(found), SCANNED_ENTRIES):
                chain = found[max(0, begin - 1) : begin + SCANNED_ENTRIES]
                same = (chain[1:, :DIGEST_BYTES] == chain[:-1, :DIGEST_BYTES]).all(axis=1)
                for index in np.flatnonzero(same & (chain[1:, DIGEST_BYTES] == IS_DOCUMENT)):
                    name = chain[index, :DIGEST_BYTES].tobytes()
                    if name != current:
                        current, free = name, free_numbers(taken_numbers(found, name))
                    before, repeat = map(document_key, chain[index : index + 2])
                    yield before, repeat, next(free)

    def number(self) -> None:
        """Give the repeats their numbers, once all documents are there."""
        rows = (repeat + number.to_bytes(8, "big") for _, repeat, number in self.repeats())
        while batch := sorted(itertools.islice(rows, SCANNED_ENTRIES)):
            self._numbers.add(np.frombuffer(b"".join(batch), np.uint8).reshape(len(batch), -1))

    def numbers_of(self, bucket: int, records: Records) -> NDArray[np.uint64]:
        """Return the number of each document of a bucket, 0 where it keeps its id."""
        rows = self._numbers.sorted_rows(bucket, DOCUMENT_KEY_BYTES + 8)
        if not len(rows):
            return np.zeros(len(records), np.uint64)
        known = {
            row[:DOCUMENT_KEY_BYTES]: int.from_bytes(row[DOCUMENT_KEY_BYTES:], "big")
            for row in map(bytes, rows)
        }
        found = [known.get(key, 0) for key in map(bytes, document_keys(records))]
        return np.array(found, np.uint64)


def entries(names: NDArray[np.bytes_], kind: int, numbers: Rows, keys: Rows) -> Rows:
    """Return the entries of documents or of numbers taken."""
    kinds = np.full((len(names), 1), kind, np.uint8)
    return np.concatenate([as_rows(names), kinds, numbers, keys[:, :DIGEST_BYTES]], axis=1)


def document_key(entry: Rows) -> bytes:
    """Return the key of the document of an entry."""
    return entry[NUMBER_END:].tobytes() + entry[DIGEST_BYTES + 1 : NUMBER_END].tobytes()


def taken_numbers(found: Rows, name: bytes) -> Iterator[int]:
    """Yield the numbers that stand behind an id somewhere, in order."""
    flat = found.view(f"S{ENTRY_BYTES}").ravel()
    begin, end = (int(flat.searchsorted(name + bytes([k]))) for k in (IS_TAKEN, IS_TAKEN + 1))
    for entry in found[begin:end]:
        yield int.from_bytes(entry[DIGEST_BYTES + 1 : NUMBER_END].tobytes(), "big")


def free_numbers(taken: Iterable[int]) -> Iterator[int]:
    """Yield 2, 3, ... without the ascending numbers that are taken."""
    number = 2
    for other in taken:
        yield from range(number, other)
        number = max(number, other + 1)
    yield from itertools.count(number)
