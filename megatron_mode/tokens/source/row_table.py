r"""Write and read NAME.rows.T.bin: which pieces of documents stand in which row of T tokens.

    8 bytes   "MMROWS\0\1"
    i64[5]    T, R rows, P pieces, documents split, tokens of padding
    i64[R+1]  first piece of each row, and P at the end
    i64[P]    first token of each piece
    i32[P]    tokens of each piece; negative where its document goes on after it

A row holds whole documents; a document longer than T is cut into rows of T and a rest. Numbers are
little-endian. The reader maps the file, so opening costs nothing however large it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mode.atomic import write_whole
from megatron_mode.errors import DataError
from megatron_mode.tokens.source.best_fit import WINDOW_PIECES, best_fit, split_documents
from megatron_mode.tokens.source.seal import read_info
from megatron_mode.tokens.source.shards import Source

MAGIC = b"MMROWS\x00\x01"
HEADER = struct.Struct("<8s5q")
HASHED_BYTES = 1 << 22


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
        try:
            size_bytes = path.stat().st_size
            with path.open("rb") as stream:
                header = stream.read(HEADER.size)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); {fix}.") from None
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"{path} is not a row table; {fix}.")
        _, given, self.rows, self.pieces_count, self.split_documents, self.padding_tokens = (
            HEADER.unpack(header)
        )
        expected_bytes = HEADER.size + 8 * (self.rows + 1) + 12 * self.pieces_count
        if given != seq_len or size_bytes != expected_bytes:
            raise DataError(
                f"{path} has {size_bytes} bytes for rows of {given} tokens, {expected_bytes} bytes "
                f"for rows of {seq_len} are accepted; {fix}."
            )
        self.seq_len = seq_len
        buffer = np.memmap(path, mode="r")
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

    def rows_of(self, document: int, begin_token: int, end_token: int) -> list[int]:
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
    parts = [path.with_name(f".{path.name}.{column}") for column in ("first", "begin", "length")]
    try:
        with parts[0].open("wb") as first, parts[1].open("wb") as begin, parts[2].open("wb") as n:
            totals = _pack(source, seq_len, (first, begin, n), report_progress)
        entry = _join(path, parts, seq_len, totals)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    if source.info:
        # Another pack, for another T, may have added its own entry meanwhile.
        info = read_info(source.root, source.name)
        info.setdefault("row_tables", {})[str(seq_len)] = entry
        source.info.update(info)
        text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
        write_whole(source.root / f"{source.name}.json", text)
    return entry


def _pack(
    source: Source,
    seq_len: int,
    columns: tuple[IO[bytes], IO[bytes], IO[bytes]],
    report_progress: Callable[[int], object],
) -> dict[str, int]:
    totals = {"rows": 0, "pieces": 0, "split_documents": 0, "padding_tokens": 0}
    for documents, (begin_P, length_P, goes_on_P) in _windows(source, seq_len):
        totals["split_documents"] += int(np.count_nonzero(goes_on_P[1:] < goes_on_P[:-1]))
        first, order = array("q"), array("q")
        for row in best_fit(length_P, seq_len):
            first.append(totals["pieces"] + len(order))
            order.extend(row)
        picked = np.frombuffer(order, np.int64)
        columns[0].write(first.tobytes())
        columns[1].write(begin_P[picked].astype("<i8").tobytes())
        signed = np.where(goes_on_P[picked] == 1, -length_P[picked], length_P[picked])
        columns[2].write(signed.astype("<i4").tobytes())
        totals["rows"] += len(first)
        totals["pieces"] += len(order)
        totals["padding_tokens"] += len(first) * seq_len - int(length_P.sum())
        report_progress(documents)
    columns[0].write(np.array([totals["pieces"]], "<i8").tobytes())
    return totals


def _windows(source: Source, seq_len: int) -> Iterator[tuple[int, tuple[NDArray[np.int64], ...]]]:
    """Yield (documents, their pieces), about WINDOW_PIECES pieces at a time."""
    for document in range(0, source.documents, WINDOW_PIECES):
        end = min(document + WINDOW_PIECES, source.documents)
        begin_D, length_D = source.document_spans(document, end)
        # Long documents fill a window before their number does.
        window_D = np.cumsum(-(-length_D // seq_len)) // WINDOW_PIECES
        cuts = [0, *(np.flatnonzero(np.diff(window_D)) + 1).tolist(), end - document]
        for low, high in itertools.pairwise(cuts):
            yield high - low, split_documents(begin_D[low:high], length_D[low:high], seq_len)


def _join(path: Path, parts: list[Path], seq_len: int, totals: dict[str, int]) -> dict[str, Any]:
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.partial")
    numbers = (totals[key] for key in ("rows", "pieces", "split_documents", "padding_tokens"))
    with temporary.open("wb") as out:
        head = HEADER.pack(MAGIC, seq_len, *numbers)
        out.write(head)
        digest.update(head)
        for part in parts:
            with part.open("rb") as column:
                while data := column.read(HASHED_BYTES):
                    out.write(data)
                    digest.update(data)
    os.replace(temporary, path)
    tokens = totals["rows"] * seq_len
    return {
        **totals,
        "padding_share": round(totals["padding_tokens"] / tokens, 6) if tokens else 0.0,
        "sha256": digest.hexdigest(),
    }
