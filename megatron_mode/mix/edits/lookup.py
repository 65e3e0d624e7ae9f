"""Find the documents that edits name, the rows that hold them, and the texts to read instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from megatron_mode.config.mix import EditsConfig
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.edits.overrides import Action, ChangedDocument, PackingName
from megatron_mode.mix.edits.source import EditedSource, Text, blanked, fitted
from megatron_mode.mix.packing import (
    DocumentRows,
    Packing,
    TokenSource,
    rows_in_stream,
    stream_rows_of,
)
from megatron_mode.tokens.source.row_table import RowTable, open_table
from megatron_mode.tokens.source.shards import Source


@dataclass(frozen=True)
class PackedSource:
    """Hold a source and how its rows are packed; `packing` None is a stream."""

    source: Source
    name: PackingName
    packing: Packing | None
    seq_len: int

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        if self.packing is not None:
            return self.packing.rows
        return rows_in_stream(self.source.tokens, self.seq_len)

    @property
    def padding_share(self) -> float:
        """Return the share of padding among the tokens of all rows; nothing in a stream."""
        return self.packing.padding_share if isinstance(self.packing, RowTable) else 0.0

    def rows_of(self, document: int) -> list[int]:
        """Return the rows that read a document, ascending."""
        return self.rows_of_tokens(document, *span_of(self.source, document))

    def rows_of_tokens(self, document: int, begin: int, end: int) -> list[int]:
        """Return the rows that read any of a document's tokens begin .. end - 1, ascending."""
        if self.packing is not None:
            return self.packing.rows_of(document, begin, end)
        return stream_rows_of(begin, end, self.source.tokens, self.seq_len)


def pack(source: Source, packing: PackingName, seq_len: int) -> PackedSource:
    """Open a source under a packing; DataError where `whole` lacks its row table."""
    opened: Packing | None
    match packing:
        case "stream":
            opened = None
        case "whole":
            opened = open_table(source, seq_len)
        case "document":
            opened = DocumentRows(source, seq_len)
        case _:
            assert_never(packing)
    return PackedSource(source, packing, opened, seq_len)


def span_of(source: Source, document: int) -> tuple[int, int]:
    """Return the first token of a document and the token after its last."""
    begin_D, length_D = source.document_spans(document, document + 1)
    return int(begin_D[0]), int(begin_D[0] + length_D[0])


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
) -> tuple[ChangedDocument, ...]:
    """Find the dropped and replaced documents, in config order."""
    trained = {entry.source.name: entry.source for entry in packed}
    index = {entry.source.name: number for number, entry in enumerate(packed)}
    pairs = [(text, None, "mix.edits.drop") for text in edits.drop]
    found = []
    for text, by, key in [
        *pairs,
        *((p.document, p.by, "mix.edits.replace") for p in edits.replace),
    ]:
        number = find_document(text, trained, key)
        entry = packed[index[text.partition("/")[0]]]
        begin, end = span_of(entry.source, number)
        by_rows: tuple[int, ...] = ()
        if by is not None:
            other = others[by.partition("/")[0]]
            span = span_of(other, find_document(by, others, key))
            shown = min(span[1] - span[0], end - begin)
            by_rows = tuple(entry.rows_of_tokens(number, begin, begin + shown))
            if other.mode != entry.source.mode:
                raise ConfigError(
                    f"mix.edits.replace puts {by} (mode {other.mode}) in the place of {text} (mode "
                    f"{entry.source.mode}); accepted is a document of the same mode"
                )
        place = index[entry.source.name]
        rows = tuple(entry.rows_of(number))
        action: Action = "drop" if by is None else "replace"
        found.append(ChangedDocument(text, place, number, begin, end, rows, action, by, by_rows))
    return tuple(found)


def edited_sources(
    packed: Sequence[PackedSource],
    changed: Sequence[ChangedDocument],
    others: Mapping[str, Source],
    document_id: int | None,
) -> list[TokenSource]:
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
        EditedSource(entry.source, texts[number]) if number in texts else entry.source
        for number, entry in enumerate(packed)
    ]


def cut_notes(sources: Sequence[Source], seq_len: int) -> list[str]:
    """Say of which sources, one document a row, some documents are longer than a row."""
    notes = []
    for source in sources:
        lengths = source.document_spans(0, source.documents)[1]
        if cut := int((lengths > seq_len).sum()):
            notes.append(
                f"{cut:,} of {source.documents:,} documents of {source.name} are longer than a row "
                f"of {seq_len} tokens: an edit that shows one cuts it off"
            )
    return notes
