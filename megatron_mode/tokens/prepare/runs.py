"""Keep sorted documents in files, several sources in one run, and read runs back.

    BASE.records  RECORD, by source and key        BASE.tokens, BASE.flags, BASE.ids  the payload
    BASE.json     what is where; its appearance says that the run is complete

Files are opened for each read, so that the number of runs meets no limit of open files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mode.atomic import write_whole
from megatron_mode.tokens.prepare.encoded import RECORD, Block, Records, codes

PAYLOADS = (".tokens", ".flags", ".ids")
SUFFIXES = (".records", *PAYLOADS)


@dataclass
class SourceSpan:
    """Say which records of a run belong to a source, and how many copies were dropped before."""

    mode: int
    begin: int
    end: int
    duplicates: int
    codes: list[int] = field(default_factory=list)


@dataclass
class Run:
    """Describe one run."""

    base: Path
    token_bytes: int
    """Bytes of one token."""
    sources: dict[str, SourceSpan] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Bytes by suffix."""
    facts: dict[str, Any] = field(default_factory=dict)

    def path(self, suffix: str) -> Path:
        """Return one of the files."""
        return self.base.with_name(self.base.name + suffix)

    @classmethod
    def open(cls, base: Path) -> Run | None:
        """Read a run's description; None where it is missing or its files are not whole."""
        try:
            text = base.with_name(base.name + ".json").read_text(encoding="utf-8")
            stored = json.loads(text)
            sources = {name: SourceSpan(**span) for name, span in stored.pop("sources").items()}
            run = cls(base, sources=sources, **stored)
            sizes = {suffix: run.path(suffix).stat().st_size for suffix in SUFFIXES}
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return run if sizes == run.files else None


class RunWriter:
    """Write a run; nothing counts before `finish`."""

    def __init__(self, base: Path, token_bytes: int) -> None:
        self.run = Run(base, token_bytes)
        self._records = self._tokens = self._ids = 0
        self._streams: dict[str, IO[bytes]] = {}
        for suffix in SUFFIXES:
            self._streams[suffix] = self.run.path(suffix).open("wb")

    def add_source(self, name: str, mode: int, duplicates: int) -> None:
        """Begin a source, ending the one before."""
        self.run.sources[name] = SourceSpan(mode, self._records, self._records, duplicates)

    def append(self, block: Block) -> None:
        """Append documents of the source begun last."""
        records = block.records.copy()
        records["begin"] = self._tokens + exclusive_sum(records["tokens"])
        records["id_begin"] = self._ids + exclusive_sum(records["id_bytes"])
        self._records += len(records)
        self._tokens += len(block.flags)
        self._ids += len(block.ids)
        data = (records.tobytes(), block.tokens, block.flags, block.ids)
        for suffix, part in zip(SUFFIXES, data, strict=True):
            self._streams[suffix].write(part)
        span = next(reversed(self.run.sources.values()))
        span.end = self._records
        span.codes = sorted({*span.codes, *np.unique(codes(records)).tolist()})

    def finish(self, **facts: Any) -> Run:
        """Bring everything to the disk, then the description in one step."""
        run = self.run
        run.facts = facts
        for suffix, stream in self._streams.items():
            run.files[suffix] = stream.tell()
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        stored = asdict(run)
        del stored["base"]
        write_whole(run.path(".json"), json.dumps(stored))
        return run

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams.values():
            stream.close()


def exclusive_sum(lengths: NDArray[Any]) -> NDArray[np.uint64]:
    """Return where each of the pieces begins when they lie one after the other."""
    ends = np.cumsum(lengths, dtype=np.uint64)
    return ends - lengths.astype(np.uint64)


class RecordFile:
    """Read fixed-size entries [begin, end) of a file from front to back."""

    def __init__(self, path: Path, dtype: np.dtype[Any], begin: int, end: int) -> None:
        self._path, self._dtype = path, dtype
        self._next, self._end = begin, end

    def read(self, count: int) -> NDArray[Any]:
        """Return the next entries, none at the end."""
        count = min(count, self._end - self._next)
        offset = self._next * self._dtype.itemsize
        entries = np.fromfile(self._path, self._dtype, count, offset=offset)
        assert len(entries) == count, "a complete run"
        self._next += count
        return entries


