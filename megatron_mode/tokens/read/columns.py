"""Read rows of Parquet files and Arrow IPC files or streams as JSON lines.

Rows are decoded a few at a time. A null value is absent, at any depth: columns of structs cannot
tell the two apart, and writers fill the fields that a row lacks with nulls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mode.errors import DataError
from megatron_mode.tokens.read.lines import MAX_LINE_BYTES, RefusedLine, too_long

# The fastest of 8 to 1024, and few enough where a page of 1 kB unpacks to rows of many MB.
BATCH_ROWS = 32
BATCH_BYTES = 8 << 20
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
FILE_MAGIC = b"ARROW1"
# What pyarrow raises for damaged bytes, depending on which part of a file they stand in.
DAMAGE = (pa.ArrowException, OSError, MemoryError, ValueError, TypeError, KeyError, IndexError)


@contextmanager
def damage_named(path: Path, row: int) -> Iterator[None]:
    """Turn what pyarrow raises into a DataError that names the file and the row reached."""
    try:
        yield
    except DAMAGE as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise DataError(
            f"{path}:{row}: the file is damaged or cut off ({reason}); fetch it again."
        ) from None


class Table:
    """Iterate over the rows of an input as numbered JSON lines."""

    def __init__(self, path: Path, columns: Sequence[str] | None) -> None:
        self.path = path
        self._columns = columns
        self._position_bytes = 0

    @property
    def position_bytes(self) -> int:
        """Return how much of the input has been read, estimated by rows or batches."""
        return self._position_bytes

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        for batch in self._batches():
            for line in lines_of(batch):
                number += 1
                yield number, line

    def _batches(self) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave nothing open: files are open only while they are iterated."""


class ParquetTable(Table):
    """Read one Parquet file, page by page of the columns that are asked for."""

    def _batches(self) -> Iterator[pa.RecordBatch]:
        path, row = self.path, 0
        size_bytes = path.stat().st_size
        with damage_named(path, 1):
            # pre_buffer would hold whole row groups.
            file = pq.ParquetFile(
                path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
            )
            rows = file.metadata.num_rows
            names = chosen_columns(path, file.schema_arrow.names, self._columns)
        with file:
            for group in range(file.num_row_groups):
                with damage_named(path, row + 1):
                    described = file.metadata.row_group(group)
                    row_bytes = described.total_byte_size // max(1, described.num_rows)
                    count = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))
                    batches = file.iter_batches(count, [group], columns=names)
                while True:
                    with damage_named(path, row + 1):
                        batch = next(batches, None)
                        if batch is None:
                            break
                        batch.validate()
                    yield batch
                    row += len(batch)
                    self._position_bytes = size_bytes * row // max(1, rows)
        if row != rows:
            raise DataError(
                f"{path}:{row + 1}: the file holds {row} rows where its footer says {rows}; fetch "
                "it again."
            )
        self._position_bytes = size_bytes


class ArrowTables(Table):
    """Read Arrow files one after the other, each of the stream or of the file format."""

    def __init__(self, path: Path, files: Sequence[Path], columns: Sequence[str] | None) -> None:
        super().__init__(path, columns)
        self._files = files

    def _batches(self) -> Iterator[pa.RecordBatch]:
        read_bytes = 0
        for path in self._files:
            row = 1
            with damage_named(path, row):
                source = pa.memory_map(str(path))
                is_file = source.read(len(FILE_MAGIC)) == FILE_MAGIC
                source.seek(0)
            read = file_batches if is_file else stream_batches
            with source:
                for batch in read(path, source):
                    with damage_named(path, row):
                        # Offsets are used unchecked afterwards: damaged ones would end the process.
                        batch.validate(full=True)
                        names = chosen_columns(path, batch.schema.names, self._columns)
                        chosen = batch.select(names)
                    yield from pieces(chosen)
                    row += len(batch)
                    self._position_bytes = read_bytes + source.tell()
                read_bytes += source.size()
        self._position_bytes = read_bytes


def stream_batches(path: Path, source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of the stream format, which must end with its mark."""
    row = 1
    with damage_named(path, row):
        reader = pa.ipc.open_stream(source)
        chosen_columns(path, reader.schema.names, None)
    while True:
        with damage_named(path, row):
            batch = next(reader, None)
        if batch is None:
            break
        yield batch
        row += len(batch)
    end = source.tell()
    source.seek(max(0, end - len(STREAM_END)))
    if source.read(len(STREAM_END)) != STREAM_END or end != source.size():
        raise DataError(
            f"{path}:{row}: the Arrow stream is cut off or goes on after its end (byte {end} of "
            f"{source.size()}); fetch it again, or write joined streams as one."
        )


def file_batches(path: Path, source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of the file format, which its footer counts."""
    row = 1
    with damage_named(path, row):
        reader = pa.ipc.open_file(source)
        count = reader.num_record_batches
    for index in range(count):
        with damage_named(path, row):
            batch = reader.get_batch(index)
        yield batch
        row += len(batch)
        source.seek(source.size() * (index + 1) // count)


def pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Cut a batch so that its rows are few enough to hold as Python values."""
    row_bytes = batch.nbytes // max(1, len(batch))
    count = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))
    for first in range(0, len(batch), count):
        yield batch.slice(first, count)


def chosen_columns(path: Path, found: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Return which of the wanted columns a file has; DataError when it holds no documents."""
    if len(set(found)) != len(found):
        raise DataError(f"{path} has two columns of one name; rename or drop one.")
    if wanted is None:
        return list(found)
    if not {"text", "messages"} & set(found):
        raise DataError(
            f"{path} has the columns {', '.join(found) or '(none)'}; accepted is a column text "
            "(Mode 1) or messages (Mode 2), so rename one or use `megatron-mode convert`."
        )
    return [name for name in wanted if name in found]


def lines_of(batch: pa.RecordBatch) -> Iterator[bytes]:
    """Write each row as compact JSON."""
    try:
        rows: list[Any] = batch.to_pylist()
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        # One value is bad: take row by row, so that only its own row is refused.
        rows = [row_or_error(batch, index) for index in range(len(batch))]
    for row in rows:
        yield row if isinstance(row, RefusedLine) else line_of(row)


def row_or_error(batch: pa.RecordBatch, index: int) -> dict[str, Any] | RefusedLine:
    """Return one row, or the reason why it cannot be read."""
    try:
        row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        return RefusedLine(f"the row cannot be read ({error}); write it again as UTF-8".encode())
    return row


def line_of(row: dict[str, Any]) -> bytes:
    """Write one row as compact JSON, without its nulls and the NaN of columns of numbers.

    Any other number that is not finite stays, for the parser to name.
    """
    try:
        held = without_nulls({name: value for name, value in row.items() if value == value})
        line = json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return RefusedLine(
            f"the row holds a value that is not JSON ({error}); accepted are strings, numbers, "
            "lists and structs".encode()
        )
    return line if len(line) <= MAX_LINE_BYTES else too_long(f"{len(line) / 2**20:,.1f} MiB")


def without_nulls(value: Any) -> Any:
    """Leave out the null fields of structs, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value
