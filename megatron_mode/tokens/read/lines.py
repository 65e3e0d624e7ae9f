"""Define what a reader hands on: numbered JSON lines, some of them refused.

Whatever the file format, a document arrives as the bytes of one JSON line, so that batches of them
can be cut, sent to workers and parsed alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, Self

# A novel has 1 MB; beyond this a line is a mistake, and holding several would exhaust memory.
MAX_LINE_BYTES = 32 << 20


class RefusedLine(bytes):
    """Stand for a line that a reader could not hand on; the bytes are the reason in UTF-8."""


class LineReader(Protocol):
    """Iterate over (number from 1, bytes of one JSON line) of one input, in bounded memory.

    Iterating raises DataError where the input is damaged. Blank lines are counted but not given.
    """

    @property
    def position_bytes(self) -> int:
        """Return how much of the input on disk has been read."""

    def __iter__(self) -> Iterator[tuple[int, bytes]]: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def too_long(size: str) -> RefusedLine:
    """Refuse a line of more than MAX_LINE_BYTES; size says how long it is."""
    return RefusedLine(
        f"the line is {size} long; accepted are up to {MAX_LINE_BYTES >> 20} MiB, so split the "
        "document".encode()
    )


def compact_json(value: Any) -> str:
    """Write a value as JSON without spaces, keys in their own order.

    Raises ValueError for a number that is not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