class PartOfRun(NamedTuple):
    """Name one source's share of a run: records [begin, end)."""

    base: Path
    token_bytes: int
    begin: int
    end: int

    def path(self, suffix: str) -> Path:
        """Return one of the run's files."""
        return self.base.with_name(self.base.name + suffix)

    def reader(self) -> RecordFile:
        """Return a reader of its records."""
        return RecordFile(self.path(".records"), RECORD, self.begin, self.end)


def parts_of_source(runs: Iterable[Run], source: str) -> list[PartOfRun]:
    """List the shares of a source in those runs that hold it."""
    found = ((run, run.sources[source]) for run in runs if source in run.sources)
    return [PartOfRun(run.base, run.token_bytes, span.begin, span.end) for run, span in found]


def cut(records: Records, limit_bytes: int, token_bytes: int) -> Iterator[slice]:
    """Cut records into slices whose payload stays within a limit, one document at least."""
    sizes = records["tokens"].astype(np.int64) * (token_bytes + 1) + records["id_bytes"]
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(records):
        done = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, done + limit_bytes, side="right"))
        end = max(end, begin + 1)
        yield slice(begin, end)
        begin = end


def gather(parts: list[PartOfRun], records: Records, part_of: NDArray[np.intp]) -> Block:
    """Fetch the payload of records out of the runs that part_of names, in their order."""
    tokens = Spans(parts, part_of, records["begin"], records["tokens"])
    ids = Spans(parts, part_of, records["id_begin"], records["id_bytes"])
    return Block(
        records,
        tokens.read(".tokens", parts[0].token_bytes),
        tokens.read(".flags", 1),
        ids.read(".ids", 1),
    )


class Spans:
    """Read stretches of payload files, neighbours with one read, and put them in order."""

    def __init__(
        self,
        parts: list[PartOfRun],
        part_of: NDArray[np.intp],
        begins: NDArray[np.uint64],
        lengths: NDArray[np.uint32],
    ) -> None:
        self._parts, self._part_of = parts, part_of
        self._begins, self._lengths = begins.astype(np.int64), lengths.astype(np.int64)
        self._by_place = np.lexsort((self._begins, part_of))
        # Where each one lies once the stretches are read one after the other.
        self._offsets = np.empty(len(begins), np.int64)
        ends = np.cumsum(self._lengths[self._by_place])
        self._offsets[self._by_place] = ends - self._lengths[self._by_place]

    def read(self, suffix: str, width_bytes: int) -> bytes:
        """Return the stretches of one payload, in the order of the records."""
        data = b"".join(self._read_stretches(suffix, width_bytes))
        return in_order(data, self._offsets * width_bytes, self._lengths * width_bytes)

    def _read_stretches(self, suffix: str, width_bytes: int) -> Iterator[bytes]:
        part_of = self._part_of[self._by_place]
        begins, lengths = self._begins[self._by_place], self._lengths[self._by_place]
        ends = begins + lengths
        is_new = np.ones(len(begins), bool)
        is_new[1:] = (part_of[1:] != part_of[:-1]) | (begins[1:] != ends[:-1])
        firsts = np.flatnonzero(is_new)
        lasts = np.append(firsts[1:], len(begins)) - 1
        where = zip(part_of[firsts].tolist(), begins[firsts].tolist(), ends[lasts].tolist())  # noqa: B905
        for part, begin, end in where:
            with self._parts[part].path(suffix).open("rb") as stream:
                stream.seek(begin * width_bytes)
                yield stream.read((end - begin) * width_bytes)


def in_order(data: bytes, begins: NDArray[Any], lengths: NDArray[Any]) -> bytes:
    """Return pieces of data, one after the other."""
    view = memoryview(data)
    pieces = map(slice, begins.tolist(), (begins + lengths).tolist())
    return b"".join(map(view.__getitem__, pieces))
