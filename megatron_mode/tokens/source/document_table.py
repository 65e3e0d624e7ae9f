"""Write and read NAME.docs.arrow: id, source, rendering and first token of every document.

An Arrow IPC file in batches of equal size, which is memory-mapped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_mode.errors import DataError

BATCH_DOCUMENTS = 1 << 14
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "source", "rendering")] + [("first_token", pa.int64())]
)


class DocumentTableWriter:
    """Append rows to an open file; `close` writes the footer and leaves the file open."""

    def __init__(self, stream: Any) -> None:
        self._writer = pa.ipc.new_file(stream, SCHEMA)
        self._rows: list[tuple[str, str, str, int]] = []

    def add(self, id: str, source: str, rendering: str, first_token: int) -> None:
        """Append one row."""
        self._rows.append((id, source, rendering, first_token))
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


def read_document_table(path: Path) -> Any:
    """Map a table; raise DataError when it is missing or cut off."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):
        raise DataError(
            f"{path} is missing or cut off; prepare or copy the source again."
        ) from None
