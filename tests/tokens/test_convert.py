"""Check the verb: counts, bad records, names, and an output that appears whole or not at all."""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agent_log_sample
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mode.commands.convert import add_arguments, run
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.tokens.documents import read_documents
from megatron_mode.tokens.source.shards import Source

WriteLines = Callable[[Path, list[Any]], Path]
GOOD = {"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Tea."}]}
BAD = {"conversations": [{"from": "narrator", "value": "a"}]}


def convert(form: str, *words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["--from", form, *map(str, words)]))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_records_become_documents(
    tmp_path: Path, write_lines: WriteLines, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {**GOOD, "id": 7, "source": "https://x"}
    path = write_lines(tmp_path / "chats (1).jsonl.gz", [GOOD, BAD, more])
    (tmp_path / "array.json").write_text(json.dumps([GOOD, {**GOOD, "source": "tea"}]))
    words = (path, tmp_path / "array.json", "--out", tmp_path / name, "--json")
    assert convert("sharegpt", *words, "--max-bad-lines", "1") == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert (summary["records"], summary["documents"], summary["bad_lines"]) == (5, 4, 1)
    assert summary["messages"] == {"assistant": 4, "user": 4}
    assert re.match(r'warning: .*gz:2: conversations\[0\].from is "narrator"', said.err)
    found = list(read_documents(tmp_path / name))
    assert [(document.id, document.source) for document in found] == [
        ("chats-1:1", "chats-1"),
        ("7", "chats-1"),
        ("array:1", "array"),
        ("array:2", "tea"),
    ]
    assert convert("sharegpt", *words, "--max-bad-lines", "1", "--source", "all") == 0
    assert {document.source for document in read_documents(tmp_path / name)} == {"all"}
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "array.json", name}


def test_other_columns_of_a_table_are_read(tmp_path: Path) -> None:
    table = pa.table({"query": ["Tea?"], "answers": ['[{"name": "f", "arguments": {}}]']})
    pq.write_table(table, tmp_path / "a.parquet")
    assert convert("function-call", tmp_path / "a.parquet", "--out", tmp_path / "o.jsonl") == 0
    (document,) = read_documents(tmp_path / "o.jsonl")
    assert [message.content for message in document.messages] == [
        "Tea?",
        '[{"name":"f","arguments":{}}]',
    ]


def test_a_failure_keeps_the_former_output(tmp_path: Path, write_lines: WriteLines) -> None:
    out = tmp_path / "out.jsonl"
    convert("sharegpt", write_lines(tmp_path / "a.jsonl", [GOOD]), "--out", out)
    before = out.read_bytes()
    for lines, fragment in (
        ([GOOD, BAD], r"b\.jsonl:2: conversations\[0\]\.from .*; mend or remove the line"),
        ([], r"b\.jsonl holds no dialogues of the format sharegpt"),
        ([{**GOOD, "conversations": [{"from": "human", "value": "\ud800"}]}], "surrogate"),
    ):
        path = tmp_path / "b.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError, match=fragment):
            convert("sharegpt", path, "--out", out)
        assert out.read_bytes() == before
        assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "out.jsonl"}


def test_places_that_cannot_be_written(tmp_path: Path, write_lines: WriteLines) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "folder.jsonl").mkdir()
    for out, error, fragment in (
        ("a.jsonl", ConfigError, "is also an input"),
        ("folder.jsonl", ConfigError, "is a folder"),
        ("out.parquet", ConfigError, "accepted are names in .jsonl or .jsonl.gz"),
        ("none/out.jsonl", DataError, r"cannot be written \(No such file or directory\)"),
    ):
        with pytest.raises(error, match=fragment):
            convert("sharegpt", path, "--out", tmp_path / out)
    with pytest.raises(ConfigError, match="--source is 'a/b'; accepted are up to 100 letters"):
        convert("sharegpt", path, "--out", tmp_path / "o.jsonl", "--source", "a/b")
    assert json.loads(path.read_text()) == GOOD


def test_events_one_a_line_are_joined(tmp_path: Path, write_lines: WriteLines) -> None:
    def events(run: Any, *texts: str) -> list[Any]:
        return [{"run": run, "type": "user", "content": text} for text in texts]

    path = write_lines(
        tmp_path / "log.jsonl",
        [*events("a", "1", "2"), {"events": events(None, "3")}, *events("b", "4"),
         *events("c", "5", "6"), *events(None, "7", "8")],
    )  # fmt: skip
    convert("agent-log", path, "--out", tmp_path / "out.jsonl")
    found = {d.id: [m.content for m in d.messages] for d in read_documents(tmp_path / "out.jsonl")}
    assert found == {"a": ["1", "2"], "log:3": ["3"], "b": ["4"], "c": ["5", "6"],
                     "log:7": ["7", "8"]}  # fmt: skip


def test_a_run_with_a_bad_line_is_bad_as_a_whole(tmp_path: Path, write_lines: WriteLines) -> None:
    path = write_lines(tmp_path / "log.jsonl", [{"run": 1, "type": "user", "content": "a"}])
    good = '{"run": 2, "type": "user", "content": "b"}\n'
    path.write_text(path.read_text() + '{"run": 1, "type": "fin\n' + path.read_text() + good)
    words = (path, "--out", tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"log\.jsonl:1: line 2 of the run is bad \(malformed"):
        convert("agent-log", *words)
    convert("agent-log", *words, "--max-bad-lines", "1")
    assert [d.id for d in read_documents(tmp_path / "out.jsonl")] == ["2"]


def test_the_sample_log_is_what_its_program_writes() -> None:
    shipped = gzip.decompress(agent_log_sample.SAMPLE.read_bytes())
    assert shipped == gzip.decompress(agent_log_sample.sample())
    assert agent_log_sample.SAMPLE.stat().st_size < 200_000


def test_the_sample_log_gives_tool_turns(
    tmp_path: Path, run_prepare: Callable[..., int], tokenizer: Any
) -> None:
    out = tmp_path / "agents.jsonl.gz"
    convert("agent-log", agent_log_sample.SAMPLE, "--out", out)
    documents = list(read_documents(out))
    assert len(documents) == agent_log_sample.RUNS
    roles = Counter(message.role for document in documents for message in document.messages)
    assert roles["tool"] > 500
    outputs = {m.content for d in documents for m in d.messages if m.role == "tool"}
    assert len(outputs) > 400
    run_prepare("--out", tmp_path / "data", "--input", out)
    source = Source.open(tmp_path / "data", "agent-log")
    assert source.info["flags"]["role_tool"] > 500
