"""Read JSON lines from a plain, gzip'd or zstd-compressed file.

Whatever the file format, a document arrives as the bytes of one JSON line, so that batches of them
can be cut, sent to workers and parsed alike.

A line is read up to MAX_LINE_BYTES; the rest of a longer one is passed over in pieces, so neither
a file without line ends nor a compressed one that unpacks to far more than its size fills memory.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, Self

from megatron_mode.errors import DataError

# A novel has 1 MB; beyond this a line is a mistake, and holding several would exhaust memory.
MAX_LINE_BYTES = 32 << 20
Compression = Literal["gzip", "zstd"]
BUFFER_BYTES = 1 << 17


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


class JsonLines(LineReader):
    """Iterate over the lines of one file."""

    def __init__(self, path: Path, compression: Compression | None) -> None:
        self.path, self._compression = path, compression
        self._raw = path.open("rb")
        self._stream = unpacked(self._raw, compression)

    @property
    def position_bytes(self) -> int:
        """Return how far the file on disk has been read."""
        return self._raw.tell()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            for number, line in enumerate(self._lines(), start=1):
                if not line.isspace():
                    yield number, line
        except (EOFError, zlib.error, OSError) as error:
            if "too much memory" in str(error):
                raise DataError(
                    f"{self.path} was compressed with a window of more than 128 MiB; accepted are "
                    "smaller ones, so write it again: zstd -dc --long=31 FILE | zstd -o NEW.zst"
                ) from None
            what = f"{self._compression} file" if self._compression else "file"
            raise DataError(
                f"{self.path}:{number + 1}: the {what} is damaged or cut off near byte "
                f"{self._raw.tell()} ({error}); fetch it again."
            ) from None

    def _lines(self) -> Iterator[bytes]:
        line = self._stream.readline(MAX_LINE_BYTES + 1)
        if line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :] or b"\n"
        while line:
            if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
                yield line
            else:
                size_bytes = len(line)
                while line and not line.endswith(b"\n"):
                    line = self._stream.readline(BUFFER_BYTES)
                    size_bytes += len(line)
                yield too_long(size_bytes)
            line = self._stream.readline(MAX_LINE_BYTES + 1)

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._raw.close()


def unpacked(raw: IO[bytes], compression: Compression | None) -> IO[bytes]:
    """Return a buffered stream of what a file holds, all gzip members or zstd frames of it."""
    if compression is None:
        return raw
    if compression == "gzip":
        unpacking: Any = gzip.GzipFile(fileobj=raw)
    else:
        import pyarrow

        unpacking = pyarrow.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(unpacking, BUFFER_BYTES)
