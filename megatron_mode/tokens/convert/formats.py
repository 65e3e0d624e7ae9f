"""List the formats, and read those that are lists of turns.

    openai      {"messages": [{"role", "content", ...}], "tools"?}, as `tokens.turns` parses them
    sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...], "system"?, "tools"?}

`functions` is the older name of tools. Turns of ShareGPT may also be keyed `role` and `content`;
its `function_call` turn holds {"name", "arguments"} or a list of them as JSON, its `observation`
turn what the tool returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_mode.tokens.convert.agent_log import agent_log
from megatron_mode.tokens.convert.dialogue import calls_in, dialogue, turns_in
from megatron_mode.tokens.convert.function_call import function_call
from megatron_mode.tokens.json_values import BadLineError, parse_tools, show
from megatron_mode.tokens.turns import (
    Turn,
    marked,
    object_of,
    one_of,
    parse_turns,
    text_of,
    tools_of,
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


FORMATS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "sharegpt": sharegpt,
    "openai": openai,
    "function-call": function_call,
    "agent-log": agent_log,
}
