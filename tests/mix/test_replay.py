"""Hold whole small runs, from prepared files to rows, against a slow reading of the design."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import slow_rows
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from slow_order import mode2_flags, row_of_epoch, spread, walk
from slow_rows import DOC, ROLES, Document, Token

from megatron_mode.config import Config, build_config
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.apportion import Supply
from megatron_mode.mix.corpus import build_order, build_train_reader, open_corpus
from megatron_mode.mix.exposures import exposures
from megatron_mode.mix.order import Order
from megatron_mode.tokens.row_table import write_table
from megatron_mode.tokens.shards import Source, SourceWriter
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


lengths = st.lists(st.integers(1, 14), min_size=6, max_size=14)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Draw sources, a mix and edits."""
    sources = {name: draw(lengths) for name in MODES}

    def entry(name: str) -> dict[str, Any]:
        plan: dict[str, Any] = {
            "name": name,
            "packing": draw(st.sampled_from(["stream", "whole"])),
        }
        if draw(st.booleans()):
            plan |= {"epochs_max": draw(st.integers(1, 3)), "when_dry": draw(DRY)}
        kind = draw(st.sampled_from(["constant", "onset", "table"]))
        if kind == "onset":
            plan |= {"onset_tokens": draw(st.integers(0, 100)), "weight": draw(st.integers(1, 5))}
            plan["ramp_tokens"] = draw(st.integers(0, 100))
        elif kind == "table":
            plan["weight_points"] = [[0, draw(st.integers(1, 4))], [80, draw(st.integers(0, 4))]]
        return plan

    index = {name: st.integers(0, len(sources[name]) - 1) for name in MODES}
    drops = draw(st.sets(index["chat"], max_size=2))
    replaced = draw(st.sets(index["web"], max_size=2))
    injected = draw(st.lists(st.tuples(index["facts"], st.integers(0, STEPS - 1)), max_size=3))
    return {
        "lengths": sources,
        "seq_len": draw(st.sampled_from([4, 7])),
        "mode1": [entry("web"), entry("books")],
        "mode2": [entry("chat")],
        "start": draw(st.sampled_from(["0.2", "0.5", "0.37"])),
        "end": draw(st.sampled_from(["0.2", "0.9"])),
        "reset": draw(st.booleans()),
        "lm_loss": draw(st.sampled_from(["all", "assistant", "weighted"])),
        "drop": [f"chat/d{n}" for n in sorted(drops)],
        "replace": [
            {"document": f"web/d{n}", "by": f"patch/d{draw(index['patch'])}"}
            for n in sorted(replaced)
        ],
        "inject": [{"document": f"facts/d{n}", "steps": [step]} for n, step in injected],
        "cohorts": draw(
            st.lists(
                st.fixed_dictionaries(
                    {
                        "source": st.just("facts"),
                        "packing": st.sampled_from(["document", "whole", "stream"]),
                        "window": st.sampled_from(["early", "mid", "late", "spread", "never"]),
                    }
                ),
                max_size=2,
            )
        ),
    }


DRY = st.sampled_from(["share", "repeat", "error"])


def config_of(case: dict[str, Any], root: Path) -> Config:
    tree = {
        "run": {"steps": STEPS, "seed": 5},
        "model": {
            "name": "t", "layers": 1, "hidden_size": 8, "ffn_hidden_size": 8,
            "attention_heads": 1, "kv_heads": 1, "seq_len": case["seq_len"], "vocab_size": 128,
        },
        "data": {"root": str(root)},
        "batch": {"global_rows": GLOBAL_ROWS},
        "mix": {
            "mode1": {"sources": case["mode1"]},
            "mode2": {"sources": case["mode2"]},
            "mode2_fraction": {"shape": "linear", "start": case["start"], "end": case["end"]},
            "reset_at_documents": case["reset"],
            "mode2_lm_loss": case["lm_loss"],
            "edits": {key: case[key] for key in ("drop", "replace", "inject", "cohorts")},
        },
    }  # fmt: skip
    if case["lm_loss"] == "weighted":
        tree["mix"]["role_weights"] = WEIGHTS
    return build_config(decimals(tree))


