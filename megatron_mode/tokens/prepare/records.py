"""Lay out a rendered document on its way from a line to a prepared source.

    record    key (16 bytes order digest, 8 position in the input, 1 output code), sizes, ids
    payload   tokens, flags and id, one after the other, from byte `begin` on

Sorting by key shuffles, because the digest is a keyed hash of the contents, and it brings copies
together, the first in input order ahead. Integers in keys are big-endian: they sort as bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mode.tokens.prepare.split import Output
from megatron_mode.tokens.template import Rendering

DIGEST_BYTES = 16
DOCUMENT_KEY_BYTES = DIGEST_BYTES + 8
KEY_BYTES = DOCUMENT_KEY_BYTES + 1
RECORD = np.dtype(
    [
        ("key", f"S{KEY_BYTES}"),
        ("tokens", "<u4"),
        ("id_bytes", "<u4"),
        ("text_bytes", "<u4"),
        ("begin", "<u8"),
        ("name", f"S{DIGEST_BYTES}"),  # digest of the id
        ("base", f"S{DIGEST_BYTES}"),  # of an id like "a#2": digest of "a", and number 2
        ("number", "<u8"),
    ]
)
RENDERINGS: tuple[Rendering, ...] = ("chat", "plain")
HELD_OUT_CHAT = 2
LINE_BITS = 40
LONGEST_NUMBER = 18

Records = NDArray[np.void]
Rows = NDArray[np.uint8]


@dataclass
class Block:
    """Hold records and the payload that they point into."""

    records: Records
    payload: bytes | bytearray


def position(input_index: int, line_number: int) -> int:
    """Return the place of a line among all lines of the input."""
    return input_index << LINE_BITS | line_number


def place(at: int) -> tuple[int, int]:
    """Return the input index and the line number of a position."""
    return at >> LINE_BITS, at & ((1 << LINE_BITS) - 1)


def output_code(output: Output, source: str) -> int:
    """Return the code of an output: 2 if held out, and 1 if plain."""
    return 2 * (output.name != source) + RENDERINGS.index(output.rendering)


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


def as_rows(column: NDArray[Any]) -> Rows:
    """Return the bytes of each entry as a row."""
    flat = np.ascontiguousarray(column).view(np.uint8)
    return flat.reshape(len(column), column.dtype.itemsize)


def document_keys(records: Records) -> NDArray[np.bytes_]:
    """Return digest and position of each record: equal for the renderings of one document."""
    rows = np.ascontiguousarray(as_rows(records["key"])[:, :DOCUMENT_KEY_BYTES])
    return rows.view(f"S{DOCUMENT_KEY_BYTES}").reshape(len(records))


def codes(records: Records) -> Rows:
    """Return the output code of each record."""
    return as_rows(records["key"])[:, DOCUMENT_KEY_BYTES]


def is_primary(records: Records) -> NDArray[np.bool_]:
    """Mark one record of each document: a held-out dialogue has two."""
    marks: NDArray[np.bool_] = codes(records) != HELD_OUT_CHAT
    return marks


def sizes_bytes(records: Records, token_bytes: int) -> NDArray[np.int64]:
    """Return the bytes of each document's payload, where a token takes so many."""
    tokens = records["tokens"].astype(np.int64)
    return tokens * (token_bytes + 1) + records["id_bytes"].astype(np.int64)


def without_copies(records: Records) -> tuple[Records, int]:
    """Sort records; keep the first document of each digest, and count those left out."""
    records = records[np.argsort(records["key"], kind="stable")]
    documents = document_keys(records)
    digests = as_rows(documents)[:, :DIGEST_BYTES]
    is_new = np.ones(len(records), bool)
    is_new[1:] = (digests[1:] != digests[:-1]).any(axis=1)
    first = np.maximum.accumulate(np.where(is_new, np.arange(len(records)), 0))
    kept = documents == documents[first]
    return records[kept], int(is_primary(records[~kept]).sum())
