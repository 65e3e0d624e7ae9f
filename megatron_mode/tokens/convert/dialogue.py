"""Write turns as one dialogue, and refuse what no dialogue can hold.

A call is written as {"name", "arguments"}, its arguments as an object; ids only tie results to
calls, so they are left out, and the results of a turn are put in the order of its calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_mode.tokens.json_values import BadLineError, parsed, show
from megatron_mode.tokens.turns import Call, Turn, in_call_order, object_of, written_call


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
