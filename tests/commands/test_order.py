"""`megatron-mode order`: what it answers is what the run did, and a changed byte is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Outcome, Trained, refusal

from megatron_mode.tokens.source.shards import Source, SourceWriter
from megatron_mode.tokens.vocabulary import read_vocabulary

Call = Callable[..., Outcome]


def answer(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status == 0, outcome.err
    return dict(json.loads(outcome.out))


@pytest.fixture
def ask(verb: Call, trained: Trained) -> Call:
    """Ask about the small run's config."""
    return lambda *words: verb("order", trained.config, f"data.root={trained.data}", *words)


def test_rows_steps_and_plan_agree(ask: Call) -> None:
    plan = answer(ask("--json"))
    assert plan["rows"] == 12
    assert plan["mode2_rows"] == sum(s["rows"] for s in plan["sources"] if s["mode"] == 2)
    rows = answer(ask("--rows", ":", "--json"))["rows"]
    assert [row["row"] for row in rows] == list(range(12))
    steps = [answer(ask("--step", str(step), "--json"))["rows"] for step in range(3)]
    assert [row for step in steps for row in step] == rows
    for source in plan["sources"]:
        assert source["rows"] == sum(row["source"] == source["name"] for row in rows)
    table = ask("--rows", "4:6").out.splitlines()
    assert len(table) == 3
    assert table[1].split()[:2] == ["4", "1"]


