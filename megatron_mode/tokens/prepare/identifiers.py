"""Make the ids of a source unique in bounded memory.

The first document of an id keeps it; the others become id#2, id#3, ..., passing over ids that
exist. All ids are sorted by their digest, each followed by the numbers that others have already
put behind it ("a#2" exists: 2 is taken for "a").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.prepare.encoded import (
    DIGEST_BYTES,
    DOCUMENT_KEY_BYTES,
    Records,
    document_keys,
    key_part,
    positions,
)
from megatron_mode.tokens.prepare.runs import RecordFile
from megatron_mode.tokens.prepare.sorting import Entries, ExternalSort

# Digest of an id; 0 and the position of a document with it, or 1 and a number that is taken.
ID_ENTRY = np.dtype([("key", "S25"), ("document", f"S{DOCUMENT_KEY_BYTES}")])
NUMBER_ENTRY = np.dtype([("key", f"S{DOCUMENT_KEY_BYTES}"), ("number", "<u8")])
IS_DOCUMENT, IS_TAKEN = 0, 1
SCANNED_ENTRIES = 1 << 16


class Repeat(NamedTuple):
    """Name two documents of one id by their keys."""

    first: bytes
    second: bytes


class Identifiers:
    """Collect the ids of a source's documents, then number those that repeat one."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._ids = ExternalSort(base.with_name(f"{base.name}.ids"), ID_ENTRY)
        self._numbers = ExternalSort(base.with_name(f"{base.name}.numbers"), NUMBER_ENTRY)
        self._sorted_path = base.with_name(f"{base.name}.ids.sorted")

    def add(self, records: Records) -> None:
        """Take documents, one record of each."""
        documents = document_keys(records)
        self._ids.add(id_entries(records["name"], IS_DOCUMENT, positions(documents), documents))
        taken = records[records["number"] > 0]
        if len(taken):
            nobody = np.zeros(len(taken), documents.dtype)
            self._ids.add(id_entries(taken["base"], IS_TAKEN, taken["number"], nobody))

    def first_repeat(self) -> Repeat | None:
        """Return two documents that share an id, if any do."""
        previous = np.empty(0, ID_ENTRY)
        for entries in self._ids.sorted():
            chain = np.concatenate([previous, entries])
            found = np.flatnonzero(is_repeat(chain))
            if len(found):
                first, second = chain["document"][found[0] - 1], chain["document"][found[0]]
                return Repeat(padded(first), padded(second))
            previous = chain[-1:]
        return None

    def number(self) -> Numbers:
        """Give the repeats their numbers, once all documents are there."""
        with self._sorted_path.open("wb") as stream:
            for entries in self._ids.sorted():
                stream.write(entries.tobytes())
        self._ids.remove()
        for entries in self._numbered():
            self._numbers.add(entries)
        return Numbers(self._numbers.sorted())

    def remove(self) -> None:
        """Remove the files."""
        self._ids.remove()
        self._numbers.remove()
        self._sorted_path.unlink(missing_ok=True)

    def _numbered(self) -> Iterator[Entries]:
        reader = RecordFile(self._sorted_path, ID_ENTRY, 0, self._ids.count)
        previous = np.empty(0, ID_ENTRY)
        current = b""
        free: Iterator[int] = iter(())
        while len(entries := reader.read(SCANNED_ENTRIES)):
            chain = np.concatenate([previous, entries])
            repeats = chain[is_repeat(chain)]
            numbers = np.empty(len(repeats), NUMBER_ENTRY)
            numbers["key"] = repeats["document"]
            for index, digest in enumerate(key_part(repeats["key"], 0, DIGEST_BYTES).tolist()):
                if digest != current:
                    current = digest
                    free = free_numbers(self._taken_numbers(digest.ljust(DIGEST_BYTES, b"\0")))
                numbers["number"][index] = next(free)
            yield numbers
            previous = chain[-1:]

    def _taken_numbers(self, digest: bytes) -> Iterator[int]:
        """Yield the numbers that stand behind an id somewhere, in order."""
        begin = self._position_of(digest + bytes([IS_TAKEN]))
        reader = RecordFile(self._sorted_path, ID_ENTRY, begin, self._ids.count)
        while len(entries := reader.read(SCANNED_ENTRIES)):
            same = key_part(entries["key"], 0, DIGEST_BYTES + 1) == digest + bytes([IS_TAKEN])
            keys = entries["key"][same]
            yield from key_part(keys, DIGEST_BYTES + 1, 25).view(">u8").tolist()
            if not same.all():
                return

    def _position_of(self, key: bytes) -> int:
        """Return the first entry that is not below a key."""
        low, high = 0, self._ids.count
        while low < high:
            middle = (low + high) // 2
            entry = RecordFile(self._sorted_path, ID_ENTRY, middle, middle + 1).read(1)
            if padded(entry["key"][0], 25) < key:
                low = middle + 1
            else:
                high = middle
        return low


