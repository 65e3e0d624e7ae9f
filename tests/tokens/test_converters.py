"""Each format becomes messages that `documents` accepts, word for word, or one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_mode.tokens.convert import FORMATS
from megatron_mode.tokens.documents import BadLineError, Document, parse_line

CALL = {"name": "get_price", "arguments": {"of": "tea"}}
TOOL = {"name": "get_price", "parameters": {"of": "string"}}


def converted(form: str, record: Any) -> dict[str, Any]:
    return FORMATS[form](json.loads(json.dumps(record)))


def read(dialogue: dict[str, Any]) -> Document:
    return parse_line(json.dumps(dialogue).encode(), "s", 1)


def told(form: str, record: Any) -> list[tuple[str, str]]:
    """Return (role, content) as a document holds them."""
    return [message[:2] for message in read(converted(form, record)).messages]


def test_sharegpt_of_both_key_styles() -> None:
    record = {
        "system": "Be brief.",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Price?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
    }
    dialogue = converted("sharegpt", record)
    assert dialogue == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Price?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [TOOL],
    }
    assert read(dialogue).messages[2].content == ('[{"name":"get_price","arguments":{"of":"tea"}}]')


def test_openai_calls_results_and_parts() -> None:
    def call(key: str, of: str) -> dict[str, Any]:
        arguments = json.dumps({"of": of})
        function = {"name": "get_price", "arguments": arguments}
        return {"id": key, "type": "function", "function": function}

    record = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be"},
                                              {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Tea and milk?"},
            {"role": "assistant", "content": "Both:", "tool_calls": [call("a", "tea"),
                                                                     call("b", "milk")]},
            {"role": "tool", "tool_call_id": "b", "content": "milk 1"},
            {"role": "tool", "tool_call_id": "a", "content": "tea 3"},
            {"role": "assistant", "content": None, "function_call": {"name": "end",
                                                                     "arguments": "{}"}},
            {"role": "function", "name": "end", "content": "ended"},
        ],
        "functions": [TOOL],
    }  # fmt: skip
    assert told("openai", record) == [
        ("system", "Be\n\nbrief."),
        ("user", "Tea and milk?"),
        ("assistant", 'Both:\n\n[{"name":"get_price","arguments":{"of":"tea"}},'
         '{"name":"get_price","arguments":{"of":"milk"}}]'),
        ("tool", "tea 3"),
        ("tool", "milk 1"),
        ("assistant", '[{"name":"end","arguments":{}}]'),
        ("tool", "ended"),
    ]  # fmt: skip
    assert converted("openai", record)["tools"] == [TOOL]


def test_results_find_their_calls_by_id_then_by_name_then_in_order() -> None:
    def results(*messages: dict[str, Any]) -> list[str]:
        calls = [{"id": key, "function": {"name": f"f{key}", "arguments": "{}"}} for key in "ab"]
        record = {"messages": [turn("assistant", None, tool_calls=calls), *messages]}
        return [content for role, content in told("openai", record) if role == "tool"]

    by_id = [turn("tool", key, tool_call_id=key, name="f") for key in "ba"]
    by_name = [turn("tool", key, name=f"f{key}") for key in "ba"]
    assert results(*by_id) == results(*by_name) == ["a", "b"]
    assert results(turn("tool", "b"), turn("tool", "a")) == ["b", "a"]
    with pytest.raises(
        BadLineError, match=r'is the result of call "b"; .* \["a", "b"\], once each'
    ):
        results(*by_id, by_id[0])


def test_calls_may_stand_in_sharegpt_texts() -> None:
    spoken = [{"from": "gpt", "value": "<tool_call>f</tool_call>"}, {"from": "tool", "value": "3"}]
    assert told("sharegpt", {"conversations": spoken})[1] == ("tool", "3")


def test_function_call_queries() -> None:
    expected = [("user", "Tea?"), ("assistant", '[{"name":"get_price","arguments":{"of":"tea"}}]')]
    for record in (
        {"query": "Tea?", "tools": json.dumps([TOOL]), "answers": json.dumps([CALL])},
        {"question": [[{"role": "user", "content": "Tea?"}]], "function": TOOL, "answers": CALL},
    ):
        assert told("function-call", record) == expected
        assert converted("function-call", record)["tools"] == [TOOL]


def test_function_call_chats() -> None:
    system = f"SYSTEM: You may call these -\n{json.dumps(TOOL, indent=4)}\n{json.dumps(TOOL)}"
    quoted = """<functioncall> {"name": "get_price", "arguments": '{"of": "tea"}'} <|endoftext|>"""
    chat = (
        f'USER: Tea?\n\n\nASSISTANT: Let me see. {quoted}\n\n\nFUNCTION RESPONSE: {{"price": 3}}'
        "\n\n\nASSISTANT: It is 3.\nOr: 3. <|endoftext|>\n\n\n"
    )
    assert told("function-call", {"system": system, "chat": chat}) == [
        ("system", "You may call these -"),
        ("user", "Tea?"),
        ("assistant", 'Let me see.\n\n[{"name":"get_price","arguments":{"of":"tea"}}]'),
        ("tool", '{"price": 3}'),
        ("assistant", "It is 3.\nOr: 3."),
    ]
    assert converted("function-call", {"system": system, "chat": chat})["tools"] == [TOOL, TOOL]
    plain = {"system": "Write {json} only.", "chat": "USER: a"}
    assert told("function-call", plain)[0] == ("system", "Write {json} only.")


def test_agent_log_events() -> None:
    events = [
        {"type": "user", "content": "Tea and milk?"},
        {"type": "thought", "content": "I ask twice."},
        {"type": "action", "tool": "price", "arguments": {"of": "tea"}, "id": "1"},
        {"type": "action", "tool": "price", "arguments": '{"of": "milk"}', "id": "2"},
        {"type": "observation", "content": {"price": 1}, "id": "2"},
        {"type": "observation", "content": 3, "id": "1"},
        {"type": "thought", "content": "Three and one."},
        {"type": "final", "content": "Four."},
    ]
    expected = [
        ("user", "Tea and milk?"),
        ("assistant", 'I ask twice.\n\n[{"name":"price","arguments":{"of":"tea"}},'
         '{"name":"price","arguments":{"of":"milk"}}]'),
        ("tool", "3"),
        ("tool", '{"price":1}'),
        ("assistant", "Three and one.\n\nFour."),
    ]  # fmt: skip
    assert told("agent-log", events) == told("agent-log", {"events": events}) == expected


def test_nulls_that_pad_a_table_of_calls_are_no_text() -> None:
    """A call lacks what a table gave it of the others; a null that its schema names is meant."""
    takes_null = {"type": ["string", "null"]}
    padded = {"city": "Oslo", "day": None, "x": None}
    kept = '[{"name":"weather","arguments":{"city":"Oslo","day":null}}]'
    schemas = [
        {"name": name, "parameters": {**dict.fromkeys(("city", "day", "x")), **fields}}
        for name, fields in (("weather", {"city": {"type": "string"}, "day": takes_null}),
                             ("add", {"x": {"type": "integer"}}))
    ]  # fmt: skip
    asked = {"query": "Oslo?", "answers": [{"name": "weather", "arguments": padded}]}
    assert told("function-call", {**asked, "tools": schemas})[1] == ("assistant", kept)
    named = [{"name": tool["name"], "parameters": {"properties": tool["parameters"]}}
             for tool in schemas]  # fmt: skip
    assert told("function-call", {**asked, "tools": named})[1] == ("assistant", kept)
    meant = {**asked, "answers": json.dumps(asked["answers"]), "tools": schemas}
    assert '"day":null,"x":null' in told("function-call", meant)[1][1]

    fields = dict.fromkeys(("content", "tool", "arguments", "id"))
    events = [
        {"type": "user", **fields, "content": "Oslo?"},
        {"type": "action", **fields, "tool": "weather", "arguments": padded},
        {"type": "observation", **fields, "content": {"sky": "fog", "error": None}},
    ]
    expected = [("user", "Oslo?"), ("assistant", kept), ("tool", '{"sky":"fog"}')]
    assert told("agent-log", {"events": events, "tools": schemas}) == expected
    bare = [{key: held for key, held in event.items() if held is not None} for event in events]
    assert told("agent-log", bare)[1:] == [
        ("assistant", '[{"name":"weather","arguments":{"city":"Oslo","day":null,"x":null}}]'),
        ("tool", '{"sky":"fog","error":null}'),
    ]


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("form", "record", "fragment"),
    [
        ("sharegpt", {"conversations": []}, "conversations is []; it must be a list of at least"),
        ("sharegpt", {"text": "a"}, 'no conversations or conversation or messages but ["text"]'),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": "a"}]},
         'conversations[0].from is "narrator"; accepted are human'),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]},
         "conversations[0].value is missing; use a string"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"},
                                        {"from": "tool", "value": "b"}]},
         "conversations[1] is a tool result without a call"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{name"}]},
         "conversations[0].value is \"{name\", broken JSON (Expecting"),
        ("sharegpt", {"images": ["a.png"], "conversations": [{"from": "human", "value": "a"}]},
         'images is ["a.png"]; only text'),
        ("openai", {"messages": [turn("user", [{"type": "image_url"}])]},
         'messages[0].content[0].type is "image_url"; only text'),
        ("openai", {"messages": [turn("user", [{"type": "input_audio"}])]}, "only text"),
        ("openai", {"messages": [turn("narrator", "a")]}, "accepted are system, developer"),
        ("openai", {"messages": [turn("user", None)]}, "messages[0].content is missing"),
        ("openai", {"messages": [turn("tool", "a", tool_call_id="x")]}, "without a call"),
        ("openai", {"messages": [turn("assistant", "I call f."), turn("tool", "a")]},
         "messages[1] is a tool result without a call"),
        ("openai", {"messages": [turn("assistant", "", tool_calls=[{"id": "x", "function": CALL}]),
                                 turn("tool", "a", tool_call_id="y")]},
         'messages[1] is the result of call "y"; accepted are the calls of the turn before it, '
         '["x"]'),
        ("openai", {"messages": [turn("assistant", "", tool_calls=[
            {"function": {"name": "f", "arguments": "{of: tea}"}}])]},
         "messages[0].tool_calls[0].function.arguments is \"{of: tea}\", broken JSON"),
        ("openai", {"messages": [turn("assistant", "a", reasoning_content="why")]},
         "messages[0].reasoning_content"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a", "thinking": "why"}]},
         "conversations[0].thinking is"),
        ("agent-log", [{"type": "user", "content": "a", "image": "a.png"}], "events[0].image is"),
        ("function-call", {"query": [turn("user", "a", audio={"id": 1})], "answers": CALL},
         "query[0].audio is"),
        ("openai", {"messages": [turn("user", "a")], "tools": "f("}, "tool schema that is not"),
        ("function-call", {"query": "a", "answers": "[]"}, "answers is []"),
        ("function-call", {"query": "a", "tools": []}, "accepted are query, tools and answers"),
        ("function-call", {"query": "a", "answers": [{"name": "f", "arguments": 3}]},
         "answers[0].arguments is 3; use an object"),
        ("function-call", {"chat": "Hello"}, 'chat begins with "Hello"'),
        ("function-call", {"chat": "USER: a\nASSISTANT: <functioncall> {\"name\""},
         'chat turn 2 is "{\\"name\\"", broken JSON'),
        ("agent-log", [{"type": "dream", "content": "a"}], 'events[0].type is "dream"; accepted'),
        ("agent-log", [{"type": "observation", "content": "a"}], "without a call"),
        ("agent-log", [{"type": "action", "arguments": {}}], "events[0].tool is missing"),
        ("agent-log", [{"type": "user"}], "events[0].content is missing"),
        ("agent-log", [{"type": "user", "content": "a", "id": None},
                       {"type": "action", "tool": "f"},
                       {"type": "observation", "content": "b", "tool": [1]}],
         "events[2] is the result of call [1]"),
        ("agent-log", {"events": "a"}, 'events is "a"'),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_said(form: str, record: Any, fragment: str) -> None:
    with pytest.raises(BadLineError) as caught:
        converted(form, record)
    assert fragment in str(caught.value)
