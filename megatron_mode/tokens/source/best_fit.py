"""Pack pieces of documents into rows of T tokens: best fit, longest first, in bounded windows.

Best-fit decreasing after Ding et al. (2024), "Fewer Truncations Improve Language Modeling": each
piece goes to the open row that it leaves the least space in. A window holds a fixed number of
pieces, so memory does not grow with the source and the result depends on its documents alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

WINDOW_PIECES = 1 << 18


def split_documents(begin_D: IntArray, length_D: IntArray, seq_len: int) -> tuple[IntArray, ...]:
    """Cut documents into pieces of at most `seq_len` tokens.

    Returns (first token, tokens, 1 where the document goes on) of each piece, in order. Inputs of
    pieces do not meet; a row reads one token more to predict, the overlap of the design.
    """
    count_D = np.maximum(-(-length_D // seq_len), 0)
    document_P = np.repeat(np.arange(len(length_D)), count_D)
    number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(count_D) - count_D, count_D)
    begin_P = begin_D[document_P] + number_P * seq_len
    left_P = length_D[document_P] - number_P * seq_len
    return begin_P, np.minimum(left_P, seq_len), (left_P > seq_len).astype(np.int64)


def best_fit(length_P: IntArray, seq_len: int) -> Iterator[list[int]]:
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