class Numbers:
    """Look up the numbers of documents whose keys come in order."""

    def __init__(self, batches: Iterator[Entries]) -> None:
        self._batches = batches
        self._held = np.empty(0, NUMBER_ENTRY)
        self._at_end = False

    def of(self, keys: NDArray[np.bytes_]) -> NDArray[np.uint64]:
        """Return the number of each document, 0 where it keeps its id."""
        numbers = np.zeros(len(keys), np.uint64)
        last = keys[-1]
        while not self._at_end and not (len(self._held) and self._held["key"][-1] >= last):
            more = next(self._batches, None)
            if more is None:
                self._at_end = True
            else:
                self._held = np.concatenate([self._held, more])
        self._held = self._held[np.searchsorted(self._held["key"], keys[0]) :]
        if len(self._held):
            places = np.searchsorted(self._held["key"], keys).clip(max=len(self._held) - 1)
            found = self._held["key"][places] == keys
            numbers[found] = self._held["number"][places[found]]
        return numbers


def id_entries(
    digests: NDArray[np.bytes_],
    kind: int,
    numbers: NDArray[np.uint64],
    documents: NDArray[np.bytes_],
) -> Entries:
    """Return the entries of documents or of numbers taken."""
    entries = np.empty(len(digests), ID_ENTRY)
    rows = np.empty((len(digests), 25), np.uint8)
    digests = np.ascontiguousarray(digests)
    rows[:, :DIGEST_BYTES] = digests.view(np.uint8).reshape(len(digests), DIGEST_BYTES)
    rows[:, DIGEST_BYTES] = kind
    rows[:, DIGEST_BYTES + 1 :] = numbers.astype(">u8").view(np.uint8).reshape(len(digests), 8)
    entries["key"] = rows.view("S25").reshape(len(digests))
    entries["document"] = documents
    return entries


def is_repeat(chain: Entries) -> NDArray[np.bool_]:
    """Mark the documents whose id the entry before has too."""
    digests = key_part(chain["key"], 0, DIGEST_BYTES)
    kinds = key_part(chain["key"], DIGEST_BYTES, DIGEST_BYTES + 1).view(np.uint8)
    marks = np.zeros(len(chain), bool)
    marks[1:] = (digests[1:] == digests[:-1]) & (kinds[1:] == IS_DOCUMENT)
    return marks


def free_numbers(taken: Iterable[int]) -> Iterator[int]:
    """Yield 2, 3, ... without the ascending numbers that are taken."""
    number = 2
    for other in taken:
        while number < other:
            yield number
            number += 1
        number = max(number, other + 1)
    yield from itertools.count(number)


def padded(key: bytes, size_bytes: int = DOCUMENT_KEY_BYTES) -> bytes:
    """Return a key with the zeros at its end that numpy cuts off."""
    return bytes(key).ljust(size_bytes, b"\0")
