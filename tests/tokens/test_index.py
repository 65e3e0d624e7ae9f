"""A corpus by other tools whose document table or ids are wrong is refused in a sentence."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_mode.errors import DataError
from megatron_mode.tokens.source.shards import Source

LENGTHS = (3, 1, 2)
TOKENS = (10, 11, 12, 20, 30, 31)


def write_corpus(
    root: Path,
    borders: list[int],
    pointers: tuple[int, ...] = (0, 12, 16),
    tokens: tuple[int, ...] = TOKENS,
) -> Path:
    """Write the bytes of an IndexedDataset of three sequences by hand (int32 tokens)."""
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(LENGTHS), len(borders))
    tables = struct.pack("<3i3q", *LENGTHS, *pointers) + struct.pack(f"<{len(borders)}q", *borders)
    (root / "web.idx").write_bytes(head + tables)
    (root / "web.bin").write_bytes(np.array(tokens, "<i4").tobytes())
    return root


@pytest.mark.parametrize(
    ("borders", "words"),
    [
        ([], "document table that is empty"),
        ([0], "runs from 0 to 0"),
        ([0, 1, 2], "runs from 0 to 2"),
        ([0, 1, 2, 9], "runs from 0 to 9"),
        ([1, 2, 3], "runs from 1 to 3"),
    ],
)
def test_a_document_table_covers_the_sequences(
    tmp_path: Path, borders: list[int], words: str
) -> None:
    with pytest.raises(DataError, match=rf"web\.idx has a {words}|web\.idx .*{words}"):
        Source.open(write_corpus(tmp_path, borders), "web", mode=1)


@pytest.mark.parametrize(
    ("borders", "pointers", "words"),
    [
        ([0, 2, 1, 3], (0, 12, 16), "ends document 1 before it begins (sequence 2 to 1)"),
        ([0, 1, 2, 3], (0, 4, 16), "places sequence 1 (1 tokens) at byte 4"),
    ],
)
def test_verify_reads_the_middle_of_an_index(
    tmp_path: Path, borders: list[int], pointers: tuple[int, ...], words: str
) -> None:
    source = Source.open(write_corpus(tmp_path, borders, pointers), "web", mode=1)
    with pytest.raises(DataError) as caught:
        source.verify_index()
    assert words in str(caught.value)


def test_an_intact_index_is_verified_and_read(tmp_path: Path) -> None:
    source = Source.open(write_corpus(tmp_path, [0, 2, 3]), "web", mode=1)
    source.verify_index()
    source.limit_ids(32)
    assert source.read(0, 6)[0].tolist() == list(TOKENS)
    assert source.document_starts(0, 6).tolist() == [0, 4]


@pytest.mark.parametrize("token_id", [32, 40_000, -1])
def test_an_id_outside_of_the_vocabulary_names_its_document(tmp_path: Path, token_id: int) -> None:
    tokens = (*TOKENS[:4], token_id, 31)
    source = Source.open(write_corpus(tmp_path, [0, 2, 3], tokens=tokens), "web", mode=1)
    words = rf"web has the id {token_id} in document 1; accepted are ids from 0 to 31"
    with pytest.raises(DataError, match=words):
        source.limit_ids(32)
    assert source.read(0, 4)[0].tolist() == list(TOKENS[:4])
    with pytest.raises(DataError, match=words):
        source.read(3, 6)
