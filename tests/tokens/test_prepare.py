"""Check the verb from JSON lines to sources: what comes out, that it is deterministic."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mode.commands.prepare import SAMPLE_FOLDER
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.tokens.documents import read_documents
from megatron_mode.tokens.flags import CONTROL, MODE2
from megatron_mode.tokens.prepare.encode import encode_batch, line_batches
from megatron_mode.tokens.prepare.request import Split
from megatron_mode.tokens.prepare.workers import Workers
from megatron_mode.tokens.source.shards import Source
from megatron_mode.tokens.template import render
from megatron_mode.tokens.tokenizer import Tokenizer

RunPrepare = Callable[..., int]
WriteLines = Callable[[Path, list[Any]], Path]
Dialogue = Callable[..., dict[str, Any]]


def identifiers(root: Path, name: str) -> list[str]:
    source = Source.open(root, name)
    return [source.document(i)[2] for i in range(source.documents)]


def folder_bytes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_every_document_is_there_as_rendered(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "data" / "tiny"
    assert run_prepare("--out", out, "--input", *corpus, "--licence", "CC0") == 0
    for name, path, mode in (("books", corpus[0], 1), ("chat", corpus[1], 2)):
        source = Source.open(out, name, mode=mode)
        documents = {document.id: document for document in read_documents(path)}
        assert source.documents == len(documents)
        order = []
        for index in range(source.documents):
            ids, flags, identifier, source_name, rendering = source.document(index)
            expected_ids, expected_flags = render(documents[identifier], tokenizer, rendering)
            assert (ids.tolist(), flags.tobytes()) == (expected_ids, expected_flags)
            assert source_name == name
            order.append(identifier)
        assert sorted(order) == sorted(documents)
        assert order != list(documents)
        starts = source.document_starts(0, source.tokens)
        ids, flags = source.read(0, source.tokens)
        assert np.array_equal(np.flatnonzero(ids == tokenizer.control["<|doc|>"]), starts)
        assert set((flags & MODE2).tolist()) == {MODE2 if mode == 2 else 0}
        assert bool(flags[0] & CONTROL)
        assert source.info["seed"] == 1234
        assert source.info["licence"] == "CC0"
    assert Tokenizer.load(out / "tokenizer.model").vocabulary == tokenizer.vocabulary


def test_plain_share_is_realised(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    for share, rendering in (("0", "chat"), ("1", "plain"), ("0.25", "mixed")):
        run_prepare("--out", tmp_path / "d", "--input", corpus[1], "--plain-share", share)
        source = Source.open(tmp_path / "d", "chat")
        renderings = [source.document(i)[4] for i in range(source.documents)]
        assert source.info["rendering"] == rendering
        assert source.info["plain_documents"] == renderings.count("plain")
        # Four standard deviations of 400 draws.
        assert abs(renderings.count("plain") / 400 - float(share)) <= 0.09


def test_held_out_documents_are_disjoint_and_in_both_renderings(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    out = tmp_path / "d"
    run_prepare("--out", out, "--input", *corpus, "--valid-share", "0.2")
    for name, held_out, total in (
        ("books", ["books-valid"], 200),
        ("chat", ["chat-valid-plain", "chat-valid-chat"], 400),
    ):
        trained = set(identifiers(out, name))
        for valid_name in held_out:
            valid = identifiers(out, valid_name)
            assert valid == identifiers(out, held_out[0])
            assert not trained & set(valid)
            assert len(trained) + len(valid) == total
            assert 0.1 <= len(valid) / total <= 0.3
    for rendering in ("plain", "chat"):
        assert Source.open(out, f"chat-valid-{rendering}").info["rendering"] == rendering


def test_a_source_can_be_held_out_whole(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    out = tmp_path / "d"
    run_prepare("--out", out, "--input", *corpus, "--valid-sources", "chat")
    assert {path.stem for path in out.glob("*.idx")} == {
        "books", "chat-valid-plain", "chat-valid-chat"
    }  # fmt: skip
    with pytest.raises(DataError, match=r"--valid-sources names chta.*accepted are books, chat"):
        run_prepare("--out", tmp_path / "e", "--input", *corpus, "--valid-sources", "chta")
    assert not (tmp_path / "e").exists()


def test_workers_do_not_change_a_byte(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    results = []
    for workers in (1, 2):
        arguments = ("--input", *corpus, "--valid-share", "0.1", "--vocab-size", "400")
        run_prepare("--out", tmp_path / "d", "--workers", workers, *arguments, tokenizer=None)
        results.append(folder_bytes(tmp_path / "d"))
    assert results[0] == results[1]


def test_many_batches_come_back_in_order(
    tmp_path: Path, write_lines: WriteLines, model_path: Path
) -> None:
    lines = [{"text": f"{i} " * (1 + i % 7)} for i in range(9000)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    split = Split(seed=1, plain_share=0, valid_share=0, valid_sources=frozenset())
    results = []
    for workers in (1, 2):
        batches = line_batches([(0, path)], lambda read_bytes: None)
        with Workers(workers) as pool:
            encode = functools.partial(encode_batch, model_path, split)
            encoded = list(pool.map(encode, batches))
        blocks = [block for batch in encoded for block in batch.blocks.values()]
        results.append([id for block in blocks for _, _, id in block.documents("uint16")])
        assert len(blocks) > 6
    assert results[0] == results[1] == [f"a:{i + 1}" for i in range(9000)]


def test_the_seed_decides_order_and_shares(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    orders = []
    for seed in (1, 1, 2):
        run_prepare("--out", tmp_path / "d", "--input", *corpus, "--seed", seed)
        orders.append(identifiers(tmp_path / "d", "chat"))
    assert orders[0] == orders[1] != orders[2]


def test_repeated_ids_become_unique(
    tmp_path: Path, write_lines: WriteLines, dialogue: Dialogue, run_prepare: RunPrepare
) -> None:
    lines = [dialogue(name, f"{i}") for i, name in enumerate(["a", "b", "a", "a#2", "a", "b"])]
    path = write_lines(tmp_path / "in.jsonl", lines)
    run_prepare("--out", tmp_path / "d", "--input", path)
    assert sorted(identifiers(tmp_path / "d", "chat")) == ["a", "a#2", "a#3", "a#4", "b", "b#2"]
    assert Source.open(tmp_path / "d", "chat").info["repeated_ids"] == 3


def test_bad_lines_are_counted_within_the_allowance(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare, capsys: pytest.CaptureFixture[str]
) -> None:
    with corpus[0].open("a") as stream:
        stream.write("{\n" + '{"text": 1}\n')
    arguments = ("--out", tmp_path / "d", "--input", *corpus, "--json")
    with pytest.raises(DataError, match=r"mode1\.jsonl:201: malformed JSON"):
        run_prepare(*arguments)
    with pytest.raises(DataError, match=r"mode1\.jsonl:202: text is 1.*--max-bad-lines is 1"):
        run_prepare(*arguments, "--max-bad-lines", "1")
    assert not (tmp_path / "d").exists()
    capsys.readouterr()
    run_prepare(*arguments, "--max-bad-lines", "2")
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert summary["bad_lines"] == 2
    assert "mode1.jsonl:202" in output.err
    assert {s["name"]: s["documents"] for s in summary["sources"]} == {"books": 200, "chat": 400}
    assert Source.open(tmp_path / "d", "books").info["bad_lines"] == 2


@pytest.mark.parametrize("more", [None, {"weight": 0}, {"train": False}, {}])
def test_dialogues_that_train_no_assistant_turn_are_reported(
    tmp_path: Path, write_lines: WriteLines, run_prepare: RunPrepare,
    capsys: pytest.CaptureFixture[str], more: dict[str, Any] | None,
) -> None:  # fmt: skip
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Where is it?"}]
    if more is not None:
        messages.append({"role": "assistant", "content": "At sea.", **more})
    lines = [{"source": "chat", "messages": messages}, {"source": "books", "text": "The sea."}]
    path = write_lines(tmp_path / "in.jsonl", lines)
    run_prepare("--out", tmp_path / "d", "--input", path)
    warning = "warning: No dialogue of chat has an assistant turn that is trained"
    assert (warning in capsys.readouterr().err) is (more != {})


def test_sources_that_mean_two_things(
    tmp_path: Path, write_lines: WriteLines, dialogue: Dialogue, run_prepare: RunPrepare
) -> None:
    both = write_lines(
        tmp_path / "both.jsonl", [dialogue("a", "b"), {"text": "c", "source": "chat"}]
    )
    with pytest.raises(DataError, match=r"Source chat has lines of Mode 1 .* and of Mode 2"):
        run_prepare("--out", tmp_path / "d", "--input", both)
    lines = [{"text": "c", "source": "x"}, {"text": "c", "source": "x-valid"}]
    clash = write_lines(tmp_path / "clash.jsonl", lines)
    with pytest.raises(DataError, match="would both be named x-valid"):
        run_prepare("--out", tmp_path / "d", "--input", clash, "--valid-sources", "x")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("train", [True, False])
def test_an_empty_corpus_is_refused(tmp_path: Path, run_prepare: RunPrepare, train: bool) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    arguments = ("--out", tmp_path / "d", "--input", tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="holds no documents"):
        run_prepare(*arguments, **({"tokenizer": None} if train else {}))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--plain-share", "1.5", "0 to 1"),
        ("--valid-share", "nan", "0 to 1"),
        ("--workers", "0", "1 to 1024"),
        ("--max-bad-lines", "-1", "0 or more"),
    ],
)
def test_numbers_out_of_range(
    tmp_path: Path, run_prepare: RunPrepare, option: str, value: str, accepted: str
) -> None:
    with pytest.raises(ConfigError, match=f"{option}.* is .*; use .*{accepted}"):
        run_prepare("--out", tmp_path / "d", "--sample", option, value)


def test_the_same_file_twice_is_refused(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    with pytest.raises(ConfigError, match="twice"):
        run_prepare("--out", tmp_path / "d", "--input", corpus[0], corpus[0])


def test_the_shipped_sample_prepares(tmp_path: Path, run_prepare: RunPrepare) -> None:
    run_prepare("--out", tmp_path / "d", "--sample", "--valid-share", "0.1", tokenizer=None)
    tokenizer = Tokenizer.load(tmp_path / "d" / "tokenizer.model")
    assert tokenizer.vocab_size == 2048
    sources = {p.stem: Source.open(tmp_path / "d", p.stem) for p in (tmp_path / "d").glob("*.idx")}
    assert {"moby-dick", "moby-dick-valid", "bfcl", "chatterbot-valid-plain"} <= set(sources)
    assert sum(s.tokens for s in sources.values()) > 1_000_000
    assert sources["moby-dick"].info["licence"] == "public domain"
    notice = (SAMPLE_FOLDER / "NOTICE").read_text()
    assert all(word in notice for word in ("Public domain", "BSD-3-Clause", "Apache License"))


def test_declaring_the_arguments_loads_nothing_heavy() -> None:
    code = (
        "import argparse, sys; from megatron_mode.commands.prepare import add_arguments; "
        "add_arguments(argparse.ArgumentParser()); "
        "print([m for m in ('numpy', 'pyarrow', 'sentencepiece', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_torch_in_tokens() -> None:
    code = "import sys, megatron_mode.tokens.prepare.prepare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
