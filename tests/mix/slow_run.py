"""Work a whole small run out slowly: sources, mix, edits, rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import slow_rows
from slow_order import mode2_flags, row_of_epoch, spread, walk
from slow_rows import DOC, ROLES, Document, Token

from megatron_mode.mix.apportion import Supply
from megatron_mode.tokens.source.row_table import write_table
from megatron_mode.tokens.source.shards import Source, SourceWriter
from megatron_mode.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary("ab" * 32, 120, 128, {"<|doc|>": DOC})
MODES = {"web": 1, "books": 1, "patch": 1, "chat": 2, "facts": 2}
STEPS, GLOBAL_ROWS = 10, 6
TOTAL = STEPS * GLOBAL_ROWS
WEIGHTS = {"system": 0.0, "user": 0.25, "assistant": 1.0, "tool": 2.0}


def make_documents(name: str, lengths: Sequence[int], seed: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    mode2 = MODES[name] == 2
    documents = []
    for length in lengths:
        tokens = [Token(DOC, mode2, "none", False, False, False, True, True)]
        for _ in range(length - 1):
            role = ROLES[int(rng.integers(1, 5))] if mode2 else "none"
            no_lm, quiet = bool(rng.random() < 0.1), bool(rng.random() < 0.1)
            tokens.append(
                Token(int(rng.integers(10, 120)), mode2, role, no_lm, quiet, False, False, False)
            )
        documents.append(tokens)
    return documents


def write_source(root: Path, name: str, documents: Sequence[Document], seq_len: int) -> None:
    with SourceWriter(root, name, mode=MODES[name], vocabulary=VOCABULARY) as writer:
        for number, document in enumerate(documents):
            flags = bytes(
                t.mode2 | t.no_lm << 1 | t.quiet << 2 | ROLES.index(t.role) << 3 | t.control << 6
                for t in document
            )
            writer.add([t.id for t in document], flags, id=f"d{number}")
    write_table(Source.open(root, name), seq_len)


def in_pieces(points: list[list[Any]]) -> list[list[Any]]:
    """Add the 31 places between two points at which a line is read off."""
    found = points[:1]
    for (a, u), (b, v) in pairwise(points):
        places = {a + (b - a) * k // 32 for k in range(1, 32)} - {a}
        if u != v:
            grid = 10**15
            line = ((at, u + (v - u) * Fraction(at - a, b - a)) for at in sorted(places))
            top = Fraction(max(u, v))
            found += [[at, Fraction(round(w / top * grid), grid) * top] for at, w in line]
        found.append([b, v])
    return found


class Truth:
    """Work the run out slowly."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.seq_len = case, case["seq_len"]
        self.documents = {
            name: make_documents(name, sizes, number)
            for number, (name, sizes) in enumerate(case["lengths"].items())
        }
        edited = {name: list(documents) for name, documents in self.documents.items()}
        for text in case["drop"]:
            number = int(text.removeprefix("chat/d"))
            edited["chat"][number] = slow_rows.drop(edited["chat"][number])
        for pair in case["replace"]:
            number, by = (int(pair[key].partition("/d")[2]) for key in ("document", "by"))
            new = self.documents["patch"][by]
            edited["web"][number] = slow_rows.replace(edited["web"][number], new)
        self.entries = [*case["mode1"], *case["mode2"]]
        self.rows_by_source = [
            self.pack(edited[entry["name"]], entry["packing"]) for entry in self.entries
        ]
        self.mode2 = mode2_flags(self.fraction, TOTAL)
        self.flags_ahead = functools.cache(lambda rows: mode2_flags(self.clamped, rows))

    def pack(self, documents: Sequence[Document], packing: str) -> list[list[Token]]:
        if packing == "stream":
            return slow_rows.stream_rows(documents, self.seq_len)
        if packing == "document":
            return slow_rows.document_rows(documents, self.seq_len)
        return slow_rows.whole_rows(documents, self.seq_len)[0]

    def fraction(self, row: int, side: str) -> Fraction:
        start, end = Fraction(self.case["start"]), Fraction(self.case["end"])
        return start + (end - start) * Fraction(row, TOTAL)

    def supply(self, entry: dict[str, Any], size: int) -> Supply:
        mode2 = MODES[entry["name"]] == 2
        points = entry.get("weight_points")
        if points is None:
            onset, weight = entry.get("onset_tokens", 0), entry.get("weight", 1)
            ramp = entry.get("ramp_tokens", 0)
            points = [[onset, 0], [onset + ramp, weight]] if onset + ramp else [[0, weight]]
        points = in_pieces(points)

        def mode_row(tokens: int) -> int:
            row = -(-tokens // self.seq_len)
            return sum(flag == mode2 for flag in self.flags_ahead(max(row, TOTAL))[:row])

        limit = entry.get("epochs_max")
        limit = None if limit is None or entry["when_dry"] == "repeat" else limit * size
        return Supply(tuple((mode_row(at), Fraction(w)) for at, w in points), limit)

    def clamped(self, row: int, side: str) -> Fraction:
        return self.fraction(min(row, TOTAL), side)

    def base(self) -> list[tuple[str, int, int]]:
        """Return (kind, source index, source row) of each row of the run before edits."""
        taken: dict[bool, list[tuple[int, int]]] = {}
        for mode2 in (False, True):
            mine = [e for e in self.entries if (MODES[e["name"]] == 2) == mode2]
            first = 0 if not mode2 else 2
            supplies = [
                self.supply(e, len(self.rows_by_source[first + i])) for i, e in enumerate(mine)
            ]
            taken[mode2] = [(first + s, j) for s, j in walk(supplies, TOTAL)]
        rows = []
        counters = {False: 0, True: 0}
        for flag in self.mode2:
            source, number = taken[flag][counters[flag]]
            counters[flag] += 1
            entry, size = self.entries[source], len(self.rows_by_source[source])
            rows.append(("mix", source, row_of_epoch((5, entry["name"]), size, number)))
        return rows

    def cohort_rows(self, occupied: set[int]) -> dict[int, tuple[str, int]]:
        """Return row -> (packing, row of facts) of the cohorts."""
        placed: dict[int, tuple[str, int]] = {}
        thirds = {"early": (0, 3), "mid": (3, 6), "late": (6, 10), "spread": (0, 10)}
        for cohort in self.case["cohorts"]:
            if cohort["window"] == "never":
                continue
            begin, end = thirds[cohort["window"]]
            free = [
                row
                for row in range(begin * GLOBAL_ROWS, end * GLOBAL_ROWS)
                if self.mode2[row] and row not in placed and row not in occupied
            ]
            size = len(self.pack(self.documents["facts"], cohort["packing"]))
            for number, row in enumerate(spread(free, size)):
                key = (5, "edit", "facts", cohort["packing"])
                placed[row] = (cohort["packing"], row_of_epoch(key, size, number))
        return placed