def test_a_document_is_found_in_every_row_that_reads_it(ask: Call, trained: Trained) -> None:
    rows = answer(ask("--rows", "0:12", "--json"))["rows"]
    source = Source.open(trained.data, "books")
    for number in range(source.documents):
        begins, sizes = source.document_spans(number, number + 1)
        held = {token // 32 for token in range(int(begins[0]), int(begins[0] + sizes[0]))}
        truth = [r["row"] for r in rows if r["source"] == "books" and r["source_row"] in held]
        name = f"books/{source.document(number)[2]}"
        found = answer(ask("--document", name, "--json"))
        assert [e["row"] for e in found["exposures"]] == truth
        assert found["steps"] == sorted({row // 4 for row in truth})


def test_a_run_folder_knows_its_past(verb: Call, trained: Trained) -> None:
    name = f"books/{Source.open(trained.data, 'books').document(0)[2]}"
    found = answer(verb("order", trained.run, "--document", name, "--json"))
    assert found["steps_done"] == 3
    assert all(exposure["past"] for exposure in found["exposures"])


def test_copies_of_checkpoints_are_no_checkpoints(
    verb: Call, trained: Trained, tmp_path: Path
) -> None:
    run = shutil.copytree(trained.run, tmp_path / "run")
    newest = run / "checkpoints" / "step-00000003"
    shutil.copytree(newest, newest.with_name("step-00000003.bak"))
    assert answer(verb("order", run, "--verify", run, "--json"))["checkpoints"] == [2, 3]


def test_verify_accepts_the_run(ask: Call, trained: Trained) -> None:
    found = answer(ask("--verify", trained.run, "--json"))
    assert found["checkpoints"] == [2, 3]
    manifest = trained.run / "checkpoints" / "step-00000003" / "manifest.json"
    assert found["order_digest"] == json.loads(manifest.read_text())["order_digest"]
    assert found["hashed_bytes"] > 1000


@contextmanager
def changed(path: Path, offset: int) -> Iterator[None]:
    before = path.read_bytes()
    data = bytearray(before)
    data[offset % len(data)] ^= 1
    path.write_bytes(bytes(data))
    yield
    path.write_bytes(before)


@pytest.mark.parametrize("suffix", [".bin", ".flags.bin", ".idx", ".docs.arrow"])
def test_verify_finds_one_changed_byte(
    verb: Call, trained: Trained, tmp_path: Path, suffix: str
) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    path = data / f"chat{suffix}"
    words = ("order", trained.config, f"data.root={data}", "--verify", trained.run)
    # The last bytes of an index are its end of documents: the change must not look like another.
    with changed(path, 60 if suffix == ".idx" else path.stat().st_size // 2):
        sentence = refusal(verb(*words))
    assert f"chat{suffix}" in sentence
    assert verb(*words).status == 0


def test_verify_finds_a_swapped_document(verb: Call, trained: Trained, tmp_path: Path) -> None:
    """Also where the swapped source was sealed anew, so that its own digests agree."""
    data = shutil.copytree(trained.data, tmp_path / "data")
    source = Source.open(data, "books")
    order = [1, 0, *range(2, source.documents)]
    texts = [source.document(number) for number in order]
    info = {"licence": None}
    with SourceWriter(data, "books", mode=1, vocabulary=read_vocabulary(data), **info) as writer:
        for ids, flags, name, origin, rendering in texts:
            writer.add(ids, flags.tobytes(), id=name, source=origin, rendering=rendering)
    words = ("order", trained.config, f"data.root={data}", "--verify", trained.run)
    assert "mix.mode1.sources.books.content is not that of the checkpoint" in refusal(verb(*words))


def test_verify_finds_a_changed_number(ask: Call, trained: Trained) -> None:
    for change, named in (
        ("mix.mode2_fraction.start=0.51", "mix.mode2_fraction.start is '0.51'"),
        ("run.seed=7", "run.seed is 7"),
        ("mix.mode2.sources.0.onset_tokens=1", "onset_tokens is 1"),
        ("batch.global_rows=6", "batch.global_rows is 6"),
    ):
        assert named in refusal(ask(change, "--verify", trained.run))


def test_verify_replays_even_where_settings_agree(
    ask: Call, trained: Trained, tmp_path: Path
) -> None:
    run = shutil.copytree(trained.run, tmp_path / "run")
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["order_digest"] = manifest["order_digest"][::-1]
    text = json.dumps(manifest)
    path.write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.with_name("manifest.json.sha256").write_text(f"{digest}  manifest.json\n")
    assert "the rows replayed up to step 2 have digest" in refusal(ask("--verify", run))


def test_an_exported_order_replays_without_the_data(
    verb: Call, ask: Call, trained: Trained, tmp_path: Path
) -> None:
    first = Source.open(trained.data, "chat").document(0)[2]
    edits = (
        f"mix.edits.inject=[{{document: chat/{first}, steps: [1]}}]",
        f"mix.edits.drop=[books/{Source.open(trained.data, 'books').document(0)[2]}]",
    )
    out = tmp_path / "order.json"
    exported = answer(ask(*edits, "--export", out, "--json"))
    assert str(trained.data) not in out.read_text()
    rows = ask(*edits, "--rows", "0:12", "--json").out
    assert verb("order", out, "--rows", "0:12", "--json").out == rows
    assert any(row["edit"] for row in json.loads(rows)["rows"])
    plain = answer(ask("--export", tmp_path / "plain.json", "--json"))
    assert plain["order_digest"] != exported["order_digest"]
    manifest = trained.run / "checkpoints" / "step-00000003" / "manifest.json"
    assert plain["order_digest"] == json.loads(manifest.read_text())["order_digest"]
    assert verb("order", tmp_path / "plain.json", "--verify", trained.run).status == 0
    assert "needs the data" in refusal(verb("order", out, "--document", "books/x"))


def test_dialogues_without_assistant_turns_are_noted(
    verb: Call, trained: Trained, tmp_path: Path
) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    info = json.loads((data / "chat.json").read_text())
    words = ("order", trained.config, f"data.root={data}", "--plot", tmp_path / "plan.html")
    for tokens, loss, is_noted in ((5, "assistant", 0), (0, "all", 0), (0, "assistant", 1)):
        info["flags"]["role_assistant"] = tokens
        (data / "chat.json").write_text(json.dumps(info))
        assert verb(*words, f"mix.mode2_lm_loss={loss}").status == 0
        page = (tmp_path / "plan.html").read_text()
        assert page.count("no Mode 2 source holds an assistant turn") == is_noted


def test_a_picture_of_the_plan(ask: Call, tmp_path: Path) -> None:
    out = tmp_path / "order.html"
    answer(ask("mix.mode2.sources.0.epochs_max=2", "--plot", out, "--json"))
    page = out.read_text()
    for word in ("Planned share of rows", "Tokens taken", "Epochs", "chat", "books"):
        assert word in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("--rows", "5:3"), "--rows is 5:3; accepted: A:B with 0 <= A <= B <= 12"),
        (("--rows", "x"), "--rows is x"),
        (("--step", "3"), "--step is 3; accepted: 0 to 2"),
        (("--document", "books/none"), "has no document of id 'none'"),
        (("--document", "nowhere/none"), "the sources of the mix are"),
        (("--verify", "nowhere"), "has no finished checkpoint"),
        (("--plot", "nowhere/x.html"), "cannot be written"),
        (("--rows", "9" * 5000 + ":"), "accepted: A:B"),
        (("--document", "books/\udcff"), "has no document of id"),
        (("--export", "order.txt"), "accepted: a name in .json"),
        (
            ("mix.edits.cohorts=[{source: chat-valid-chat}]",),
            "which stands in mix.valid",
        ),
        (("mix.edits.drop=[chat/none]",), "mix.edits.drop names chat/none"),
        (("mix.edits.drop=[other/none]",), "mix.edits.drop names other/none"),
        (("mix.mode2.sources.0.packing=whole",), "megatron-mode pack"),
        (
            ("mix.mode2.sources.0.onset_tokens=64",),
            "no source in mix.mode2.sources has a weight at row",
        ),
        (
            ("mix.mode2.sources.0={name: chat, epochs_max: 0.01, when_dry: error}",),
            "its when_dry is error",
        ),
        (
            ("mix.edits.cohorts=[{source: chat, exposures: 9}]",),
            "mix.edits.cohorts shows chat",
        ),
    ],
)
def test_bad_questions(ask: Call, words: tuple[str, ...], fragment: str) -> None:
    assert fragment in refusal(ask(*words))


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 0}, {"steps": 1e400}, {"global_rows": 0}, {"mix": []}, {"sources": [{}]}],
)
def test_a_damaged_export_is_refused(
    verb: Call, ask: Call, tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "order.json"
    ask("--export", out)
    out.write_text(json.dumps({**json.loads(out.read_text()), **change}))
    assert "is not an order that" in refusal(verb("order", out))
    assert "cannot be read" in refusal(verb("order", tmp_path / "nowhere.json"))


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"format": 1}', "[" * 100_000, "files"])
def test_a_damaged_description_of_a_source_is_refused(
    verb: Call, trained: Trained, tmp_path: Path, text: str
) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    if text == "files":
        text = json.dumps({**json.loads((data / "books.json").read_text()), "files": {".bin": 3}})
    (data / "books.json").write_text(text)
    sentence = refusal(verb("order", trained.config, f"data.root={data}"))
    assert "books.json" in sentence
    assert "prepare" in sentence
