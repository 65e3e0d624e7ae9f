"""Check what is accepted as a document, and that a bad line is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.errors import DataError
from megatron_mode.tokens.documents import (
    BadLineError,
    Document,
    Message,
    parse_line,
    read_documents,
)

WriteLines = Callable[[Path, list[Any]], Path]


def parsed(value: Any) -> Document:
    return parse_line(json.dumps(value).encode(), "stem", 7)


def test_text_line() -> None:
    document = parsed({"text": "a\u0000 b", "id": 3, "source": "books", "extra": [1]})
    assert document == Document("3", "books", 1, text="a\u0000 b")


def test_defaults_come_from_the_file() -> None:
    document = parsed({"messages": [{"role": "tool", "content": "x"}], "id": None})
    assert (document.id, document.source, document.mode) == ("stem:7", "stem", 2)
    assert document.messages == (Message("tool", "x"),)


def test_null_content_becomes_the_calls() -> None:
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    expected = '[{"function":{"name":"f","arguments":"{}"}}]'
    assert parsed({"messages": [message]}).messages[0].content == expected
    both = parsed({"messages": [{**message, "content": "Calling."}]})
    assert both.messages[0].content == f"Calling.\n\n{expected}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "malformed JSON at column"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[1]", "must be an object"),
        (b"[" * 100_000, "malformed JSON"),
        (b"{}", "neither text"),
        (b'{"text": "a", "messages": []}', "both text and messages"),
        (b'{"text": ""}', "at least one character"),
        (b'{"text": 3}', "text is 3"),
        (rb'{"text": "\ud800"}', "surrogate"),
        (b'{"messages": []}', "at least one message"),
        (b'{"messages": ["hi"]}', r"messages\[0\] is"),
        (
            b'{"messages": [{"role": "bot", "content": "x"}]}',
            'role is "bot"; accepted are system, developer, user',
        ),
        (b'{"messages": [{"role": [], "content": "x"}]}', "role is"),
        (b'{"messages": [{"content": "x"}]}', "role is missing"),
        (b'{"messages": [{"role": "user", "content": null}]}', "content is missing"),
        (b'{"messages": [{"role": "user", "content": ["x"]}]}', r"content\[0\] is"),
        (rb'{"messages": [{"role": "user", "content": "\uDfff"}]}', "surrogate"),
        (b'{"text": "a", "source": "../etc"}', "source is"),
        (b'{"text": "a", "source": "tokenizer"}', "source is"),
        (b'{"text": "a", "source": "a.flags"}', "source is"),
        (b'{"text": "a", "source": ""}', "source is"),
        (b'{"text": "a", "id": true}', "id is true"),
    ],
)
def test_bad_lines_say_why(line: bytes, words: str) -> None:
    with pytest.raises(BadLineError, match=words):
        parse_line(line, "stem", 1)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["text", "messages", "role", "content", "id", "source", "tools"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_line_is_a_document_or_a_bad_line(line: bytes) -> None:
    try:
        document = parse_line(line, "stem", 1)
    except BadLineError:
        return
    assert document.mode in (1, 2)
    "".join([document.text, *(m.content for m in document.messages)]).encode()


def test_blank_lines_are_skipped_and_bad_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"text"\n{"text": "two"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:4: malformed JSON"):
        list(read_documents(path))
    path.write_text('{"text": "one"}\n\n  \n{"text": "two"}\n')
    assert [d.id for d in read_documents(path)] == ["a:1", "a:4"]


def test_gzip_and_plain_read_alike(tmp_path: Path, write_lines: WriteLines) -> None:
    lines = [{"text": f"{i} \u2028 b"} for i in range(50)]
    plain = write_lines(tmp_path / "same.jsonl", lines)
    zipped = write_lines(tmp_path / "same.jsonl.gz", lines)
    assert list(read_documents(plain)) == list(read_documents(zipped))


def test_reading_streams(tmp_path: Path, write_lines: WriteLines) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz", [{"text": "first"}] * 50_000)
    path.write_bytes(path.read_bytes()[:-20])
    assert next(iter(read_documents(path))).text == "first"


@pytest.mark.parametrize("damage", ["cut", "crc"])
def test_damaged_gzip_is_named(tmp_path: Path, damage: str) -> None:
    data = gzip.compress(b'{"text": "hello"}\n' * 2000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-8] + b"\0" * 8)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: the gzip file is damaged"):
        list(read_documents(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            list(read_documents(path))
