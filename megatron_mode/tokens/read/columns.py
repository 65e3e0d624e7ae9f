"""Read rows of Parquet files and Arrow IPC files or streams as JSON lines.

Rows are decoded a few at a time. A null value is absent, at any depth: columns of structs cannot
tell the two apart, and writers fill the fields that a row lacks with nulls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mode.errors import DataError
from megatron_mode.tokens.read.lines import MAX_LINE_BYTES, LineReader, RefusedLine, too_long

# The fastest of 8 to 1024, and few enough where a page of 1 kB unpacks to rows of many MB.
BATCH_ROWS = 32
BATCH_BYTES = 8 << 20
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
FILE_MAGIC = b"ARROW1"
# What pyarrow raises for damaged bytes, depending on which part of a file they stand in.
DAMAGE = (pa.ArrowException, OSError, MemoryError, ValueError, TypeError, KeyError, IndexError)
UNREADABLE = (pa.ArrowException, ValueError, TypeError, OverflowError)

Batches = Iterator[tuple[pa.RecordBatch, int]]
"""Batches of a file's rows, and about how many of its bytes are read after each."""


class Table(LineReader):
    """Iterate over the rows of files, one after the other, as numbered JSON lines."""

    def __init__(
        self,
        read: Callable[[Path, Sequence[str] | None], Batches],
        files: Sequence[Path],
        columns: Sequence[str] | None,
    ) -> None:
        """Take these columns, or all when columns is None; files are open only while iterated."""
        self._read, self._files, self._columns = read, files, columns
        self._position_bytes = 0

    @property
    def position_bytes(self) -> int:
        """Return how much of the files has been read, estimated by batches."""
        return self._position_bytes

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = begin_bytes = 0
        for path in self._files:
            row = 1
            try:
                for batch, read_bytes in self._read(path, self._columns):
                    for line in map(line_of, rows_of(batch)):
                        number += 1
                        yield number, line
                    row += len(batch)
                    self._position_bytes = begin_bytes + read_bytes
            except DAMAGE as error:
                reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
                raise DataError(
                    f"{path}:{row}: the file is damaged or cut off ({reason}); fetch it again."
                ) from None
            begin_bytes += path.stat().st_size
            self._position_bytes = begin_bytes


def parquet_batches(path: Path, columns: Sequence[str] | None) -> Batches:
    """Read a Parquet file, page by page of the columns."""
    row, size_bytes = 0, path.stat().st_size
    # pre_buffer would hold complete row groups.
    with pq.ParquetFile(
        path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
    ) as file:
        rows = file.metadata.num_rows
        names = chosen_columns(path, file.schema_arrow.names, columns)
        for group in range(file.num_row_groups):
            described = file.metadata.row_group(group)
            count = rows_at_once(described.total_byte_size, described.num_rows)
            for batch in file.iter_batches(count, [group], columns=names):
                batch.validate()
                row += len(batch)
                yield batch, size_bytes * row // max(1, rows)
    if row != rows:
        raise ValueError(f"it holds {row} rows where its footer says {rows}")


def arrow_batches(path: Path, columns: Sequence[str] | None) -> Batches:
    """Read an Arrow file, of the stream or of the file format."""
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        names = chosen_columns(path, reader.schema.names, columns)
        for batch in file_batches(reader, source) if is_file else stream_batches(reader, source):
            # Offsets are used unchecked afterwards: damaged ones would end the process.
            batch.validate(full=True)
            chosen = batch.select(names)
            count = rows_at_once(chosen.nbytes, len(chosen))
            for first in range(0, len(chosen), count):
                yield chosen.slice(first, count), source.tell()


def stream_batches(reader: Any, source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of the stream format, which must end with its mark."""
    yield from reader
    end = source.tell()
    source.seek(max(0, end - len(STREAM_END)))
    if source.read(len(STREAM_END)) != STREAM_END or end != source.size():
        raise ValueError(
            f"the Arrow stream continues after its end, or has none: byte {end} of "
            f"{source.size()}; write joined streams as one"
        )


def file_batches(reader: Any, source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of the file format, which its footer counts."""
    count = reader.num_record_batches
    for index in range(count):
        batch = reader.get_batch(index)
        source.seek(source.size() * (index + 1) // count)
        yield batch


def rows_at_once(size_bytes: int, rows: int) -> int:
    """Return how many of these rows to hold as Python values."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * max(1, rows) // max(1, size_bytes)))


def chosen_columns(path: Path, found: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Return which of the wanted columns a file has; DataError when it holds no documents."""
    if len(set(found)) != len(found):
        raise DataError(f"{path} has two columns of one name; rename or drop one.")
    if wanted is None:
        return list(found)
    if not {"text", "messages"} & set(found):
        raise DataError(
            f"{path} has the columns {', '.join(found) or '(none)'}; give it a column text "
            "(Mode 1) or messages (Mode 2): rename one, or use `megatron-mode convert`."
        )
    return [name for name in wanted if name in found]


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RefusedLine]:
    """Yield each row, or the reason why it cannot be read."""
    try:
        rows = batch.to_pylist()
    except UNREADABLE as error:
        if len(batch) > 1:  # take row by row, so that only a bad one is refused
            for index in range(len(batch)):
                yield from rows_of(batch.slice(index, 1))
        else:
            reason = f"the row cannot be read ({error}); write it again as UTF-8"
            yield RefusedLine(reason.encode())
    else:
        yield from rows


def line_of(row: dict[str, Any] | RefusedLine) -> bytes:
    """Write one row as compact JSON, without its nulls and the NaN of columns of numbers.

    Any other number that is not finite stays, for the parser to name.
    """
    if isinstance(row, RefusedLine):
        return row
    try:
        held = without_nulls({name: value for name, value in row.items() if value == value})
        line = json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return RefusedLine(
            f"the row holds a value that is not JSON ({error}); accepted are strings, numbers, "
            "lists and structs".encode()
        )
    return line if len(line) <= MAX_LINE_BYTES else too_long(len(line))


def without_nulls(value: Any) -> Any:
    """Leave out the null fields of structs, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value
