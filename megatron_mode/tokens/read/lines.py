"""Define what a reader hands on: numbered JSON lines, some of them refused.

Whatever the file format, a document arrives as the bytes of one JSON line, so that batches of them
can be cut, sent to workers and parsed alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Self

# A novel has 1 MB; beyond this a line is a mistake, and holding several would exhaust memory.
MAX_LINE_BYTES = 32 << 20


class RefusedLine(bytes):
    """Stand for a line that a reader could not hand on; the bytes are the reason in UTF-8."""


class LineReader:
    """Iterate over (number from 1, bytes of one JSON line) of one input, in bounded memory.

    Iterating raises DataError where the input is damaged. Blank lines are counted but not given.
    """

    @property
    def position_bytes(self) -> int:
        """Return how much of the input on disk has been read."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Close what is open."""


def too_long(size_bytes: int) -> RefusedLine:
    """Refuse a line of more than MAX_LINE_BYTES."""
    return RefusedLine(
        f"the line is {size_bytes / 2**20:,.1f} MiB long; accepted are up to "
        f"{MAX_LINE_BYTES >> 20} MiB, so split the document".encode()
    )


def compact_json(value: Any) -> str:
    """Write a value as JSON without spaces, keys in their own order.

    Raises ValueError for a number that is not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
