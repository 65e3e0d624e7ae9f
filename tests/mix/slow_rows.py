"""Read rows from lists of documents, token by token: the truth that row reading is held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

DOC = 3  # the id of <|doc|> in the vocabulary of the tests
ROLES = ("none", "system", "user", "assistant", "tool")


class Token(NamedTuple):
    """Hold a token; `dead` takes no loss, `quiet` no mode loss, `starts` begins a document."""

    id: int
    mode2: bool
    role: str
    no_lm: bool
    quiet: bool
    dead: bool
    starts: bool
    control: bool


def pad(mode2: bool, *, starts: bool = False) -> Token:
    """Return padding; its first token is the next document's start, as a target only."""
    return Token(DOC, mode2, "none", not starts, True, not starts, starts, True)


Document = Sequence[Token]


def drop(document: Document) -> Document:
    mode2 = document[0].mode2
    return [document[0]._replace(quiet=True), *(pad(mode2) for _ in document[1:])]


def replace(document: Document, new: Document) -> Document:
    size = len(document)
    if len(new) > size:
        return [*new[: size - 1], new[size - 1]._replace(dead=True, no_lm=True)]
    room = size - len(new)
    mode2 = new[0].mode2
    return [*new, *([pad(mode2, starts=True)] if room else []), *[pad(mode2)] * (room - 1)]


def stream_rows(documents: Sequence[Document], seq_len: int) -> list[list[Token]]:
    tokens = [token for document in documents for token in document]
    count = max(0, (len(tokens) - 1) // seq_len)
    return [tokens[r * seq_len : (r + 1) * seq_len + 1] for r in range(count)]


def padded_row(tokens: list[Token], seq_len: int) -> list[Token]:
    """Close a row of whole documents: the next start, then padding."""
    if len(tokens) > seq_len:
        return tokens
    last = tokens[-1]
    stop = pad(last.mode2, starts=True)
    row = [*tokens, stop, *(pad(False) for _ in range(seq_len - len(tokens)))]
    return row[: seq_len + 1]


def whole_rows(
    documents: Sequence[Document], seq_len: int
) -> tuple[list[list[Token]], dict[int, list[int]]]:
    """Pack best fit, longest first; also return the rows of each document."""
    pieces = []
    for number, document in enumerate(documents):
        for begin in range(0, len(document), seq_len):
            tokens = list(document[begin : begin + seq_len])
            tokens[0] = tokens[0]._replace(starts=True)
            follower = list(document[begin + seq_len : begin + seq_len + 1])
            pieces.append((number, tokens, follower))
    bins: list[list[Any]] = []  # [space, when it last changed, contents]
    for clock, piece in enumerate(sorted(pieces, key=lambda p: -len(p[1]))):
        fitting = [b for b in bins if b[0] >= len(piece[1])]
        if fitting:
            best = min(fitting, key=lambda b: (b[0], -b[1]))
        else:
            best = [seq_len, 0, []]
            bins.append(best)
        best[0] -= len(piece[1])
        best[1] = clock + 1
        best[2].append(piece)
    rows, where = [], {}
    for row, (_, _, contents) in enumerate(bins):
        tokens = [token for _, piece, _ in contents for token in piece] + contents[-1][2]
        rows.append(padded_row(tokens, seq_len))
        for number, _, _ in contents:
            where.setdefault(number, []).append(row)
    return rows, where


def document_rows(documents: Sequence[Document], seq_len: int) -> list[list[Token]]:
    return [padded_row(list(document[: seq_len + 1]), seq_len) for document in documents]


def read(row: list[Token], mix: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of a row of T + 1 tokens."""
    fields: dict[str, list[Any]] = {
        name: [] for name in ("input", "target", "lm_weight", "mode_label", "mode_weight")
    }
    fields["position"] = []
    position = -1
    for t, (token, target) in enumerate(pairwise(row)):
        restarts = t == 0 or (mix["reset_at_documents"] and token.starts)
        position = 0 if restarts else position + 1
        judge = token if target.starts else target
        weight = 1.0
        if judge.mode2 and mix["mode2_lm_loss"] == "assistant":
            weight = float(judge.role == "assistant")
        if judge.mode2 and mix["mode2_lm_loss"] == "weighted":
            weight = weights.get(judge.role, 0.0)
        if target.no_lm or target.dead or judge.dead:
            weight = 0.0
        is_mode_piece = judge.control and judge.quiet and judge.role != "none"
        if target.starts and judge.mode2 and judge.no_lm and not is_mode_piece:
            weight = 0.0  # the end of a turn that is not to be learnt
        fields["input"].append(token.id)
        fields["target"].append(target.id)
        fields["lm_weight"].append(weight)
        fields["mode_label"].append(float(token.mode2))
        fields["mode_weight"].append(float(not token.quiet))
        fields["position"].append(position)
    return fields
