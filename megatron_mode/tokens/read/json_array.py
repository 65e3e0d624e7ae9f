"""Read the elements of one JSON array, as dialogue collections are often published, one by one."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_mode.errors import DataError
from megatron_mode.tokens.read.lines import (
    BUFFER_BYTES,
    MAX_LINE_BYTES,
    Compression,
    JsonLines,
    unpacked,
)

READ_BYTES = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")
JSON_NAME = re.compile(r".*\.json(\.gz|\.zst)?", re.IGNORECASE)


def holds_array(path: Path, compression: Compression | None) -> bool:
    """Tell whether a file named .json begins with `[`."""
    if not JSON_NAME.fullmatch(path.name):
        return False
    try:
        with path.open("rb") as raw:
            head = unpacked(raw, compression).read(BUFFER_BYTES)
    except (EOFError, OSError, zlib.error):
        return False  # reading it as lines says what is wrong
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


class JsonArray(JsonLines):
    """Iterate over the elements of an array; the number of a line is that of its element.

    A malformed element ends the reading with DataError: where the next one begins is unknown.
    """

    def _lines(self) -> Iterator[bytes]:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._count = "", 0, 0
        self._take("[")
        if self._next() != "]":
            while True:
                self._count += 1
                yield self._element().encode("utf-8", "surrogatepass")
                if self._next() != ",":
                    break
                self._take(",")
        self._take("]")
        if self._next():
            raise self._damage("is the array's last, but text follows the array")

    def _element(self) -> str:
        """Return the text of the next value, reading until it is complete."""
        while True:
            self._next()
            try:
                _, end = json.JSONDecoder().raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._place > MAX_LINE_BYTES:
                    reason = f"is longer than {MAX_LINE_BYTES >> 20} MiB or malformed"
                    raise self._damage(reason) from None
                if not self._read_more():
                    raise self._damage(f"is malformed ({error})") from None
                continue
            # A number may continue in the next piece; all other values are complete.
            if end < len(self._text) or not self._read_more():
                text, self._place = self._text[self._place : end], end
                return text

    def _read_more(self) -> bool:
        """Append a piece as long as what is held, so that retries cost no more than reading."""
        data = self._stream.read(max(READ_BYTES, len(self._text) - self._place))
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self._damage(f"is not UTF-8 ({error.reason}); save the file as UTF-8") from None
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(data)

    def _next(self) -> str:
        """Skip space and return the next character, "" at the end of the file."""
        while True:
            found = SPACE.match(self._text, self._place)
            assert found is not None, "the pattern matches nothing too"
            self._place = found.end()
            if self._place < len(self._text) or not self._read_more():
                return self._text[self._place : self._place + 1]

    def _take(self, character: str) -> None:
        if self._next() != character:
            found = self._text[self._place : self._place + 10] or "the end of the file"
            raise self._damage(f"is followed by {found!r} where {character!r} is expected")
        self._place += 1

    def _damage(self, what: str) -> DataError:
        return DataError(
            f"{self.path}:{self._count}: element {self._count} of the JSON array {what}; mend the "
            "file, or write one object a line as .jsonl."
        )
