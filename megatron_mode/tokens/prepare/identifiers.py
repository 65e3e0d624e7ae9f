"""Make the ids of a source unique in bounded memory.

The first document of an id keeps it; the others become id#2, id#3, ..., passing over ids that
exist. All ids are sorted by their digest, each followed by the numbers that others have already
put behind it ("a#2" exists: 2 is taken for "a").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.prepare.buckets import Spread
from megatron_mode.tokens.prepare.records import (
    DIGEST_BYTES,
    DOCUMENT_KEY_BYTES,
    Records,
    Rows,
    as_rows,
    document_keys,
)

# Digest of an id; 0 and the position of a document with it, or 1 and a number that is taken; the
# digest of the document.
IS_DOCUMENT, IS_TAKEN = 0, 1
NUMBER_END = DIGEST_BYTES + 1 + 8
ENTRY_BYTES = NUMBER_END + DIGEST_BYTES
SCANNED_ENTRIES = 1 << 16


class Identifiers:
    """Collect the ids of a source's documents, then number those that repeat one."""

    def __init__(self, folder: Path, borders: NDArray[np.uint64]) -> None:
        self._buckets = len(borders)
        self._ids = Spread(folder / "ids", ENTRY_BYTES, borders)
        self._numbers = Spread(folder / "numbers", DOCUMENT_KEY_BYTES + 8, borders)

    def add(self, records: Records) -> None:
        """Take documents, one record of each."""
        keys = as_rows(document_keys(records))
        self._ids.add(entries(records["name"], IS_DOCUMENT, keys[:, DIGEST_BYTES:], keys))
        taken = records[records["number"] > 0]
        numbers = as_rows(taken["number"].astype(">u8"))
        self._ids.add(entries(taken["base"], IS_TAKEN, numbers, np.zeros_like(keys[: len(taken)])))

    def repeats(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield the keys of the document before and of one with the same id, and its number."""
        current, free = b"", iter(range(0))
        for bucket in range(self._buckets):
            found = self._ids.read(bucket)
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
        while batch := list(itertools.islice(rows, SCANNED_ENTRIES)):
            joined = np.frombuffer(b"".join(batch), np.uint8)
            self._numbers.add(joined.reshape(len(batch), -1))

    def numbers_of(self, bucket: int, records: Records) -> NDArray[np.uint64]:
        """Return the number of each document of a bucket, 0 where it keeps its id."""
        rows = self._numbers.read(bucket)
        keys = np.ascontiguousarray(rows[:, :DOCUMENT_KEY_BYTES])
        known = dict(
            zip(
                keys.view(f"S{DOCUMENT_KEY_BYTES}").ravel().tolist(),
                np.ascontiguousarray(rows[:, DOCUMENT_KEY_BYTES:]).view(">u8").ravel().tolist(),
                strict=True,
            )
        )
        found = [known.get(key, 0) for key in document_keys(records).tolist()]
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
        while number < other:
            yield number
            number += 1
        number = max(number, other + 1)
    yield from itertools.count(number)
