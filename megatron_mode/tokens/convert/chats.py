"""Read formats that are lists of turns, and write the turns of every format as one dialogue.

    openai      {"messages": [{"role", "content", ...}], "tools"?}, as `tokens.turns` parses them
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...], "system"?, "tools"?}

Turns of ShareGPT may also be keyed `role` and `content`; its `function_call` turn holds {"name",
"arguments"} or a list of them as JSON, its `observation` turn what the tool returned.

A call is written as {"name", "arguments"}, its arguments as an object; ids only tie results to
calls, so they are left out, and the results of a turn are put in the order of its calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_mode.tokens.json_values import BadLineError, parse_tools, parsed, show
from megatron_mode.tokens.turns import (
    Call,
    Turn,
    in_call_order,
    marked,
    object_of,
    one_of,
    parse_turns,
    text_of,
    tools_of,
    written_call,
)

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def openai(record: Any) -> dict[str, Any]:
    """Turn one record of OpenAI's chats into one dialogue."""
    field, messages = turns_in(object_of(record, "the record"), "messages")
    tools = tools_of(record)
    return dialogue(parse_turns(messages, field, tools), tools)


def sharegpt(record: Any) -> dict[str, Any]:
    """Turn one record of ShareGPT into one dialogue."""
    record = object_of(record, "the record")
    for name in MEDIA:
        if record.get(name):
            raise BadLineError(f"{name} is {show(record[name])}; only text content can be mapped")
    return dialogue(spoken_turns(record), parse_tools(record.get("tools")), calls_in_text=True)


def spoken_turns(record: dict[str, Any]) -> Iterator[Turn]:
    """Yield the turns of a record of ShareGPT."""
    field, spoken = turns_in(record, "conversations", "conversation", "messages")
    if record.get("system"):
        yield Turn("system", "system", text_of(record["system"], "system"))
    for index, message in enumerate(spoken):
        place = f"{field}[{index}]"
        message = object_of(message, place)
        by, holds = ("from", "value") if "from" in message else ("role", "content")
        role = one_of(SPEAKERS, message.get(by), f"{place}.{by}")
        turn = Turn(place, role, text_of(message.get(holds), f"{place}.{holds}"))
        if role == "call":
            calls = calls_in(turn.content, f"{place}.{holds}")
            turn = turn._replace(role="assistant", content="", calls=calls)
        yield marked(turn, message, (by, holds))


def dialogue(turns: Iterable[Turn], tools: Any, *, calls_in_text: bool = False) -> dict[str, Any]:
    """Return a dialogue as a record, with the fields of its turns that are `ignored`.

    tools are as `parse_tools` returns them. With calls_in_text any turn of the assistant may hold a
    call, and so be followed by results.
    """
    turns, takes_results = list(turns), False
    for turn in turns:
        if turn.role != "tool":
            takes_results = bool(turn.calls) or (calls_in_text and turn.role == "assistant")
        elif not takes_results:
            raise BadLineError(
                f"{turn.field} is a tool result without a call before it; give the assistant's "
                "call first"
            )
    if not turns:
        raise BadLineError("the dialogue holds no turn; give at least one")
    ignored = [name for turn in turns for name in turn.ignored]
    more = {"tools": [tools] if isinstance(tools, dict) else tools, "ignored": ignored}
    messages = [message_of(turn) for turn in in_call_order(turns, is_strict=True)]
    return {"messages": messages, **{name: held for name, held in more.items() if held}}


def message_of(turn: Turn) -> dict[str, Any]:
    """Return a turn as `documents` reads it."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["tool_calls"] = [written_call(call).given for call in turn.calls]
    return message if turn.is_trained else {**message, "weight": 0}


def turns_in(record: dict[str, Any], *fields: str) -> tuple[str, list[Any]]:
    """Return the name and value of the first of these fields that the record has."""
    for field in fields:
        if record.get(field) is not None:
            if not isinstance(record[field], list) or not record[field]:
                raise BadLineError(
                    f"{field} is {show(record[field])}; it must be a list of at least one turn"
                )
            return field, record[field]
    raise BadLineError(
        f"the record has no {' or '.join(fields)} but {show(sorted(record))}; name the format that "
        "it has with --from"
    )


def calls_in(value: Any, field: str) -> list[Call]:
    """Return calls that stand in a list, alone, or as JSON in a string."""
    value = parsed(value, field)
    listed = value if isinstance(value, list) else [value]
    places = [f"{field}[{index}]" for index in range(len(listed))]
    return [Call(object_of(one, at), at) for one, at in zip(listed, places, strict=True)]
