"""Lay out what is known of a rendered document on its way from a line to a prepared source.

    key      25 bytes   16 order digest, 8 position in the input, 1 output code
    payload  tokens, flags and id lie elsewhere, from `begin` and `id_begin` on

Sorting by key shuffles, because the digest is a keyed hash of the contents, and it brings copies
together, the first in input order ahead. Integers in keys are big-endian: they sort as bytes.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.documents import Document
from megatron_mode.tokens.prepare.split import Output
from megatron_mode.tokens.template import Rendering

DIGEST_BYTES = 16
DOCUMENT_KEY_BYTES = DIGEST_BYTES + 8
KEY_BYTES = DOCUMENT_KEY_BYTES + 1
RECORD = np.dtype(
    [
        ("key", f"S{KEY_BYTES}"),
        ("source", "<u4"),
        ("tokens", "<u4"),
        ("begin", "<u8"),
        ("id_bytes", "<u4"),
        ("id_begin", "<u8"),
        ("text_bytes", "<u4"),
        ("name", f"S{DIGEST_BYTES}"),  # digest of the id
        ("base", f"S{DIGEST_BYTES}"),  # of an id like "a#2": digest of "a", and number 2
        ("number", "<u8"),
    ]
)
RENDERINGS: tuple[Rendering, ...] = ("chat", "plain")
LINE_BITS = 40
LONGEST_NUMBER = 18

Records = NDArray[np.void]


def position(input_index: int, line_number: int) -> int:
    """Return the place of a line among all lines of the input."""
    return input_index << LINE_BITS | line_number


def place(at: int) -> tuple[int, int]:
    """Return the input index and the line number of a position."""
    return at >> LINE_BITS, at & ((1 << LINE_BITS) - 1)


def output_code(output: Output, source: str) -> int:
    """Return the code of an output: 2 if held out, and 1 if plain."""
    return 2 * (output.name != source) + RENDERINGS.index(output.rendering)


HELD_OUT_CHAT = 2


def output_name(source: str, mode: int, code: int) -> str:
    """Return the name of the prepared source that a code stands for."""
    if code < HELD_OUT_CHAT:
        return source
    return f"{source}-valid" if mode == 1 else f"{source}-valid-{RENDERINGS[code & 1]}"


def id_digest(identifier: str) -> bytes:
    """Return the digest by which ids of a source are compared."""
    return hashlib.blake2b(identifier.encode(), digest_size=DIGEST_BYTES).digest()


def numbered(identifier: str) -> tuple[str, int]:
    """Return ("a", 2) for the id "a#2", ("", 0) for an id without such a number."""
    base, mark, digits = identifier.rpartition("#")
    canonical = digits.isascii() and digits.isdigit() and digits[0] != "0"
    if not mark or not canonical or len(digits) > LONGEST_NUMBER:
        return "", 0
    return base, int(digits)


def key_part(keys: NDArray[np.bytes_], begin: int, end: int) -> NDArray[np.bytes_]:
    """Return bytes [begin, end) of each key."""
    rows = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), keys.dtype.itemsize)
    part = np.ascontiguousarray(rows[:, begin:end])
    return part.view(f"S{end - begin}").reshape(len(keys))


def document_keys(records: Records) -> NDArray[np.bytes_]:
    """Return digest and position of each record: equal for the renderings of one document."""
    return key_part(records["key"], 0, DOCUMENT_KEY_BYTES)


def positions(document_keys: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """Return the position in each document key."""
    part = key_part(document_keys, DIGEST_BYTES, DOCUMENT_KEY_BYTES)
    return part.view(">u8").astype(np.uint64)


def codes(records: Records) -> NDArray[np.uint8]:
    """Return the output code of each record."""
    part = key_part(records["key"], DOCUMENT_KEY_BYTES, KEY_BYTES)
    return part.view(np.uint8)


def is_primary(records: Records) -> NDArray[np.bool_]:
    """Mark one record of each document: a held-out dialogue has two."""
    marks: NDArray[np.bool_] = codes(records) != HELD_OUT_CHAT
    return marks


@dataclass
class Block:
    """Hold documents with their payload, each in the order of the records."""

    records: Records
    tokens: bytes
    flags: bytes
    ids: bytes


class Staging:
    """Collect the records and the payload of a batch."""

    def __init__(self) -> None:
        self.sources: dict[tuple[str, int], set[int]] = {}
        """Output codes by source and mode, in the order of their numbers in the records."""
        self._numbers: dict[tuple[str, int], int] = {}
        self._tokens = array("i")
        self._flags, self._ids = bytearray(), bytearray()
        self._rows: list[tuple[Any, ...]] = []

    def add(self, document: Document, key: bytes, ids: array[int], flags: bytes, text: int) -> None:
        """Append one rendering of a document with so many bytes of text."""
        source = document.source, document.mode
        number = self._numbers.setdefault(source, len(self._numbers))
        self.sources.setdefault(source, set()).add(key[-1])
        name = document.id.encode()
        base, suffix = numbered(document.id)
        id_base = id_digest(base) if suffix else b""
        here = (len(flags), len(self._flags), len(name), len(self._ids), text)
        self._rows.append((key, number, *here, id_digest(document.id), id_base, suffix))
        self._tokens += ids
        self._flags += flags
        self._ids += name

    def block(self, token_dtype: str) -> Block:
        """Return what was collected."""
        tokens = np.frombuffer(self._tokens, np.int32).astype(token_dtype)
        records = np.array(self._rows, RECORD)
        return Block(records, tokens.tobytes(), bytes(self._flags), bytes(self._ids))
