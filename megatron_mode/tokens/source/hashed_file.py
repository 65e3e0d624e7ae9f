"""Write a file under a temporary name and hash it on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, Any


class HashedFile:
    """Write a file under a temporary name, hashing on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.partial")
        self._stream: IO[bytes] = self.temporary.open("wb")
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        """Append bytes."""
        data = bytes(data)
        self._stream.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Pass buffered bytes on to the system."""
        self._stream.flush()

    @property
    def closed(self) -> bool:
        """Tell whether the stream is closed."""
        return self._stream.closed

    def close(self) -> None:
        """Close the stream; the file keeps its temporary name."""
        self._stream.close()

    def description(self) -> dict[str, Any]:
        """Return the size and the SHA-256 of what was written."""
        return {"bytes": self.size_bytes, "sha256": self._hash.hexdigest()}
