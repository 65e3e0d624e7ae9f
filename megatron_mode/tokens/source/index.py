r"""Write and read NAME.idx, the index of megatron-core's IndexedDataset.

    9 bytes   "MMIDIDX\0\0"
    u64, u8   version 1, code of the token type (4 int32, 8 uint16, ...)
    u64, u64  S sequences, E document boundaries
    i32[S]    tokens of each sequence
    i64[S]    byte offset of each sequence in NAME.bin
    i64[E]    first sequence of each document, and S at the end

Our own sources hold one sequence a document; files by Megatron's tools may hold several.
Source: megatron/core/datasets/indexed_dataset.py, _IndexWriter and _IndexReader.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {4: "int32", 5: "int64", 8: "uint16"}
CODES = {name: code for code, name in TOKEN_TYPES.items()}
CHUNK_DOCUMENTS = 1 << 20


class SpooledLengths:
    """Keep the lengths of any number of documents in a temporary file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("w+b")
        self._recent = array("i")
        self._written = 0

    def append(self, length: int) -> None:
        """Append a length."""
        self._recent.append(length)
        if len(self._recent) == CHUNK_DOCUMENTS:
            self._spill()

    def __len__(self) -> int:
        return self._written + len(self._recent)

    def __getitem__(self, span: slice) -> NDArray[np.int32]:
        self._spill()
        begin, end, _ = span.indices(self._written)
        self._stream.seek(4 * begin)
        return np.frombuffer(self._stream.read(4 * (end - begin)), np.int32)

    def remove(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):  # a full disk refuses the last buffer
            self._stream.close()
        self._path.unlink(missing_ok=True)

    def _spill(self) -> None:
        self._stream.seek(4 * self._written)
        self._stream.write(self._recent.tobytes())
        self._stream.flush()
        self._written += len(self._recent)
        self._recent = array("i")


def index_chunks(lengths: NDArray[np.int32] | SpooledLengths, token_dtype: str) -> Iterator[bytes]:
    """Yield the bytes of an index with one sequence a document, a bounded piece at a time."""
    count = len(lengths)
    yield HEADER.pack(MAGIC, 1, CODES[token_dtype], count, count + 1)
    starts = range(0, count, CHUNK_DOCUMENTS)
    for start in starts:
        yield lengths[start : start + CHUNK_DOCUMENTS].astype("<i4").tobytes()
    offset_bytes = 0
    for start in starts:
        size_bytes = lengths[start : start + CHUNK_DOCUMENTS].astype("<i8")
        size_bytes *= np.dtype(token_dtype).itemsize
        ends = offset_bytes + np.cumsum(size_bytes)
        yield (ends - size_bytes).astype("<i8").tobytes()
        offset_bytes = int(ends[-1])
    for start in range(0, count + 1, CHUNK_DOCUMENTS):
        yield np.arange(start, min(start + CHUNK_DOCUMENTS, count + 1), dtype="<i8").tobytes()


