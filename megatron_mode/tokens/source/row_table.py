r"""Write and read NAME.rows.T.bin: which pieces of documents stand in which row of T tokens.

    8 bytes   "MMROWS\0\1"
    i64[5]    T, R rows, P pieces, documents split, tokens of padding
    i64[R+1]  first piece of each row, and P at the end
    i64[P]    first token of each piece
    i32[P]    tokens of each piece; negative where its document continues after it

A row holds complete documents; one longer than T is cut into rows of T and a rest. Numbers are
little-endian. The reader maps the file, so opening costs nothing however large it is.

Best-fit decreasing after Ding et al. (2024), "Fewer Truncations Improve Language Modeling": each
piece goes to the open row that it leaves the least space in. A window holds a fixed number of
pieces, so memory does not grow with the source and the result depends on its documents alone.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mode.atomic import HashedFile
from megatron_mode.errors import DataError
from megatron_mode.tokens.source.index import map_file
from megatron_mode.tokens.source.seal import read_info, write_info
from megatron_mode.tokens.source.shards import Source

MAGIC = b"MMROWS\x00\x01"
HEADER = struct.Struct("<8s5q")
COPIED_BYTES = 1 << 22
WINDOW_PIECES = 1 << 18
Longs = NDArray[np.int64]


class Piece(NamedTuple):
    """Name tokens [begin, begin + length) of a stream; `is_end` where their document ends."""

    begin: int
    length: int
    is_end: bool


class RowTable:
    """Look up the pieces of a row in a memory-mapped table.

    Raises DataError when the file is missing, cut off or made for another row length.
    """

    def __init__(self, path: Path, seq_len: int) -> None:
        fix = pack_hint(path.parent, path.name.partition(".rows.")[0], seq_len)
        numbers, buffer = map_file(path, MAGIC, HEADER, "a row table", fix)
        given, self.rows, self.pieces_count, self.split_documents, self.padding_tokens = numbers
        expected_bytes = HEADER.size + 8 * (self.rows + 1) + 12 * self.pieces_count
        if given != seq_len or len(buffer) != expected_bytes:
            raise DataError(
                f"{path} has {len(buffer)} bytes for rows of {given} tokens, {expected_bytes} "
                f"bytes for rows of {seq_len} are accepted; {fix}."
            )
        self.seq_len = seq_len
        at = HEADER.size
        self._first = np.frombuffer(buffer, "<i8", self.rows + 1, at)
        at += 8 * (self.rows + 1)
        self._begin = np.frombuffer(buffer, "<i8", self.pieces_count, at)
        self._length = np.frombuffer(buffer, "<i4", self.pieces_count, at + 8 * self.pieces_count)

    @property
    def padding_share(self) -> float:
        """Return the share of padding among the tokens of all rows."""
        return self.padding_tokens / (self.rows * self.seq_len) if self.rows else 0.0

    def pieces(self, row: int) -> list[Piece]:
        """Return the pieces of a row in their order."""
        part = slice(int(self._first[row]), int(self._first[row + 1]))
        return [
            Piece(begin, abs(length), length > 0)
            for begin, length in zip(
                self._begin[part].tolist(), self._length[part].tolist(), strict=True
            )
        ]

    def rows_of(self, begin_token: int, end_token: int) -> list[int]:
        """Return the rows that hold a piece starting in [begin_token, end_token), ascending.

        Pieces never reach over a document's border, so for a document these are all its rows.
        """
        rows: list[int] = []
        for at in range(0, self.pieces_count, WINDOW_PIECES):
            begin_P = self._begin[at : at + WINDOW_PIECES]
            found = np.flatnonzero((begin_P >= begin_token) & (begin_P < end_token)) + at
            rows += (np.searchsorted(self._first, found, side="right") - 1).tolist()
        return sorted(rows)


def table_path(root: Path, name: str, seq_len: int) -> Path:
    """Return the path of a source's row table."""
    return root / f"{name}.rows.{seq_len}.bin"


def open_table(source: Source, seq_len: int) -> RowTable:
    """Open the row table of a source; DataError where it was made for other documents."""
    path = table_path(source.root, source.name, seq_len)
    table = RowTable(path, seq_len)
    sealed = source.info.get("row_tables", {}).get(str(seq_len))
    fix = pack_hint(source.root, source.name, seq_len)
    if sealed and sealed["rows"] != table.rows:
        raise DataError(
            f"{path} has {table.rows} rows but {source.name}.json names {sealed['rows']}; {fix}."
        )
    tokens = table.rows * seq_len - table.padding_tokens
    if tokens != source.tokens:
        raise DataError(
            f"{path} packs {tokens} tokens but {source.name} has {source.tokens}: it was made for "
            f"other documents; {fix}."
        )
    return table


def pack_hint(root: Path, name: str, seq_len: int) -> str:
    """Return the command that makes a row table."""
    return f"run `megatron-mode pack {root} --seq-len {seq_len} --sources {name}`"


