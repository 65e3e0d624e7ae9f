"""Read ShareGPT dialogues.

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}],
     "system"?: "...", "tools"?: [...] or a string}

Turns may also be keyed `role` and `content`. A `function_call` turn holds {"name", "arguments"} or
a list of them as JSON, an `observation` turn what the tool returned.
"""

from __future__ import annotations

from typing import Any

from megatron_mode.tokens.convert.turns import Turns, parsed_list, refuse_media, turns_of
from megatron_mode.tokens.json_values import BadLineError, show
from megatron_mode.tokens.turns import Turn, call, marks, object_of, text_of

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def convert(record: Any) -> dict[str, Any]:
    """Turn one record into one dialogue."""
    record = object_of(record, "the record")
    refuse_media(record)
    field, spoken = turns_of(record, ("conversations", "conversation", "messages"))
    turns = Turns(record.get("tools"), calls_in_text=True)
    if record.get("system"):
        turns.say("system", text_of(record["system"], "system"))
    for index, turn in enumerate(spoken):
        place = f"{field}[{index}]"
        turn = object_of(turn, place)
        by, holds = ("from", "value") if "from" in turn else ("role", "content")
        speaker, value = turn.get(by), text_of(turn.get(holds), f"{place}.{holds}")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise BadLineError(
                f"{place}.{by} is {show(speaker)}; accepted are {', '.join(SPEAKERS)}"
            )
        mark = Turn(role, value, [], (), *marks(turn, place, (by, holds)))
        if role == "call":
            given = parsed_list(value, f"{place}.{holds}")
            calls = [call(one, f"{place}.{holds}[{n}]") for n, one in enumerate(given)]
            turns.say("assistant", "", calls=calls, mark=mark)
        elif role == "tool":
            turns.result(value, place, mark=mark)
        else:
            turns.say(role, value, mark=mark)
    return turns.record()