def decimals(value: Any) -> Any:
    """Read texts of numbers as YAML would."""
    from decimal import Decimal

    if isinstance(value, dict):
        return {key: decimals(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decimals(item) for item in value]
    if isinstance(value, float):
        return Decimal(str(value))
    is_number = isinstance(value, str) and value.replace(".", "").isdigit()
    return Decimal(value) if is_number else value


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

        def mode_row(tokens: int) -> int:
            row = -(-tokens // self.seq_len)
            ahead = mode2_flags(self.clamped, max(row, TOTAL))[:row]
            return sum(flag == mode2 for flag in ahead)

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


@given(case=cases())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_run_reads_as_the_design_says(case: dict[str, Any]) -> None:
    truth = Truth(case)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        VOCABULARY.write(root)
        for name, documents in truth.documents.items():
            write_source(root, name, documents, case["seq_len"])
        config = config_of(case, root)
        corpus = open_corpus(config)
        try:
            order = build_order(config, corpus)
        except (ConfigError, DataError):
            assume(False)  # a mode without rows to give; held elsewhere
        compare(config, corpus, order, truth)


def compare(config: Config, corpus: Any, order: Order, truth: Truth) -> None:
    expected = truth.base()
    rows = order.rows(0, TOTAL)
    assert (rows.mode == 2).tolist() == truth.mode2
    explicit = injected_rows(order, truth)
    cohorts = truth.cohort_rows(set(explicit))
    placed = {**{row: ("document", d) for row, d in explicit.items()}, **cohorts}
    reader = build_train_reader(config, corpus, order)
    for row in range(TOTAL):
        source, source_row = int(rows.source[row]), int(rows.source_row[row])
        if row in placed:
            packing, number = placed[row]
            stream = order.edits.streams[source - len(order.configs)]
            assert (stream.name, stream.packing, source_row) == ("facts", packing, number)
            tokens = truth.pack(truth.documents["facts"], packing)[number]
        else:
            assert (source, source_row) == expected[row][1:], row
            tokens = truth.rows_by_source[source][source_row]
        found = reader.read(source, source_row)
        mix = {"reset_at_documents": config.mix.reset_at_documents}
        mix["mode2_lm_loss"] = config.mix.mode2_lm_loss
        fields = slow_rows.read(tokens, mix, WEIGHTS)
        live = np.array([not t.dead for t in tokens[:-1]])
        for name, values in fields.items():
            ours = getattr(found, f"{name}_T")
            # The label of padding is nobody's business: it takes no loss.
            keep = live if name == "mode_label" else np.ones(len(ours), bool)
            assert np.array_equal(ours[keep], np.array(values)[keep]), (row, name)
    check_exposures(config, corpus, order, rows)


def injected_rows(order: Order, truth: Truth) -> dict[int, int]:
    """Check that each injection stands in the first step from its own on with room; row -> doc."""
    found: dict[int, int] = {}
    mode2 = [row for row, flag in enumerate(truth.mode2) if flag]
    explicit = order.edits.placements[2].explicit
    pairs = zip(explicit.row.tolist(), explicit.stream_row.tolist(), strict=True)
    places = {mode2[row]: document for row, document in pairs}
    for injection in truth.case["inject"]:
        document, step = int(injection["document"].removeprefix("facts/d")), injection["steps"][0]
        free = [r for r in mode2 if r >= step * GLOBAL_ROWS and r not in found]
        steps = [r // GLOBAL_ROWS for r in free]
        (row,) = [
            r
            for r, d in places.items()
            if d == document and r not in found and r // GLOBAL_ROWS == steps[0]
        ][:1]
        found[row] = document
    assert found == places
    return found


def check_exposures(config: Config, corpus: Any, order: Order, rows: Any) -> None:
    """Hold `order --document` against looking at every row of the run."""
    index = {name: n for n, name in enumerate(order.source_names)}
    for document in ("web/d1", "books/d0", "chat/d2", "facts/d0", "patch/d1"):
        name, number = document.split("/d")
        if name == "patch" and name not in corpus.edits:
            continue
        if name == "facts" and name not in index:
            continue
        found = exposures(config, corpus, order, document)
        truth = []
        for place, source in enumerate(order.source_names):
            holders = rows_holding(config, corpus, order, place, name, int(number))
            truth += [
                int(row)
                for row, s, r in zip(rows.row, rows.source, rows.source_row, strict=True)
                if s == place and int(r) in holders
            ]
            assert source in MODES
        assert sorted(e.row for e in found) == sorted(truth), document
        assert all(e.step == e.row // GLOBAL_ROWS for e in found)


def rows_holding(
    config: Config, corpus: Any, order: Order, place: int, name: str, number: int
) -> set[int]:
    """Return the rows of a stream that hold a document, or the one that it replaces."""
    source_name = order.source_names[place]
    opened = {s.name: s for s in corpus.read_sources}[source_name]
    begins, sizes = opened.document_spans(0, opened.documents)
    wanted = {number} if source_name == name else set()
    if place < len(order.configs):
        wanted |= {
            c.document
            for c in order.edits.changed
            if c.by == f"{name}/d{number}" and c.source == place
        }
        packing = order.configs[place].packing
    else:
        packing = order.edits.streams[place - len(order.configs)].packing
    seq_len = config.model.seq_len
    held: set[int] = set()
    for d in wanted:
        begin, end = int(begins[d]), int(begins[d] + sizes[d])
        if packing == "document":
            held.add(d)
        elif packing == "stream":
            held |= {t // seq_len for t in range(begin, end)}
        else:
            documents = [[Token(0, False, "none", *[False] * 5)] * int(n) for n in sizes]
            held |= set(slow_rows.whole_rows(documents, seq_len)[1][d])
    return held