def write_table(
    source: Source, seq_len: int, report_progress: Callable[[int], object] = lambda documents: None
) -> dict[str, Any]:
    """Pack a source into rows, write its table and its entry in NAME.json, and return that entry.

    Memory stays bounded: columns are spilled to files beside the target while rows are packed.
    """
    path = table_path(source.root, source.name, seq_len)
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        new_file = tempfile.TemporaryFile
        columns = [stack.enter_context(new_file(dir=path.parent)) for _ in range(3)]
        totals = _pack(source, seq_len, columns, report_progress)
        table = stack.enter_context(HashedFile(partial))
        table.write(HEADER.pack(MAGIC, seq_len, *totals.values()))
        for column in columns:
            column.seek(0)
            shutil.copyfileobj(column, table, COPIED_BYTES)
        table.close()
        partial.replace(path)
    tokens = totals["rows"] * seq_len
    entry = {
        **totals,
        "padding_share": round(totals["padding_tokens"] / tokens, 6) if tokens else 0.0,
        "sha256": table.description["sha256"],
    }
    if source.info:
        # Another pack, for another T, may have added its own entry meanwhile.
        info = read_info(source.root, source.name)
        info.setdefault("row_tables", {})[str(seq_len)] = entry
        source.info.update(info)
        write_info(source.root, source.name, info)
    return entry


def _pack(
    source: Source,
    seq_len: int,
    columns: Sequence[IO[bytes]],
    report_progress: Callable[[int], object],
) -> dict[str, int]:
    totals = {"rows": 0, "pieces": 0, "split_documents": 0, "padding_tokens": 0}
    for documents, (begin_P, length_P, continues_P) in _windows(source, seq_len):
        totals["split_documents"] += int(np.count_nonzero(continues_P[1:] < continues_P[:-1]))
        first, order = array("q"), array("q")
        for row in best_fit(length_P, seq_len):
            first.append(totals["pieces"] + len(order))
            order.extend(row)
        picked = np.frombuffer(order, np.int64)
        signed = np.where(continues_P[picked] == 1, -length_P[picked], length_P[picked])
        columns[0].write(first.tobytes())
        columns[1].write(begin_P[picked].astype("<i8").tobytes())
        columns[2].write(signed.astype("<i4").tobytes())
        totals["rows"] += len(first)
        totals["pieces"] += len(order)
        totals["padding_tokens"] += len(first) * seq_len - int(length_P.sum())
        report_progress(documents)
    columns[0].write(np.array([totals["pieces"]], "<i8").tobytes())
    return totals


def _windows(source: Source, seq_len: int) -> Iterator[tuple[int, tuple[Longs, ...]]]:
    """Yield (documents, their pieces), about WINDOW_PIECES pieces at a time."""
    for document in range(0, source.documents, WINDOW_PIECES):
        end = min(document + WINDOW_PIECES, source.documents)
        begin_D, length_D = source.document_spans(document, end)
        # Long documents fill a window before their number does.
        window_D = np.cumsum(-(-length_D // seq_len)) // WINDOW_PIECES
        cuts = [0, *(np.flatnonzero(np.diff(window_D)) + 1).tolist(), end - document]
        for low, high in itertools.pairwise(cuts):
            yield high - low, split_documents(begin_D[low:high], length_D[low:high], seq_len)


def split_documents(begin_D: Longs, length_D: Longs, seq_len: int) -> tuple[Longs, ...]:
    """Cut documents into pieces of at most `seq_len` tokens.

    Returns (first token, tokens, 1 where the document continues) of each piece, in order. Inputs of
    pieces do not meet; a row reads one token more to predict, the overlap of the design.
    """
    count_D = np.maximum(-(-length_D // seq_len), 0)
    document_P = np.repeat(np.arange(len(length_D)), count_D)
    number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
    begin_P = begin_D[document_P] + number_P * seq_len
    left_P = length_D[document_P] - number_P * seq_len
    return begin_P, np.minimum(left_P, seq_len), (left_P > seq_len).astype(np.int64)


def best_fit(length_P: Longs, seq_len: int) -> Iterator[list[int]]:
    """Yield the pieces of each row; lengths are 1 to `seq_len`.

    Ties go to the earlier piece and to the row opened last among those of one space.
    """
    order = np.argsort(-length_P, kind="stable").tolist()
    lengths = length_P.tolist()
    rows: list[list[int]] = []
    open_by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    spaces = 0  # bit s is set where a row with s free tokens is open: the least fit is a bit scan
    for piece in order:
        length = lengths[piece]
        fitting = spaces >> length
        if fitting:
            space = (fitting & -fitting).bit_length() - 1 + length
            row = open_by_space[space].pop()
            if not open_by_space[space]:
                spaces &= ~(1 << space)
            rows[row].append(piece)
        else:
            space, row = seq_len, len(rows)
            rows.append([piece])
        space -= length
        if space:
            open_by_space[space].append(row)
            spaces |= 1 << space
    yield from rows
