"""Read OpenAI chat dialogues: a list `messages` of turns that `tokens.turns` parses, and `tools`.

`functions` is the older name of tools; the role `developer` becomes system, `function` tool.
"""

from __future__ import annotations

from typing import Any

from megatron_mode.tokens.convert.turns import Turns, turns_of
from megatron_mode.tokens.turns import Turn, call, object_of, parse_turn, tools_of, unpadded


def convert(record: Any) -> dict[str, Any]:
    """Turn one record into one dialogue."""
    record = object_of(record, "the record")
    field, messages = turns_of(record, ("messages",))
    tools = tools_of(record)
    turns = Turns(tools)
    parsed = [parse_turn(message, f"{field}[{n}]") for n, message in enumerate(messages)]
    for index, turn in enumerate(unpadded(parsed, messages, tools)):
        add(turns, turn, f"{field}[{index}]")
    return turns.record()


def add(turns: Turns, turn: Turn, place: str) -> None:
    """Append a turn, its calls of the present or the older form."""
    if turn.role == "tool":
        turns.result(turn.content, place, turn.keys, turn)
        return
    calls = []
    for index, one in enumerate(turn.calls):
        calls.append(
            call(one.get("function", one), f"{place}.tool_calls[{index}].function", one.get("id"))
        )
    turns.say(turn.role, turn.content, calls=calls, mark=turn)
