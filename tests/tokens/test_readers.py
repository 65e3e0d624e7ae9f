"""Every format gives the same documents, or one sentence that says what is wrong with the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from written_formats import OBJECTS, WRITERS, Objects, arrow, json_lines, write_dataset, zstd

from megatron_mode.errors import DataError
from megatron_mode.tokens.documents import BadLineError, file_stem, parse_line
from megatron_mode.tokens.read import lines as line_limits
from megatron_mode.tokens.read.readers import open_reader
from megatron_mode.tokens.source.shards import Source

GOOD = b'{"text": "a"}\n'


def lines_of(path: Path) -> list[tuple[int, bytes]]:
    with open_reader(path) as reader:
        return list(reader)


def read(path: Path) -> tuple[list[str], list[str]]:
    """Return the texts of good lines, and what is wrong with each bad one."""
    texts, reasons = [], []
    for number, line in lines_of(path):
        try:
            texts.append(parse_line(line, "s", number).text)
        except BadLineError as reason:
            reasons.append(str(reason))
    return texts, reasons


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60)
@given(objects=OBJECTS)
def test_every_format_reads_back(folder: Path, name: str, objects: Objects) -> None:
    path = folder / name
    path.write_bytes(WRITERS[name](objects))
    found = lines_of(path)
    assert [number for number, _ in found] == list(range(1, len(objects) + 1))
    expected = [parse_line(json.dumps(o).encode(), "s", n) for n, o in enumerate(objects, 1)]
    assert [parse_line(line, "s", number) for number, line in found] == expected


@given(objects=OBJECTS)
@settings(max_examples=20)
def test_a_saved_dataset_reads_back(
    tmp_path_factory: pytest.TempPathFactory, objects: Objects
) -> None:
    path = write_dataset(tmp_path_factory.mktemp("saved") / "d", objects)
    found = [parse_line(line, "s", number) for number, line in lines_of(path)]
    assert found == [parse_line(json.dumps(o).encode(), "s", n) for n, o in enumerate(objects, 1)]


def test_large_batches_are_cut(tmp_path: Path) -> None:
    objects = [{"id": str(i), "text": "sea " * 5000} for i in range(2000)]
    table = pa.Table.from_pylist(objects)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with open_reader(tmp_path / name) as reader:
            positions = [(number, reader.position_bytes) for number, _ in reader]
            assert [number for number, _ in positions] == list(range(1, 2001))
            assert sorted(p for _, p in positions) == [p for _, p in positions]
            assert reader.position_bytes == (tmp_path / name).stat().st_size


def test_progress_is_the_position_on_disk(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        path = tmp_path / name
        path.write_bytes(write([{"text": "sea"}] * 100))
        with open_reader(path) as reader:
            assert len(list(reader)) == 100
            assert reader.position_bytes == path.stat().st_size


def test_null_columns_are_absent(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "k": None}]}
    rows = [{"text": None, "messages": [message], "tools": [{"name": "f", "x": {"y": None}}],
             "extra": 1}, {"text": "sea", "messages": None, "tools": None}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [json.loads(line) for _, line in lines_of(tmp_path / "a.parquet")] == [
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
         "tools": [{"name": "f", "x": {}}]},
        {"text": "sea"},
    ]  # fmt: skip


def test_every_column_on_request(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["q"], "answers": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has the columns query, answers; .* text .* convert"):
        lines_of(tmp_path / "a.parquet")
    with open_reader(tmp_path / "a.parquet", None) as reader:
        assert list(reader) == [(1, b'{"query":"q","answers":"a"}')]


def test_a_row_that_is_not_text_is_a_bad_line(tmp_path: Path) -> None:
    utf8 = pa.array([b"a", b"\xff", b"b"]).cast(pa.string(), safe=False).view(pa.string())
    pq.write_table(pa.table({"text": utf8}), tmp_path / "a.parquet")
    texts, (reason,) = read(tmp_path / "a.parquet")
    assert texts == ["a", "b"]
    assert "the row cannot be read ('utf-8' codec" in reason
    pq.write_table(pa.table({"text": pa.array([b"a"])}), tmp_path / "b.parquet")
    _, (reason,) = read(tmp_path / "b.parquet")
    assert "the row holds a value that is not JSON (Object of type bytes" in reason


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "b.arrow"])
def test_a_long_line_is_a_bad_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mode.tokens.read import columns as tables

    limit = len('{"text": "12345678"}')  # the line end does not count
    for module in (tables, line_limits):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", limit)
    monkeypatch.setattr(line_limits, "BUFFER_BYTES", 5)
    lengths = [8, 10, 30, 8, 40]
    write = WRITERS.get(name, arrow)
    (tmp_path / name).write_bytes(write([{"text": "x" * length} for length in lengths]))
    texts, found = read(tmp_path / name)
    assert texts == ["x" * 8] * 2
    assert len(found) == 3
    assert all("the line is 0.0 MiB long; accepted are up to" in reason for reason in found)


@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        ('{"text": "\u00e9"}\n'.encode("latin-1"), "byte 11 is not UTF-8"),
        (b'{"text": "a\0"}\n', "Invalid control character"),
        (b"\0\0\0\n" + GOOD, "malformed JSON"),
        (b'{"messages": [{"role": "gpt", "content": "a"}]}', 'role is "gpt"; accepted are system'),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": "f("}',
         'tools is "f(", a tool schema that is not JSON'),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": 3}', "tools is 3; use"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": "3"}', "tools is 3;"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": ' + b"[" * 300 + b"]" * 300
         + b"}", "tools is nested deeper than 100 levels"),
    ],
)  # fmt: skip
def test_bad_bytes_are_bad_lines(tmp_path: Path, data: bytes, fragment: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + data + GOOD if data.endswith(b"\n") else data)
    assert fragment in " ".join(read(path)[1])


def test_tools_may_be_json_in_a_string() -> None:
    def tools(value: Any) -> Any:
        line = {"messages": [{"role": "user", "content": "a"}], "tools": value}
        return parse_line(json.dumps(line).encode(), "s", 1).tools

    assert tools('[{"name": "f"}]') == tools([{"name": "f"}]) == [{"name": "f"}]
    assert tools("") is tools(" \n") is tools("null") is tools(None) is None


def test_blank_lines_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + GOOD[:-1] + b"\r\n\n \t\n" + GOOD[:-1])
    assert [number for number, _ in lines_of(path)] == [2, 5]
    for empty in (b"", b"\xef\xbb\xbf", b"\n\n"):
        path.write_bytes(empty)
        assert lines_of(path) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n'.encode(encoding))
    with pytest.raises(DataError, match=r"a\.jsonl is UTF-16; save it as UTF-8"):
        lines_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("data", [b"", GOOD, b"\x1f"])
def test_a_name_must_be_true(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=r"is named \.\w+ but does not begin like \w+ \("):
        lines_of(tmp_path / name)


@pytest.mark.parametrize("name", [n for n in WRITERS if not n.endswith(".jsonl")])
def test_no_truncation_is_silent(tmp_path: Path, name: str) -> None:
    """Members of one gzip or zstd file are files too, so only the second may be cut off whole."""
    objects = [{"text": f"page {i}"} for i in range(6)]
    data = WRITERS[name](objects)
    path = tmp_path / name
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        try:
            found = lines_of(path)
        except DataError:
            continue
        assert len(found) == 3
        assert name in ("a.jsonl.gz", "a.jsonl.zst")
    path.write_bytes(data + data)
    if "jsonl" in name:
        assert len(lines_of(path)) == 12
    elif name == "stream.arrow":
        with pytest.raises(DataError, match="continues after its end"):
            lines_of(path)
    if "parquet" not in name and name != "file.arrow":  # their footers stand at the end
        path.write_bytes(data + b"\1\2")
        with pytest.raises(DataError):
            lines_of(path)


def test_zstd_frames_to_skip(tmp_path: Path) -> None:
    skipped = struct.pack("<II", 0x184D2A50, 3) + b"abc"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skipped + zstd(GOOD) + skipped + zstd(GOOD))
    assert len(lines_of(path)) == 2


def test_folders_say_what_to_name(tmp_path: Path) -> None:
    saved = write_dataset(tmp_path / "d" / "train", [{"text": "a"}] * 4)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits \(train, test\); name one, such as .*/d/"):
        open_reader(tmp_path / "d")
    with pytest.raises(DataError, match="folder without state"):
        open_reader(tmp_path)
    state = json.loads((saved / "state.json").read_text())
    for broken, fragment in (
        ({**state, "_indices_data_files": [{"filename": "i"}]}, "flatten_indices"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"gone\.arrow is missing"),
        ({"_data_files": 3}, "lists no _data_files"),
        ([], "no JSON object"),
    ):
        (saved / "state.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match=fragment):
            open_reader(saved)


def test_prepare_takes_every_format(
    tmp_path: Path, run_prepare: Callable[..., int], dialogue: Callable[..., dict[str, Any]]
) -> None:
    objects = [dialogue(f"d{i}", "Where?", "There.", source="chat") for i in range(8)]
    inputs = [write_dataset(tmp_path / "saved", objects)]
    for name in ("a.jsonl.zst", "a.parquet", "stream.arrow"):
        inputs.append(tmp_path / name)
        inputs[-1].write_bytes(WRITERS[name](objects))
    run_prepare("--out", tmp_path / "out", "--duplicates", "keep", "--input", *inputs)
    source = Source.open(tmp_path / "out", "chat")
    assert source.documents == 32
    names = {"saved", "a.jsonl.zst", "a.parquet", "stream.arrow"}
    assert set(source.info["inputs"]) == names


def test_source_names_come_from_the_file() -> None:
    names = ("a.jsonl", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow", "a.gz", "a")
    assert {file_stem(Path("x") / name) for name in names} == {"a"}
    assert file_stem(Path("v1.2.jsonl")) == "v1.2"
    assert json_lines([{"a": 1}]) == b'{"a": 1}\n'


def test_a_window_beyond_the_limit_of_zstd_is_named(tmp_path: Path) -> None:
    """A frame by hand: window of 2 GiB, one raw block."""
    block = (len(GOOD) << 3 | 1).to_bytes(3, "little") + GOOD
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + block)
    with pytest.raises(DataError, match=r"window of more than 128 MiB; .* zstd -dc --long=31"):
        lines_of(path)
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + block)  # 2 MiB
    assert lines_of(path) == [(1, GOOD)]
