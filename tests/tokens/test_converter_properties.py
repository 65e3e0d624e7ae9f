"""No converter loses a word, and none meets a record that it has no answer to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_formats import TEXT

from megatron_mode.tokens.convert import FORMATS
from megatron_mode.tokens.documents import BadLineError, Document, parse_line


def converted(form: str, record: Any) -> dict[str, Any]:
    return FORMATS[form](json.loads(json.dumps(record)))


def read(dialogue: dict[str, Any]) -> Document:
    return parse_line(json.dumps(dialogue).encode(), "s", 1)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string in a value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        named = value if isinstance(value, dict) else dict(enumerate(value))
        for key, inner in named.items():
            if (key, inner) != ("type", "text"):
                yield from strings_of(inner)


ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers() | st.lists(TEXT, max_size=2), max_size=2)
CALLS = st.fixed_dictionaries({"name": TEXT.filter(bool), "arguments": ARGUMENTS})
SHAREGPT_TURNS = st.one_of(
    st.builds(lambda who, text: [{"from": who, "value": text}],
              st.sampled_from(["human", "gpt", "system"]), TEXT),
    st.builds(lambda call, text: [{"from": "function_call", "value": json.dumps(call)},
                                  {"from": "observation", "value": text}], CALLS, TEXT),
)  # fmt: skip
OPENAI_TURNS = st.one_of(
    st.builds(lambda who, text: [turn(who, text)],
              st.sampled_from(["system", "developer", "user", "assistant"]), TEXT),
    st.builds(lambda texts: [turn("user", [{"type": "text", "text": text} for text in texts])],
              st.lists(TEXT, max_size=3)),
    st.builds(lambda text, calls, results: [
        turn("assistant", text, tool_calls=[
            {"id": str(n), "function": {**call, "arguments": json.dumps(call["arguments"])}}
            for n, call in enumerate(calls)]),
        *(turn("tool", result, tool_call_id=str(n))
          for n, result in list(enumerate(results[: len(calls)]))[::-1])],
              st.none() | TEXT, st.lists(CALLS, min_size=1, max_size=3), st.lists(TEXT)),
)  # fmt: skip
EVENTS = st.one_of(
    st.builds(lambda kind, text: [{"type": kind, "content": text}],
              st.sampled_from(["system", "user", "thought", "final"]), TEXT),
    st.builds(lambda call, seen: [{"type": "action", "tool": call["name"],
                                   "arguments": call["arguments"]},
                                  {"type": "observation", "content": seen}],
              CALLS, TEXT | ARGUMENTS),
)  # fmt: skip


def flat(turns: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [one for some in turns for one in some]


RECORDS = st.one_of(
    st.builds(lambda t: ("sharegpt", {"conversations": flat(t)}),
              st.lists(SHAREGPT_TURNS, min_size=1, max_size=5)),
    st.builds(lambda t: ("openai", {"messages": flat(t)}),
              st.lists(OPENAI_TURNS, min_size=1, max_size=5)),
    st.builds(lambda t: ("agent-log", {"events": flat(t)}),
              st.lists(EVENTS, min_size=1, max_size=5)),
    st.builds(lambda q, a: ("function-call", {"query": q, "answers": a}),
              TEXT, st.lists(CALLS, min_size=1, max_size=3)),
)  # fmt: skip


@settings(max_examples=400)
@given(RECORDS)
def test_nothing_is_lost(given_record: tuple[str, dict[str, Any]]) -> None:
    """Every string of the input stands in the document, in JSON where it is an argument."""
    form, record = given_record
    dialogue = converted(form, record)
    if not any(message["content"] or "tool_calls" in message for message in dialogue["messages"]):
        with pytest.raises(BadLineError, match="only empty turns"):
            read(dialogue)
        return
    document = read(dialogue)
    whole = "\n".join(message.content for message in document.messages)
    calls = json.dumps([m.get("tool_calls") for m in dialogue["messages"]], ensure_ascii=False)
    for field, items in record.items():
        for item in items if isinstance(items, list) else [{field: items}]:
            content = item.get("value", item.get("content", item.get("query")))
            if item.get("from") == "function_call" or content is None:
                content = list(strings_of([item.get("arguments", {}), item.get("name", "")]))
            for text in strings_of(content):
                written = json.dumps(text, ensure_ascii=False)
                assert text in whole or written in calls or written[1:-1] in whole
    for message in dialogue["messages"]:
        for call in message.get("tool_calls", []):
            assert json.dumps(call, ensure_ascii=False, separators=(",", ":")) in whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT
    | st.sampled_from(["user", "human", "tool", "action", "function_call", "{}", "[1]", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["conversations", "messages", "from", "value", "role", "content", "type",
                         "tool_calls", "function", "name", "arguments", "query", "answers", "chat",
                         "system", "tools", "events", "tool", "id", "function_call"]),
        inner, max_size=5),
    max_leaves=15,
)  # fmt: skip


@settings(max_examples=600)
@given(st.sampled_from(list(FORMATS)), JSON)
def test_any_record_is_a_document_or_a_bad_line(form: str, record: Any) -> None:
    with contextlib.suppress(BadLineError):
        assert read(converted(form, record)).messages
