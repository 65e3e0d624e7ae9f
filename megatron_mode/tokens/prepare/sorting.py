"""Merge sorted files of fixed-size entries in bounded memory, whatever their keys.

An entry is a numpy record whose first field, `key`, is bytes. A piece of every file is held; all
that is not above the least last key of the pieces is complete, and leaves in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.prepare.encoded import DIGEST_BYTES, DOCUMENT_KEY_BYTES, key_part
from megatron_mode.tokens.prepare.runs import RecordFile

Entries = NDArray[Any]
HELD_ENTRIES = 1 << 15
SPILL_ENTRIES = 1 << 16
MOST_FILES = 256


class Reader(Protocol):
    """Give the entries of something sorted, piece by piece."""

    def read(self, count: int) -> Entries:
        """Return up to count entries, none at the end."""
        ...


def merge_sorted(readers: Sequence[Reader]) -> Iterator[tuple[Entries, NDArray[np.intp]]]:
    """Yield (entries, the reader of each) in the order of their keys; ties in reader order."""
    count = max(16, HELD_ENTRIES // max(1, len(readers)))
    pieces = [reader.read(count) for reader in readers]
    while any(map(len, pieces)):
        limit = min(piece["key"][-1] for piece in pieces if len(piece))
        taken: list[Entries] = []
        for index, piece in enumerate(pieces):
            end = int(np.searchsorted(piece["key"], limit, side="right"))
            taken.append(piece[:end])
            pieces[index] = piece[end:] if end < len(piece) else readers[index].read(count)
        entries = np.concatenate(taken)
        origin = np.repeat(np.arange(len(taken)), [len(part) for part in taken])
        order = np.argsort(entries["key"], kind="stable")
        yield entries[order], origin[order]


class Copies:
    """Find later copies among sorted records, over the borders of batches."""

    def __init__(self) -> None:
        self._first: NDArray[np.bytes_] | None = None

    def is_first(self, keys: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Mark the records of the first document with its digest."""
        documents = key_part(keys, 0, DOCUMENT_KEY_BYTES)
        before = documents[:1] if self._first is None else self._first
        chain = np.concatenate([before, documents])
        digests = key_part(chain, 0, DIGEST_BYTES)
        is_new = np.concatenate([[True], digests[1:] != digests[:-1]])
        first = np.maximum.accumulate(np.where(is_new, np.arange(len(chain)), 0))
        last = int(first[-1])
        self._first = chain[last : last + 1]
        kept: NDArray[np.bool_] = (chain == chain[first])[1:]
        return kept


class ExternalSort:
    """Sort any number of entries; what does not fit in memory lies in files."""

    def __init__(self, base: Path, dtype: np.dtype[Any]) -> None:
        self._base, self._dtype = base, dtype
        self._held: list[Entries] = []
        self._held_count = 0
        self._files: list[tuple[Path, int]] = []
        self._made = 0
        self.count = 0

    def add(self, entries: Entries) -> None:
        """Take entries in any order."""
        self._held.append(entries)
        self._held_count += len(entries)
        self.count += len(entries)
        if self._held_count >= SPILL_ENTRIES:
            self._spill()

    def sorted(self) -> Iterator[Entries]:
        """Yield the entries in order."""
        if not self._files:
            if self._held:
                yield self._sort_held()
            return
        if self._held:
            self._spill()
        while len(self._files) > MOST_FILES:
            group, self._files = self._files[:MOST_FILES], self._files[MOST_FILES:]
            self._files.append(
                self._write(entries for entries, _ in merge_sorted(readers(group, self._dtype)))
            )
            for path, _ in group:
                path.unlink()
        for entries, _ in merge_sorted(readers(self._files, self._dtype)):
            yield entries

    def remove(self) -> None:
        """Remove the files."""
        for path, _ in self._files:
            path.unlink(missing_ok=True)
        self._files.clear()
        self._held.clear()

    def _sort_held(self) -> Entries:
        entries = np.concatenate(self._held)
        return entries[np.argsort(entries["key"], kind="stable")]

    def _spill(self) -> None:
        self._files.append(self._write(iter([self._sort_held()])))
        self._held, self._held_count = [], 0

    def _write(self, batches: Iterator[Entries]) -> tuple[Path, int]:
        path = self._base.with_name(f"{self._base.name}.{self._made}")
        self._made += 1
        count = 0
        with path.open("wb") as stream:
            for entries in batches:
                stream.write(entries.tobytes())
                count += len(entries)
        return path, count


def readers(files: Sequence[tuple[Path, int]], dtype: np.dtype[Any]) -> list[RecordFile]:
    """Return a reader of each (file, number of entries)."""
    return [RecordFile(path, dtype, 0, count) for path, count in files]
