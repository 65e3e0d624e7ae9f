"""Write and read NAME.docs.arrow: id, source, rendering and first token of every document.

An Arrow IPC file in batches of equal size, memory-mapped, so that one row costs one batch lookup.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from megatron_mode.errors import DataError

BATCH_DOCUMENTS = 1 << 14
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "source", "rendering")] + [("first_token", pa.int64())]
)


class DocumentRow(NamedTuple):
    """Say where a document came from and where its tokens begin."""

    id: str
    source: str
    rendering: str
    first_token: int


class DocumentTableWriter:
    """Append rows to an open file; `close` writes the footer and leaves the file open."""

    def __init__(self, stream: Any) -> None:
        self._writer = pa.ipc.new_file(stream, SCHEMA)
        self._rows: list[DocumentRow] = []

    def add(self, row: DocumentRow) -> None:
        """Append one row."""
        self._rows.append(row)
        if len(self._rows) == BATCH_DOCUMENTS:
            self._flush()

    def close(self) -> None:
        """Write what is buffered and the footer."""
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_batch(pa.record_batch(list(zip(*self._rows, strict=True)), SCHEMA))
        self._rows.clear()


class DocumentTable:
    """Read rows of a memory-mapped table."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader: Any = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowInvalid):
            raise DataError(
                f"{path} is missing or cut off; prepare or copy the source again."
            ) from None

    def find(self, id: str) -> int | None:
        """Return the first document with this id, None where there is none."""
        try:
            id.encode()
        except UnicodeEncodeError:  # no UTF-8 text holds half of a surrogate pair
            return None
        for number in range(self._reader.num_record_batches):
            within = pc.index(self._reader.get_batch(number).column(0), id).as_py()
            if within >= 0:
                return int(number * BATCH_DOCUMENTS + within)
        return None

    def row(self, document: int) -> DocumentRow:
        """Return one row."""
        batch = self._reader.get_batch(document // BATCH_DOCUMENTS)
        within = document % BATCH_DOCUMENTS
        return DocumentRow(*(column[within].as_py() for column in batch.columns))
