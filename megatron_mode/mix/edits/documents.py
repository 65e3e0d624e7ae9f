"""Find the documents that edits name, and read a source with some dropped or replaced.

A dropped document keeps its first piece, which the document before it learns to stop at; the rest
reads as padding. A replacement is cut to the length of what it replaces, or padded. Nothing else
moves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megatron_mode.config.mix import EditsConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.edits.overrides import ChangedDocument
from megatron_mode.mix.floors import IntArray
from megatron_mode.mix.packing import PADDING, ByteArray, PackedSource, span_of
from megatron_mode.tokens.flags import BLANK, MODE2, NO_MODE_LOSS
from megatron_mode.tokens.source.shards import Source


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


class EditedSource(Source):
    """Stand for a prepared source with the texts of some documents exchanged.

    The padding of a shorter replacement starts like a document, so that attention and positions
    restart there.
    """

    def __init__(self, source: Source, texts: Mapping[int, tuple[Text, int]]) -> None:
        """`texts` holds (text, tokens of it that are no padding) by the document's first token."""
        vars(self).update(vars(source))  # the same maps of the same files
        self._texts = sorted((begin, text) for begin, (text, _) in texts.items())
        self._begins = [begin for begin, _ in self._texts]
        self._padding = np.array(
            [begin + size for begin, (text, size) in texts.items() if size < len(text.ids)],
            np.int64,
        )

    def read(self, begin_token: int, end_token: int) -> tuple[IntArray, ByteArray]:
        """Return ids (int64) and flags of tokens begin_token .. end_token - 1."""
        ids, flags = super().read(begin_token, end_token)
        index = max(bisect_right(self._begins, begin_token) - 1, 0)
        for begin, text in self._texts[index : bisect_right(self._begins, end_token - 1)]:
            low, high = max(begin, begin_token), min(begin + len(text.ids), end_token)
            if low < high:
                here = slice(low - begin_token, high - begin_token)
                ids[here] = text.ids[low - begin : high - begin]
                flags[here] = text.flags[low - begin : high - begin]
        return ids, flags

    def document_starts(self, begin_token: int, end_token: int) -> IntArray:
        """Return the offsets in [begin_token, end_token) at which documents or padding start."""
        inside = (self._padding >= begin_token) & (self._padding < end_token)
        starts = super().document_starts(begin_token, end_token)
        return np.union1d(starts, self._padding[inside])


def find_document(text: str, sources: Mapping[str, Source], key: str) -> int:
    """Return the number of the document SOURCE/ID; `key` names the setting in the error."""
    name, _, identifier = text.partition("/")
    text = text.encode("utf-8", "backslashreplace").decode()
    if name not in sources:
        raise ConfigError(
            f"{key} names {text}, but the sources of the mix are {', '.join(sorted(sources))}; "
            "name a document of one of them"
        )
    number = sources[name].find_document(identifier)
    if number is None:
        raise DataError(
            f"{key} names {text}, but {sources[name].root / name} has no document of id "
            f"{identifier!r}; correct the id"
        )
    return number


def find_changed(
    edits: EditsConfig, packed: Sequence[PackedSource], others: Mapping[str, Source]
) -> list[ChangedDocument]:
    """Find the dropped and replaced documents, in config order."""
    trained = {entry.source.name: entry.source for entry in packed}
    found = []
    drops = ((text, None) for text in edits.drop)
    for text, by in (*drops, *((pair.document, pair.by) for pair in edits.replace)):
        key = "mix.edits.drop" if by is None else "mix.edits.replace"
        number = find_document(text, trained, key)
        place = list(trained).index(text.partition("/")[0])
        entry = packed[place]
        span, rows = span_of(entry.source, number), tuple(entry.rows_of(number))
        change = ChangedDocument(text, place, number, *span, rows, "drop")
        if by is not None:
            other = others[by.partition("/")[0]]
            if other.mode != entry.source.mode:
                raise ConfigError(
                    f"{key} puts {by} (mode {other.mode}) in the place of {text} (mode "
                    f"{entry.source.mode}); accepted: a document of the same mode; name another"
                )
            begin, end = span_of(other, find_document(by, others, key))
            by_rows = tuple(entry.rows_of(number, end - begin))
            change = change._replace(action="replace", by=by, by_rows=by_rows)
        found.append(change)
    return found


def edited_sources(
    packed: Sequence[PackedSource],
    changed: Sequence[ChangedDocument],
    others: Mapping[str, Source],
    document_id: int | None,
) -> list[PackedSource]:
    """Return the sources of the mix, those with changed documents reading as if they were so."""
    texts: dict[int, dict[int, tuple[Text, int]]] = {}
    for edit in changed:
        original = Text(*packed[edit.source].source.read(edit.begin_token, edit.end_token))
        text, size = blanked(original, document_id), len(original.ids)
        if edit.by is not None:
            source = others[edit.by.partition("/")[0]]
            span = span_of(source, find_document(edit.by, others, "mix.edits.replace"))
            new = Text(*source.read(*span))
            text, size = fitted(original, new, document_id), len(new.ids)
        texts.setdefault(edit.source, {})[edit.begin_token] = (text, size)
    return [
        entry._replace(source=EditedSource(entry.source, texts[n])) if n in texts else entry
        for n, entry in enumerate(packed)
    ]
