"""Read OpenAI chat dialogues.

    {"messages": [{"role", "content", "tool_calls"?, "tool_call_id"?, "name"?}], "tools"?: [...]}

A content is a string or a list of {"type": "text", "text"}, joined by blank lines. `functions`,
`function_call` and the role `function` are the older names of tools, calls and results; the role
`developer` becomes system.
"""

from __future__ import annotations

from typing import Any

from megatron_mode.tokens.convert.turns import (
    BLANK_LINE,
    Call,
    Turns,
    call,
    object_of,
    refuse_media,
    text_of,
    turns_of,
)
from megatron_mode.tokens.documents import BadLineError, show

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}


def convert(record: Any) -> dict[str, Any]:
    """Turn one record into one dialogue."""
    record = object_of(record, "the record")
    field, messages = turns_of(record, ("messages",))
    turns = Turns(record.get("tools") or record.get("functions"))
    for index, message in enumerate(messages):
        place = f"{field}[{index}]"
        message = object_of(message, place)
        refuse_media(message, f"{place}.")
        role = message.get("role")
        role = ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            raise BadLineError(
                f"{place}.role is {show(message.get('role'))}; accepted are {', '.join(ROLES)}"
            )
        calls = calls_of(message, place) if role == "assistant" else []
        content = content_of(message, place, is_needed=not calls)
        if role == "tool":
            turns.result(content, place, message.get("tool_call_id"), message.get("name"))
        else:
            turns.say(role, content, calls=calls)
    return turns.record()


def content_of(message: dict[str, Any], place: str, *, is_needed: bool) -> str:
    """Return the text of a message; "" for a null one beside calls."""
    content = message.get("content")
    if content is None:
        content = message.get("refusal")
    if content is None and not is_needed:
        return ""
    if not isinstance(content, list):
        return text_of(content, f"{place}.content")
    texts = []
    for index, part in enumerate(content):
        where = f"{place}.content[{index}]"
        part = object_of(part, where)
        key = TEXT_PARTS.get(str(part.get("type")))
        if key is None:
            raise BadLineError(
                f"{where}.type is {show(part.get('type'))}; only text content can be mapped"
            )
        texts.append(text_of(part.get(key), f"{where}.{key}"))
    return BLANK_LINE.join(texts)


def calls_of(message: dict[str, Any], place: str) -> list[Call]:
    """Return the calls of an assistant's message, of the present or the older form."""
    if message.get("function_call"):
        return [call(message["function_call"], f"{place}.function_call")]
    given = message.get("tool_calls") or []
    if not isinstance(given, list):
        raise BadLineError(f"{place}.tool_calls is {show(given)}; it must be a list of calls")
    calls = []
    for index, one in enumerate(given):
        where = f"{place}.tool_calls[{index}]"
        one = object_of(one, where)
        calls.append(call(one.get("function", one), f"{where}.function", one.get("id")))
    return calls
