"""Hold row tables to what they promise: every token once, whole documents, little padding."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.errors import DataError
from megatron_mode.tokens.source import row_table
from megatron_mode.tokens.source.row_table import (
    RowTable,
    best_fit,
    open_table,
    split_documents,
    table_path,
    write_table,
)
from megatron_mode.tokens.source.shards import Source, SourceWriter
from megatron_mode.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary("ab" * 32, 120, 128, {"<|doc|>": 3})


def write_source(root: Path, lengths: list[int]) -> Source:
    VOCABULARY.write(root)
    with SourceWriter(root, "chat", mode=2, vocabulary=VOCABULARY) as writer:
        for number, length in enumerate(lengths):
            writer.add([3] * length, bytes([1]) * length, id=f"d{number}")
    return Source.open(root, "chat")


@given(
    lengths=st.lists(st.integers(1, 60), max_size=60),
    seq_len=st.integers(1, 24),
    window=st.sampled_from([1, 7, 1000]),
)
@settings(max_examples=60, deadline=None)
def test_every_token_stands_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, window: int
) -> None:
    source = write_source(tmp_path_factory.mktemp("s"), lengths)
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(row_table, "WINDOW_PIECES", window)
        entry = write_table(source, seq_len)
        table = open_table(source, seq_len)
        ends = set(np.cumsum(lengths).tolist())
        seen = np.zeros(sum(lengths), int)
        for row in range(table.rows):
            pieces = table.pieces(row)
            assert 0 < sum(piece.length for piece in pieces) <= seq_len
            for begin, length, is_end in pieces:
                seen[begin : begin + length] += 1
                assert is_end == (begin + length in ends)
                assert is_end or length == seq_len
        assert np.all(seen == 1)
        assert entry["split_documents"] == sum(length > seq_len for length in lengths)
        assert table.padding_tokens == table.rows * seq_len - sum(lengths)
        starts = np.cumsum([0, *lengths]).tolist()
        for begin, end in itertools.pairwise(starts):
            held = [
                r
                for r in range(table.rows)
                if any(begin <= piece.begin < end for piece in table.pieces(r))
            ]
            assert table.rows_of(begin, end) == held


def test_packing_is_tight_and_the_same_each_time() -> None:
    """100,000 dialogues of 8 to 900 tokens into rows of 1,024: within 1 % of no padding."""
    lengths = np.random.default_rng(1).geometric(1 / 180, 100_000).clip(8, 900)
    rows = list(best_fit(lengths, 1024))
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert len(rows) <= 1.01 * -(-int(lengths.sum()) // 1024)
    assert rows == list(best_fit(lengths, 1024))


def test_documents_are_cut_only_where_they_do_not_fit() -> None:
    begin, length, goes_on = split_documents(np.array([0, 5, 9]), np.array([5, 4, 13]), 5)
    assert begin.tolist() == [0, 5, 9, 14, 19]
    assert length.tolist() == [5, 4, 5, 5, 3]
    assert goes_on.tolist() == [0, 0, 1, 1, 0]


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path, [9, 4, 3])
    with pytest.raises(DataError, match=r"cannot be read.*megatron-mode pack .* --seq-len 8"):
        open_table(source, 8)
    write_table(source, 8)
    path = table_path(tmp_path, "chat", 8)
    with pytest.raises(DataError, match=r"rows of 8 tokens.*--seq-len 16"):
        RowTable(path, 16)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"rows of 8 are accepted"):
        open_table(source, 8)
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="not a row table"):
        open_table(source, 8)
    again = write_source(tmp_path, [9, 4, 3, 8])
    write_table(again, 8)
    sealed = json.loads((tmp_path / "chat.json").read_text())
    sealed["row_tables"]["8"]["rows"] += 1
    (tmp_path / "chat.json").write_text(json.dumps(sealed))
    with pytest.raises(DataError, match=r"but chat\.json names"):
        open_table(Source.open(tmp_path, "chat"), 8)


def test_a_table_of_other_documents_is_refused(tmp_path: Path) -> None:
    """Also where nothing seals it: the tokens that it packs must be those of the source."""
    source = write_source(tmp_path, [9, 4, 3])
    write_table(source, 8)
    path = table_path(tmp_path, "chat", 8)
    table = path.read_bytes()
    other = write_source(tmp_path, [9, 4])
    path.write_bytes(table)
    with pytest.raises(DataError, match="made for other documents"):
        open_table(other, 8)


def test_long_documents_fill_a_window_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_table, "WINDOW_PIECES", 10)
    source = write_source(tmp_path, [40, 4, 90, 3])
    sizes = [len(pieces[0]) for _, pieces in row_table._windows(source, 4)]
    assert sum(sizes) == 10 + 1 + 23 + 1
    assert len(sizes) > 1


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path, [9, 4, 3])
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_: object) -> Callable[..., None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        write_table(source, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
