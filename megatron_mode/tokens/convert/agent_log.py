"""Read agent logs: a run is a list of events, on one line, or one event a line.

    {"id"?, "source"?, "tools"?: [...], "events": [event, ...]}       a run on one line
    [event, ...]                                                      the same without id
    {"run"?: "...", "type": ..., ...}                                 one event a line; the lines of
                                                                      one run stand together
    event                                                             becomes
    {"type": "system" or "user", "content": text}                     that turn
    {"type": "thought", "content": text}                              text before the next action
    {"type": "action", "tool": name, "arguments": {...}, "id"?}       a call of the assistant
    {"type": "observation", "content": text or JSON, "id"?}           a tool turn
    {"type": "final", "content": text}                                an assistant turn

Actions that follow each other are calls of one turn; an id ties an observation to its action, or
`tool` without one. A joined turn with an event that is not to be learnt is not learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_mode.tokens.convert.chats import dialogue, turns_in
from megatron_mode.tokens.json_values import (
    BadLineError,
    meant_values,
    parameters_by_name,
    parse_tools,
)
from megatron_mode.tokens.read.lines import compact_json
from megatron_mode.tokens.turns import (
    BLANK_LINE,
    Call,
    Turn,
    is_padded,
    known,
    marked,
    object_of,
    one_of,
    text_of,
)

FIELDS = {
    **dict.fromkeys(("system", "user", "thought"), ("content",)),
    "action": ("tool", "arguments", "id"),
    "observation": ("content", "tool", "id"),
    "final": ("content",),
}
SPOKEN = ("thought", "action", "final")


def agent_log(record: Any) -> dict[str, Any]:
    """Turn one run into one dialogue."""
    record = {"events": record} if isinstance(record, list) else object_of(record, "the record")
    field, events = turns_in(record, "events")
    tools = parse_tools(record.get("tools"))
    turns = read_events(events, field)
    if any(is_padded(event, ("run", *FIELDS[event["type"]])) for event in events):
        schemas = parameters_by_name(tools)
        arguments = [{"arguments": schemas.get(str(event.get("tool")))} for event in events]
        meant = [meant_values(e, {"properties": a}) for e, a in zip(events, arguments, strict=True)]
        turns = read_events(meant, field)
    return dialogue(joined_turns(turns), tools)


def run_of(record: Any) -> tuple[Any] | None:
    """Return the run (in a tuple) of a line that is one event; None for a line that is a run."""
    if isinstance(record, dict) and "events" not in record and "type" in record:
        return (record.get("run"),)
    return None


def read_events(events: list[Any], field: str) -> list[Turn]:
    """Check events; what the assistant says or does has the type of its event as role."""
    return [turn_of(event, f"{field}[{index}]") for index, event in enumerate(events)]


def turn_of(event: Any, place: str) -> Turn:
    """Read one event."""
    event = object_of(event, place)
    kind = event.get("type")
    fields = one_of(FIELDS, kind, f"{place}.type")
    turn = marked(Turn(place, kind, ""), event, ("run", "type", *fields))
    if kind == "action":
        name = text_of(event.get("tool"), f"{place}.tool")
        given = {"name": name, "arguments": event.get("arguments")}
        return turn._replace(calls=[Call({"id": event.get("id"), "function": given}, place)])
    content = event.get("content")
    if kind != "observation":
        return turn._replace(content=text_of(content, f"{place}.content"))
    if content is None:
        raise BadLineError(f"{place}.content is missing; use a string or a JSON value")
    content = content if isinstance(content, str) else compact_json(content)
    keys = known(event.get("id"), event.get("tool"))
    return turn._replace(role="tool", content=content, keys=keys)


def joined_turns(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Join the thoughts and actions that follow each other to turns of the assistant."""
    spoken: list[Turn] = []
    for turn in turns:
        before = [one.role for one in spoken]
        is_new = "final" in before or ("action" in before and turn.role != "action")
        if spoken and (is_new or turn.role not in SPOKEN):
            yield joined(spoken)
            spoken = []
        if turn.role in SPOKEN:
            spoken.append(turn)
        else:
            yield turn
    if spoken:
        yield joined(spoken)


def joined(spoken: list[Turn]) -> Turn:
    """Return what the assistant said and did as one turn."""
    words = BLANK_LINE.join(turn.content for turn in spoken if turn.role != "action")
    calls = [call for turn in spoken for call in turn.calls]
    ignored = tuple(name for turn in spoken for name in turn.ignored)
    is_trained = all(turn.is_trained for turn in spoken)
    return Turn(spoken[0].field, "assistant", words, calls, (), is_trained, ignored)
