"""Hold whole small runs, from prepared files to rows, against a slow reading of the design."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import slow_rows
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from slow_rows import Token
from slow_run import GLOBAL_ROWS, MODES, STEPS, TOTAL, VOCABULARY, WEIGHTS, Truth, write_source

from megatron_mode.config import Config, build_config
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.mix.audit.documents import describe_rows, exposures
from megatron_mode.mix.corpus import build_order, build_train_reader, open_corpus
from megatron_mode.mix.order import Order

lengths = st.lists(st.integers(1, 14), min_size=6, max_size=14)


DRY = st.sampled_from(["share", "repeat", "error"])


@st.composite
def entries(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Draw a source's packing, limit and weight over time."""
    plan: dict[str, Any] = {"name": name, "packing": draw(st.sampled_from(["stream", "whole"]))}
    if draw(st.booleans()):
        plan |= {"epochs_max": draw(st.integers(1, 3)), "when_dry": draw(DRY)}
    kind = draw(st.sampled_from(["constant", "onset", "table"]))
    if kind == "onset":
        plan |= {"onset_tokens": draw(st.integers(0, 100)), "weight": draw(st.integers(1, 5))}
        plan["ramp_tokens"] = draw(st.integers(0, 100))
    elif kind == "table":
        plan["weight_points"] = [[0, draw(st.integers(1, 4))], [80, draw(st.integers(0, 4))]]
    return plan


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Draw sources, a mix and edits."""
    sources = {name: draw(lengths) for name in MODES}

    index = {name: st.integers(0, len(sources[name]) - 1) for name in MODES}
    drops = draw(st.sets(index["chat"], max_size=2))
    replaced = draw(st.sets(index["web"], max_size=2))
    injected = draw(st.lists(st.tuples(index["facts"], st.integers(0, STEPS - 1)), max_size=3))
    return {
        "lengths": sources,
        "seq_len": draw(st.sampled_from([4, 7])),
        "mode1": [draw(entries("web")), draw(entries("books"))],
        "mode2": [draw(entries("chat"))],
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
        found = reader.read_batch([source], [source_row])
        mix = {"reset_at_documents": config.mix.reset_at_documents}
        mix["mode2_lm_loss"] = config.mix.mode2_lm_loss
        fields = slow_rows.read(tokens, mix, WEIGHTS)
        live = np.array([not t.dead for t in tokens[:-1]])
        for name, values in fields.items():
            ours = getattr(found, f"{name}_BT")[0]
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
    described: list[Any] = describe_rows(config, corpus, order, rows)
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
        in_its_place = [e.row for e in found if not e.via.startswith("in place of")]
        assert sorted(in_its_place) == [r["row"] for r in described if document in r["documents"]]


def rows_holding(
    config: Config, corpus: Any, order: Order, place: int, name: str, number: int
) -> set[int]:
    """Return the rows of a stream that hold a document, or the one that it replaces."""
    source_name = order.source_names[place]
    opened = {s.name: s for s in corpus.read_sources}[source_name]
    begins, sizes = opened.document_spans(0, opened.documents)
    shown = {number: int(sizes[number])} if source_name == name else {}
    if place < len(order.configs):
        by = {s.name: s for s in corpus.read_sources}[name]
        length = int(by.document_spans(number, number + 1)[1][0])
        shown |= {
            c.document: min(length, int(sizes[c.document]))
            for c in order.edits.changed
            if c.by == f"{name}/d{number}" and c.source == place
        }
        packing = order.configs[place].packing
    else:
        packing = order.edits.streams[place - len(order.configs)].packing
    seq_len = config.model.seq_len
    held: set[int] = set()
    for d, length in shown.items():
        begin, end = int(begins[d]), int(begins[d]) + length
        if packing == "document":
            held.add(d)
        elif packing == "stream":
            held |= {t // seq_len for t in range(begin, end)}
        else:
            documents = [[Token(0, False, "none", *[False] * 5)] * int(n) for n in sizes]
            rows = slow_rows.whole_rows(documents, seq_len)[1][d]
            # Full pieces come first, in the document's order, so its rows ascend with its tokens.
            held |= set(rows[: -(-length // seq_len)])
    return held