class Index:
    """Look up documents in a memory-mapped index; nothing is loaded.

    Raises DataError when the file is missing, foreign or cut off.
    """

    def __init__(self, path: Path) -> None:
        try:
            size_bytes = path.stat().st_size
            with path.open("rb") as stream:
                header = stream.read(HEADER.size)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); name a source that "
                "`megatron-mode prepare` or Megatron's preprocess_data.py wrote."
            ) from None
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{path} is not an IndexedDataset index; prepare the source again.")
        _, version, code, self.sequences, boundaries = HEADER.unpack(header)
        if version != 1 or code not in TOKEN_TYPES:
            raise DataError(
                f"{path} has version {version} and token type {code}; accepted are version 1 and "
                f"the types {', '.join(TOKEN_TYPES.values())}."
            )
        expected_bytes = HEADER.size + 12 * self.sequences + 8 * boundaries
        # A multimodal index carries one more byte a sequence, which we do not need.
        if size_bytes not in (expected_bytes, expected_bytes + self.sequences):
            raise DataError(
                f"{path} has {size_bytes} bytes instead of {expected_bytes}: it is cut off; "
                "prepare or copy the source again."
            )
        self.dtype: np.dtype[Any] = np.dtype(TOKEN_TYPES[code])
        self.documents = max(0, boundaries - 1)
        buffer = np.memmap(path, mode="r")
        self._lengths = np.frombuffer(buffer, "<i4", self.sequences, HEADER.size)
        offset = HEADER.size + 4 * self.sequences
        self._pointers = np.frombuffer(buffer, "<i8", self.sequences, offset)
        self._boundaries = np.frombuffer(buffer, "<i8", boundaries, offset + 8 * self.sequences)
        self._check_ends(path)

    def _check_ends(self, path: Path) -> None:
        """Refuse a document table that does not cover the sequences; `verify` checks the rest."""
        ends = self._boundaries[[0, -1]].tolist() if len(self._boundaries) else None
        if ends != [0, self.sequences]:
            found = f"runs from {ends[0]} to {ends[1]}" if ends else "is empty"
            raise DataError(
                f"{path} has a document table that {found}; accepted is a table from 0 to "
                f"{self.sequences}, the number of sequences, so build the index again: training "
                "would attend across documents."
            )

    def verify(self, path: Path) -> None:
        """Read the complete index; raise DataError where a border falls or a pointer is wrong."""
        width, offset_bytes = self.dtype.itemsize, 0
        for first in range(0, self.sequences, CHUNK_DOCUMENTS):
            lengths = self._lengths[first : first + CHUNK_DOCUMENTS].astype(np.int64)
            ends = offset_bytes + np.cumsum(lengths) * width
            wrong = self._pointers[first : first + CHUNK_DOCUMENTS] != ends - lengths * width
            if (wrong | (lengths < 0)).any():
                at = first + int(np.argmax(wrong | (lengths < 0)))
                raise DataError(
                    f"{path} places sequence {at} ({self._lengths[at]} tokens) at byte "
                    f"{self._pointers[at]}; accepted is where the sequence before it ends, so "
                    "build the index again."
                )
            offset_bytes = int(ends[-1])
        for first in range(0, self.documents, CHUNK_DOCUMENTS):
            falls = np.diff(self._boundaries[first : first + CHUNK_DOCUMENTS + 1]) < 0
            if falls.any():
                at = first + int(np.argmax(falls))
                raise DataError(
                    f"{path} ends document {at} before it begins (sequence "
                    f"{self._boundaries[at]} to {self._boundaries[at + 1]}); accepted are borders "
                    "that never fall, so build the index again."
                )

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the index accounts for."""
        return self._sequence_start(self.sequences)

    def document_start(self, document: int) -> int:
        """Return the first token of a document; for `documents` itself, the end of the last."""
        return self._sequence_start(int(self._boundaries[document]))

    def document_spans(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first token and the length in tokens of documents begin .. end - 1."""
        sequence = np.asarray(self._boundaries[begin : end + 1])
        first: NDArray[np.int64] = np.empty(end - begin + 1, np.int64)
        inside = sequence < self.sequences
        first[inside] = self._pointers[sequence[inside]] // self.dtype.itemsize
        first[~inside] = self.tokens
        return first[:-1], np.diff(first)

    def document_starts(self, begin_token: int, end_token: int) -> NDArray[np.int64]:
        """Return the first tokens of the documents that start in [begin_token, end_token).

        Two binary searches by element: numpy's searchsorted would first copy the whole array,
        as the file leaves it unaligned.
        """
        width = self.dtype.itemsize
        first_sequence = bisect_left(self._pointers, begin_token * width)
        last_sequence = bisect_left(self._pointers, end_token * width)
        first = bisect_left(self._boundaries, first_sequence, 0, self.documents)
        last = bisect_left(self._boundaries, last_sequence, 0, self.documents)
        starts: NDArray[np.int64] = self._pointers[self._boundaries[first:last]] // width
        return starts

    def document_of(self, token: int) -> int:
        """Return the document that a token belongs to."""
        sequence = bisect_right(self._pointers, token * self.dtype.itemsize) - 1
        return bisect_right(self._boundaries, sequence, 0, self.documents) - 1

    def _sequence_start(self, sequence: int) -> int:
        width = self.dtype.itemsize
        if sequence < self.sequences:
            return int(self._pointers[sequence]) // width
        if sequence == 0:
            return 0
        return int(self._pointers[sequence - 1]) // width + int(self._lengths[sequence - 1])
