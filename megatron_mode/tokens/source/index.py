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

import struct
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


def index_chunks(lengths: NDArray[np.int32], token_dtype: str) -> Iterator[bytes]:
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


def map_file(
    path: Path, magic: bytes, header: struct.Struct, what: str, fix: str
) -> tuple[tuple[int, ...], NDArray[np.uint8]]:
    """Map a file with a header; return the numbers that follow the header's magic, and all bytes.

    Raises DataError when it is missing, or not `what` it should be.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(header.size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {fix}.") from None
    if len(head) < header.size or not head.startswith(magic):
        raise DataError(f"{path} is not {what}; {fix}.")
    return header.unpack(head)[1:], np.memmap(path, mode="r")


class Index:
    """Look up documents in a memory-mapped index; nothing is loaded.

    Raises DataError when the file is missing, foreign or cut off.
    """

    def __init__(self, path: Path) -> None:
        fix = "name a source that `megatron-mode prepare` or Megatron's preprocess_data.py wrote"
        numbers, buffer = map_file(path, MAGIC, HEADER, "an IndexedDataset index", fix)
        version, code, self.sequences, boundaries = numbers
        self._index_path = path
        if version != 1 or code not in TOKEN_TYPES:
            raise DataError(
                f"{path} has version {version} and token type {code}; accepted are version 1 and "
                f"the types {', '.join(TOKEN_TYPES.values())}."
            )
        expected_bytes = HEADER.size + 12 * self.sequences + 8 * boundaries
        # A multimodal index carries one more byte a sequence, which we do not need.
        if len(buffer) not in (expected_bytes, expected_bytes + self.sequences):
            raise DataError(
                f"{path} has {len(buffer)} bytes instead of {expected_bytes}: it is cut off; "
                "prepare or copy the source again."
            )
        self.dtype: np.dtype[Any] = np.dtype(TOKEN_TYPES[code])
        self.documents = max(0, boundaries - 1)
        self._lengths = np.frombuffer(buffer, "<i4", self.sequences, HEADER.size)
        offset = HEADER.size + 4 * self.sequences
        self._pointers = np.frombuffer(buffer, "<i8", self.sequences, offset)
        self._boundaries = np.frombuffer(buffer, "<i8", boundaries, offset + 8 * self.sequences)
        self._check_ends()
        self.tokens = 0
        """The number of tokens that the index accounts for."""
        if self.sequences:
            last_begin = int(self._pointers[-1]) // self.dtype.itemsize
            self.tokens = last_begin + int(self._lengths[-1])

    def _check_ends(self) -> None:
        """Refuse a document table whose ends are wrong; `verify_index` checks the rest."""
        ends = self._boundaries[[0, -1]].tolist() if len(self._boundaries) else None
        if ends != [0, self.sequences]:
            found = f"runs from {ends[0]} to {ends[1]}" if ends else "is empty"
            raise DataError(
                f"{self._index_path} has a document table that {found}; it must run from 0 to "
                f"{self.sequences}, the number of sequences, so build the index again: training "
                "would attend across documents."
            )

    def verify_index(self) -> None:
        """Read the complete index; raise DataError where a border falls or a pointer is wrong."""
        width, offset_bytes = self.dtype.itemsize, 0
        for first in range(0, self.sequences, CHUNK_DOCUMENTS):
            lengths = self._lengths[first : first + CHUNK_DOCUMENTS].astype(np.int64)
            ends = offset_bytes + np.cumsum(lengths) * width
            wrong = self._pointers[first : first + CHUNK_DOCUMENTS] != ends - lengths * width
            if (wrong | (lengths < 0)).any():
                at = first + int(np.argmax(wrong | (lengths < 0)))
                raise DataError(
                    f"{self._index_path} places sequence {at} ({self._lengths[at]} tokens) at byte "
                    f"{self._pointers[at]}; it must be where the sequence before it ends, so "
                    "build the index again."
                )
            offset_bytes = int(ends[-1])
        for first in range(0, self.documents, CHUNK_DOCUMENTS):
            falls = np.diff(self._boundaries[first : first + CHUNK_DOCUMENTS + 1]) < 0
            if falls.any():
                at = first + int(np.argmax(falls))
                raise DataError(
                    f"{self._index_path} ends document {at} before it begins (sequence "
                    f"{self._boundaries[at]} to {self._boundaries[at + 1]}); accepted are borders "
                    "that never fall, so build the index again."
                )

    def document_spans(self, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first token and the length in tokens of documents begin .. end - 1."""
        sequence = self._boundaries[begin : end + 1]
        inside = sequence < self.sequences
        first = np.full(len(sequence), self.tokens, np.int64)
        first[inside] = self._pointers[sequence[inside]] // self.dtype.itemsize
        return first[:-1], np.diff(first)

    def document_starts(self, begin_token: int, end_token: int) -> NDArray[np.int64]:
        """Return the first tokens of the documents that start in [begin_token, end_token).

        Two binary searches by element: numpy's searchsorted would first copy all of the array,
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
