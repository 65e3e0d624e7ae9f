"""Read a source as if some of its documents were dropped or replaced; nothing else moves.

A dropped document keeps its first piece, which the document before it learns to stop at; the rest
reads as padding. A replacement is cut to the length of what it replaces, or padded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.packing import PADDING, ByteArray, TokenSource
from megatron_mode.tokens.flags import BLANK, MODE2, NO_MODE_LOSS


class Text(NamedTuple):
    """Hold the ids and flags of one document."""

    ids: IntArray
    flags: ByteArray


def blanked(original: Text, document_id: int | None) -> Text:
    """Return a document of the same length that gives no loss."""
    ids = np.full_like(original.ids, document_id or 0)
    flags = (original.flags & np.uint8(MODE2)) | np.uint8(PADDING)
    if document_id is not None and original.ids[0] == document_id:
        flags[0] = original.flags[0] | NO_MODE_LOSS
    return Text(ids, flags)


def fitted(original: Text, new: Text, document_id: int | None) -> Text:
    """Return a document's text cut or padded to the length of another.

    Where it is cut, its last token is blank: it is no end that a model should learn.
    """
    result = blanked(original, document_id)
    size = min(len(new.ids), len(original.ids))
    result.ids[:size] = new.ids[:size]
    result.flags[:size] = new.flags[:size]
    if len(new.ids) > size:
        result.flags[-1] |= BLANK
    elif size < len(original.ids) and document_id is not None:
        # The first token of the padding stands for the next document: a stop to learn.
        result.flags[size] = new.flags[0] | NO_MODE_LOSS
    return result


class EditedSource:
    """Stand for a prepared source with the texts of some documents exchanged.

    The padding of a shorter replacement starts like a document, so that attention and positions
    restart there.
    """

    def __init__(self, source: TokenSource, texts: Mapping[int, tuple[Text, int]]) -> None:
        """`texts` holds (text, tokens of it that are no padding) by the document's first token."""
        self._source = source
        self.name, self.mode, self.tokens = source.name, source.mode, source.tokens
        self._begins = sorted(texts)
        self._texts = [texts[begin][0] for begin in self._begins]
        self._padding = sorted(
            begin + size for begin, (text, size) in texts.items() if size < len(text.ids)
        )

    def read(self, begin_token: int, end_token: int) -> tuple[IntArray, ByteArray]:
        """Return ids (int64) and flags of tokens begin_token .. end_token - 1."""
        ids, flags = self._source.read(begin_token, end_token)
        flags = flags.copy()
        index = max(bisect_right(self._begins, begin_token) - 1, 0)
        for begin, text in zip(self._begins[index:], self._texts[index:], strict=True):
            if begin >= end_token:
                break
            low, high = max(begin, begin_token), min(begin + len(text.ids), end_token)
            if low < high:
                ids[low - begin_token : high - begin_token] = text.ids[low - begin : high - begin]
                flags[low - begin_token : high - begin_token] = text.flags[
                    low - begin : high - begin
                ]
        return ids, flags

    def document_starts(self, begin_token: int, end_token: int) -> IntArray:
        """Return the offsets in [begin_token, end_token) at which documents or padding start."""
        starts = self._source.document_starts(begin_token, end_token)
        extra = [at for at in self._padding if begin_token <= at < end_token]
        return np.union1d(starts, np.array(extra, np.int64)) if extra else starts
