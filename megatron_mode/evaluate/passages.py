"""Pick the held-out passages of the heat map: a prose passage, a dialogue, prose that quotes one.

Candidates are windows of a row's length, spread evenly over each source and moved to the start of
a document nearby. The choice depends on the sources alone, so that two checkpoints of a run colour
the same text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_mode.tokens.flags import CONTROL, MODE2, role_of
from megatron_mode.tokens.source.shards import Source
from megatron_mode.tokens.tokenizer import Tokenizer

# At most 128 windows a source, about 50 ms: decoding 256 tokens takes a third of a millisecond.
_PLACES = 32
_STARTS_AT_A_PLACE = 4
# Straight single quotes are left out: they are apostrophes far more often.
_QUOTES = frozenset('"“”„«»‘')
# A line of speech: three words or more between marks, the first mark not after a letter.
_SPEECH = re.compile(r"(?<!\S)(?:“[^“”]{1,400}”|\"[^\"\n]{1,400}\"|‘[^‘’]{1,400}’|«[^«»]{1,400}»)")
_PLAIN_PUNCTUATION = frozenset(".,;:!?-–—'’()")
_TURNS_WANTED = 6


class Passage(NamedTuple):
    """Name one passage: a row's tokens of `source` from `begin_token` on."""

    title: str
    source: str
    kind: str
    begin_token: int


class _Window(NamedTuple):
    """Hold what the choice depends on.

    `turns` are those of the first document, `speeches` quoted runs of three words or more; `quotes`
    and `symbols` (neither letters, spaces nor plain punctuation) are shares of the characters.
    """

    source: str
    begin_token: int
    mode2: bool
    plain: bool
    documents: int
    turns: int
    speeches: int
    quotes: float
    symbols: float


def choose_passages(sources: Sequence[Source], tokenizer: Tokenizer, seq_len: int) -> list[Passage]:
    """Return up to three passages, in the order prose, dialogue, quoting.

    A kind that the sources do not offer is left out, such as a dialogue without a Mode 2 source.
    Running text is preferred to digits, brackets and markup.
    """
    windows = [window for source in sources for window in _windows(source, tokenizer, seq_len)]
    prose = [window for window in windows if not window.mode2]
    dialogues = [window for window in windows if window.mode2 and window.turns > 1]
    chosen = []
    if prose:
        calm = min(prose, key=lambda w: w.quotes + w.symbols + 0.1 * (w.documents - 1))
        chosen.append(Passage("Prose", calm.source, "prose", calm.begin_token))
        prose.remove(calm)
    if dialogues:
        best = min(
            dialogues,
            key=lambda w: (not w.plain, max(_TURNS_WANTED - w.turns, 0), w.documents, w.symbols),
        )
        title = "Dialogue without role markers" if best.plain else "Dialogue"
        chosen.append(Passage(title, best.source, "dialogue", best.begin_token))
    if quoting := [window for window in prose if window.speeches]:
        best = max(quoting, key=lambda w: w.speeches - 40 * w.symbols - 0.5 * (w.documents - 1))
        chosen.append(Passage("Prose that quotes", best.source, "quoting", best.begin_token))
    return chosen


def _windows(source: Source, tokenizer: Tokenizer, seq_len: int) -> Iterator[_Window]:
    room = source.tokens - seq_len
    count = min(_PLACES, room // seq_len + 1)
    chosen: dict[int, None] = {}  # in the order of the places, each start once
    for index in range(count):
        begin, end = index * room // count, (index + 1) * room // count + 1
        # Only a few rows ahead: a web corpus has millions of starts between two places.
        starts = source.document_starts(begin, min(end, begin + 16 * seq_len)).tolist()
        chosen |= dict.fromkeys(starts[:: len(starts) // _STARTS_AT_A_PLACE + 1] or [begin])
    for start in chosen:
        yield _look_at(source, tokenizer, start, seq_len)


def _look_at(source: Source, tokenizer: Tokenizer, begin: int, seq_len: int) -> _Window:
    ids_T, flags_T = source.read(begin, begin + seq_len)
    content_T = (flags_T & CONTROL) == 0
    control_ids = set(ids_T[~content_T].tolist())
    markers = {tokenizer.control[piece] for piece in ("<|system|>", "<|user|>", "<|assistant|>")}
    document_starts = np.flatnonzero(ids_T == tokenizer.control["<|doc|>"])
    first_end = next((start for start in document_starts.tolist() if start > 0), seq_len)
    role_T = role_of(flags_T[:first_end][content_T[:first_end]])
    text = tokenizer.decode(ids_T[content_T].tolist())
    length = max(len(text), 1)
    quotes = sum(character in _QUOTES for character in text)
    running = sum(c.isalpha() or c.isspace() or c in _PLAIN_PUNCTUATION for c in text)
    return _Window(
        source=source.name,
        begin_token=begin,
        mode2=bool(np.mean((flags_T & MODE2) != 0) > 0.5),
        plain=not markers & control_ids,
        documents=len(set(document_starts.tolist()) | {0}),
        turns=int(np.count_nonzero(np.diff(role_T))) + 1,
        speeches=sum(speech.count(" ") >= 2 for speech in _SPEECH.findall(text)),
        quotes=quotes / length,
        symbols=(length - running - quotes) / length,
    )
