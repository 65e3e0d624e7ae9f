"""Train with whole documents, edits and a source by Megatron's own tools, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_run import Outcome, Trained, refusal

from megatron_mode.tokens.source.row_table import open_table
from megatron_mode.tokens.source.shards import Source

Call = Callable[..., Outcome]


def lines_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def packed(verb: Call, trained: Trained, tmp_path: Path) -> Path:
    """Copy the small corpus and pack its dialogues."""
    data = shutil.copytree(trained.data, tmp_path / "data")
    said = verb("pack", data, "--seq-len", "32", "--sources", "chat,chat-valid-chat", "--json")
    assert said.status == 0, said.err
    entry = json.loads(said.out)["sources"]["chat"]
    assert 0 <= entry["padding_share"] < 1
    assert json.loads((data / "chat.json").read_text())["row_tables"]["32"] == entry
    return data


def chat_documents(verb: Call, trained: Trained, packed: Path) -> list[str]:
    """Return the ids of three dialogues; the third stands in a row near the end of the run."""
    source = Source.open(packed, "chat")
    plan = ("mix.mode2.sources.0.packing=whole", "run.steps=12", f"data.root={packed}")
    taken = json.loads(verb("order", trained.config, *plan, "--rows", "40:48", "--json").out)
    row = next(r["source_row"] for r in taken["rows"] if r["mode"] == 2)
    third = source.document_of(open_table(source, 32).pieces(row)[0].begin)
    others = [number for number in range(3) if number != third][:2]
    return [source.document(number)[2] for number in (*others, third)]


def test_a_run_with_edits_resumes_and_verifies(
    pretrain: Call, verb: Call, trained: Trained, packed: Path, tmp_path: Path
) -> None:
    ids = chat_documents(verb, trained, packed)
    book = Source.open(packed, "books").document(0)[2]
    edits = (
        f"data.root={packed}",
        "mix.mode2.sources.0.packing=whole",
        "mix.mode2_lm_loss=weighted",
        "mix.role_weights={system: 0, user: 0.5, assistant: 1, tool: 0}",
        f"mix.edits.inject=[{{document: chat/{ids[0]}, count: 2, every_steps: 2}}]",
        "mix.valid.sources=[{name: books-valid}, {name: chat-valid-plain}]",
        "mix.edits.cohorts=[{source: chat-valid-chat, packing: whole, begin_step: 3, end_step: 8}]",
        f"mix.edits.drop=[chat/{ids[1]}, books/{book}]",
        f"mix.edits.replace=[{{document: chat/{ids[2]}, by: chat/{ids[0]}}}]",
        "data.workers=2",
        "data.prefetch_steps=2",
        "run.steps=12",
        "checkpoint.every_steps=4",
    )
    done = pretrain(*edits)
    assert done.status == 0, done.err
    run = tmp_path / "run"
    lines = lines_of(run)
    shown = [line["rows_by_source"]["chat (document, edit)"] for line in lines]
    assert shown[0] == 1
    assert sum(shown) == 2
    rows = json.loads((packed / "chat-valid-chat.json").read_text())["row_tables"]["32"]["rows"]
    cohort = [line["rows_by_source"]["chat-valid-chat (whole, edit)"] for line in lines]
    assert sum(cohort) == sum(cohort[3:8]) == rows
    assert all(sum(line["rows_by_source"].values()) == 4 for line in lines)
    words = ("order", run, "--verify", run)
    assert verb(*words).status == 0
    injected = verb("order", run, "--document", f"chat/{ids[0]}", "--json")
    vias = {e["via"] for e in json.loads(injected.out)["exposures"]}
    assert {"mix", "inject", f"in place of chat/{ids[2]}"} <= vias
    # Resumed in the middle it takes the same rows, and without an edit it is refused.
    whole = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "checkpoints" / "latest").unlink()
    again = pretrain(*edits)
    assert again.status == 0, again.err
    losses = [json.loads(line)["loss"] for line in whole.splitlines()]
    assert [line["loss"] for line in lines_of(run)] == losses
    refused = pretrain(*edits, "mix.edits.drop=[]", "run.steps=13")
    assert "mix.edits.changed is " in refused.err
    assert refused.status == 2


def test_a_corpus_by_megatrons_own_tools_trains_as_it_is(
    pretrain: Call, verb: Call, tmp_path: Path
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    data = tmp_path / "megatron"
    data.mkdir()
    rng = np.random.default_rng(1)
    for name in ("web_text_document", "chat_text_document"):
        builder = IndexedDatasetBuilder(str(data / f"{name}.bin"), dtype=np.uint16)
        for length in rng.integers(5, 90, 60).tolist():
            builder.add_item(torch.from_numpy(rng.integers(0, 250, length)))
            builder.end_document()
        builder.finalize(str(data / f"{name}.idx"))
    mix = (
        f"data.root={data}",
        "mix.mode1.sources=[{name: web_text_document}]",
        "mix.mode2.sources=[{name: chat_text_document}]",
        "mix.valid.sources=[]",
    )
    assert "set model.vocab_size" in refusal(pretrain(*mix))
    done = pretrain(*mix, "model.vocab_size=256", "run.steps=2")
    assert done.status == 0, done.err
    assert all(np.isfinite(line["loss"]) for line in lines_of(tmp_path / "run"))
    found = verb("order", tmp_path / "run", "--document", "web_text_document/web_text_document:3")
    assert found.status == 0, found.err
