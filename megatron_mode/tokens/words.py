"""Encode texts word by word, each different word once.

A merge never crosses a place that no piece crosses, so a text may be cut there and the ids of its
parts put together. SentencePiece trains no piece across a line break, before a space, or between
scripts; so we cut there, between scripts only where ASCII letters meet other ASCII characters.
Text repeats its words, and most of them come out of a table instead of a search.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE_MARK = "\u2581"
# ASCII from "!" to "~" without the letters.
SIGNS = r"!-@\[-`{-~"
BESIDE_ASCII = r"(?![^\x00-\x7f])"
# Possessive, so that no shorter run of letters is tried before an accented one: that word, and
# what follows it up to the next space, stays whole.
# Longer than any word of a language: lines without spaces are cut there, since SentencePiece takes
# 65 bytes and more a character of what it is given at once.
UP_TO = "{1,65536}"
WORD = re.compile(
    rf" {{0,65536}}(?:[A-Za-z]{UP_TO}+{BESIDE_ASCII}|[{SIGNS}]{UP_TO}+{BESIDE_ASCII}"
    rf"|[^ \n{SPACE_MARK}]{UP_TO})|\n|{SPACE_MARK}| {UP_TO}"
)
CROSSING = re.compile(
    rf"[A-Za-z][\x00-@\[-`{{-\x7f]|[{SIGNS}][\x00- A-Za-z\x7f]|[^{SPACE_MARK}]{SPACE_MARK}|[ \n]"
)
# At most some 60 MB a process.
KEPT_WORDS = 1 << 18
# Longer words (base64, lines without spaces) hardly come twice.
KEPT_WORD_CHARACTERS = 32
SEARCHED_CHARACTERS = 1 << 18
# Twice the longest word; a text without spaces may have as many words as a third of its characters.
STRETCH_CHARACTERS = 1 << 18
WORDS_AT_ONCE = 1 << 16
ID_TYPE = np.dtype(np.int32)


def keeps_words_apart(processor: SentencePieceProcessor) -> bool:
    """Tell whether no piece of a model crosses a border between words."""
    never_from_text = (processor.is_control, processor.is_byte, processor.is_unknown)
    size = processor.get_piece_size()
    texts = (
        processor.id_to_piece(index)
        for index in range(size)
        if not any(kind(index) for kind in never_from_text)
    )
    return not any(map(CROSSING.search, texts))


def stretches(text: str) -> Iterator[list[str]]:
    """Cut a text into words, some STRETCH_CHARACTERS at a time."""
    begin = 0
    while begin < len(text):
        end = begin + STRETCH_CHARACTERS
        words = WORD.findall(text, begin, end)
        if end < len(text):
            del words[-1]  # the end of the stretch may have cut it
            end = begin + sum(map(len, words))
        yield words
        begin = end


def pieces(words: list[str]) -> Iterator[list[str]]:
    """Cut a list of words so that each part has some SEARCHED_CHARACTERS."""
    part, characters = list[str](), 0
    for word in words:
        part.append(word)
        characters += len(word)
        if characters >= SEARCHED_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


class WordEncoder:
    """Turn texts into ids (int32) with a table of the words met so far."""

    def __init__(self, processor: SentencePieceProcessor, byte_ids: Sequence[int]) -> None:
        self._processor = processor
        self._line_break_id = byte_ids[ord("\n")]
        space_mark_ids = [byte_ids[byte] for byte in SPACE_MARK.encode()]
        self._fixed = {
            "\n": np.array([self._line_break_id], ID_TYPE).tobytes(),
            SPACE_MARK: np.array(space_mark_ids, ID_TYPE).tobytes(),
        }
        self._ids_of = dict(self._fixed)

    def encode_batch(self, texts: Sequence[str]) -> list[array[int]]:
        """Return the ids of each text."""
        found = [array("i") for _ in texts]
        parts: list[tuple[array[int], list[str]]] = []
        count = 0
        for ids, text in zip(found, texts, strict=True):
            for words in stretches(text):
                parts.append((ids, words))
                count += len(words)
                if count >= WORDS_AT_ONCE:
                    self._encode(parts)
                    parts, count = [], 0
        self._encode(parts)
        return found

    def _encode(self, parts: list[tuple[array[int], list[str]]]) -> None:
        """Append the ids of words to the array beside them."""
        used = set().union(*(words for _, words in parts))
        new = [word for word in used if word not in self._ids_of]
        if len(self._ids_of) + len(new) > KEPT_WORDS:
            self._ids_of = dict(self._fixed)
            new = [word for word in used if word not in self._ids_of]
        for words in pieces(new):
            self._ids_of.update(zip(words, self._search(words), strict=True))
        for ids, words in parts:
            ids.frombytes(b"".join(map(self._ids_of.__getitem__, words)))
        for word in new:
            if len(word) > KEPT_WORD_CHARACTERS:
                del self._ids_of[word]

    def _search(self, words: list[str]) -> list[bytes]:
        """Encode words with one call: a line break between two keeps them apart."""
        ids = np.array(self._processor.encode("\n".join(words), num_threads=1), ID_TYPE)
        ends = [*np.flatnonzero(ids == self._line_break_id).tolist(), len(ids)]
        data, width = memoryview(ids.tobytes()), ID_TYPE.itemsize
        starts = [0, *(end + 1 for end in ends)]
        return [
            bytes(data[start * width : end * width])
            for start, end in zip(starts, ends, strict=False)
        ]
