"""Keep encoded documents in units: files that a killed preparation need not write again.

    record    digest, place in the input, output code (`request`), sizes, ids
    payload   tokens, flags and id of each record, one after the other, in the same order

Sorting by digest shuffles, because it is a keyed hash of the contents, and it brings copies
together, the first in input order ahead.

unit-NNNNNN.npz holds a block of each source and the facts about them. Units follow each other
through the input; how they are cut has no influence on the prepared sources.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.prepare.request import HELD_OUT_CHAT

RECORD = np.dtype(
    [
        ("digest", "S16"),
        ("at", "<u8"),
        ("code", "u1"),
        ("tokens", "<u4"),
        ("text_bytes", "<u4"),
        ("size", "<u4"),  # bytes of payload
        ("name", "S16"),  # digest of the id
        ("base", "S16"),  # of an id like "a#2": digest of "a", and number 2
        ("number", "<u8"),
        ("trains_assistant", "?"),  # whether a token of an assistant's turn carries LM loss
    ]
)
UNITS_FOLDER = "units"
LINE_BITS = 40
"""`at` is the input index above this many bits of the line number."""
UNIT_BYTES = 8 << 20
"""Records and payload of a unit; writing one takes about three times as much memory."""
SHOWN_BAD_LINES = 10

Records = NDArray[np.void]


@dataclass
class Block:
    """Hold records and their payload, in the same order."""

    records: Records
    payload: bytes

    @property
    def size_bytes(self) -> int:
        """Return the bytes of both."""
        return self.records.nbytes + len(self.payload)

    def documents(self, token_dtype: str) -> Iterator[tuple[NDArray[Any], bytes, str]]:
        """Yield tokens, flags and id of each record."""
        dtype, end = np.dtype(token_dtype), 0
        sizes = zip(self.records["tokens"].tolist(), self.records["size"].tolist(), strict=True)
        for length, size in sizes:
            begin, end = end, end + size
            flags_begin = begin + length * dtype.itemsize
            flags = self.payload[flags_begin : flags_begin + length]
            identifier = self.payload[flags_begin + length : end].decode()
            yield np.frombuffer(self.payload, dtype, length, begin), flags, identifier

    def take(self, order: NDArray[np.int64]) -> Block:
        """Return the records at these indices with their payload."""
        sizes = self.records["size"].astype(np.int64)
        ends = np.cumsum(sizes)
        pieces = map(slice, (ends - sizes)[order].tolist(), ends[order].tolist())
        payload = b"".join(map(memoryview(self.payload).__getitem__, pieces))
        return Block(self.records[order], payload)


def primary(records: Records) -> Records:
    """Return one record of each document: a held-out dialogue has two."""
    found: Records = records[records["code"] != HELD_OUT_CHAT]
    return found


def without_copies(records: Records) -> tuple[NDArray[np.int64], int]:
    """Return the sorted order of the first document of each digest, and count those left out."""
    order = np.lexsort((records["code"], records["at"].astype(np.uint64), records["digest"]))
    records = records[order]
    is_new = np.ones(len(records), bool)
    is_new[1:] = records["digest"][1:] != records["digest"][:-1]
    first = np.maximum.accumulate(np.where(is_new, np.arange(len(records)), 0))
    kept = records["at"] == records["at"][first]
    return order[kept], len(primary(records[~kept]))


class EncodedBatch(NamedTuple):
    """Hold what became of some lines: rendered documents, and the lines that were bad."""

    path: Path
    end: tuple[int, int]
    """Input index and number of the last line."""
    blocks: dict[tuple[str, int], Block]
    """Documents by source and mode."""
    bad_lines: list[tuple[int, str]]
    ignored: Counter[str]
    """Fields of turns that change no text."""


class Unit(NamedTuple):
    """Know a finished unit by its file and its facts."""

    path: Path
    facts: dict[str, Any]
    """`sources` holds mode, documents, tokens, bytes, copies, codes and more by source."""

    def block(self, source: str) -> Block:
        """Read the documents of a source, sorted by key."""
        with np.load(self.path) as arrays:
            return Block(arrays[f"{source}.records"], arrays[f"{source}.payload"].tobytes())


def unit_path(folder: Path, number: int) -> Path:
    """Return the file of a unit."""
    return folder / UNITS_FOLDER / f"unit-{number:06d}.npz"


def finished_units(folder: Path) -> list[Unit]:
    """Return the complete units in a work folder up to the first one missing."""
    units: list[Unit] = []
    while True:
        path = unit_path(folder, len(units))
        try:
            with np.load(path) as arrays:
                units.append(Unit(path, json.loads(str(arrays["facts"]))))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return units


def are_complete(units: list[Unit]) -> bool:
    """Tell whether the last unit of a preparation is there, which has the digests of its inputs."""
    return bool(units) and units[-1].facts["inputs"] is not None


def write_unit(
    path: Path, batches: list[EncodedBatch], inputs: dict[str, str] | None = None
) -> Unit:
    """Write batches as a unit; the digests of the inputs mark the last one."""
    found = [(b.end[0], *bad_line) for b in batches for bad_line in b.bad_lines]
    arrays: dict[str, Any] = {}
    sources = {}
    for source, mode in sorted({key for batch in batches for key in batch.blocks}):
        blocks = [b.blocks.pop((source, mode)) for b in batches if (source, mode) in b.blocks]
        records = np.concatenate([block.records for block in blocks])
        order, copies = without_copies(records)
        block = Block(records, b"".join(block.payload for block in blocks)).take(order)
        arrays[f"{source}.records"] = block.records
        arrays[f"{source}.payload"] = np.frombuffer(block.payload, np.uint8)
        sources[source] = {
            "mode": mode,
            "documents": len(block.records),
            "tokens": int(block.records["tokens"].sum(dtype=np.int64)),
            "bytes": block.size_bytes,
            "copies": copies,
            "codes": np.unique(block.records["code"]).tolist(),
            "trains_assistant": bool(block.records["trains_assistant"].any()),
        }
    facts = {
        "end": batches[-1].end if batches else None,
        "sources": sources,
        # By input index as text: JSON has no other keys.
        "bad_lines": dict(Counter(str(index) for index, _, _ in found)),
        "first_bad_lines": found[:SHOWN_BAD_LINES],
        "ignored_fields": dict(Counter(n for b in batches for n in b.ignored.elements())),
        "inputs": inputs,
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, facts=np.array(json.dumps(facts)), **arrays)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    return Unit(path, facts)
