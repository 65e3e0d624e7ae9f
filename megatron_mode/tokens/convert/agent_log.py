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

from typing import Any

from megatron_mode.tokens.convert.turns import Turns, text_or_json, turns_of
from megatron_mode.tokens.json_values import BadLineError, show
from megatron_mode.tokens.turns import BLANK_LINE, Call, Turn, call, marks, object_of, text_of

FIELDS = {
    **dict.fromkeys(("system", "user", "thought"), ("content",)),
    "action": ("tool", "arguments", "id"),
    "observation": ("content", "tool", "id"),
    "final": ("content",),
}


def convert(record: Any) -> dict[str, Any]:
    """Turn one run into one dialogue."""
    if isinstance(record, list):
        record = {"events": record}
    record = object_of(record, "the record")
    field, events = turns_of(record, ("events",))
    turns = AgentTurns(record.get("tools"))
    for index, event in enumerate(events):
        turns.add(event, f"{field}[{index}]")
    return turns.record()


def run_of(record: Any) -> tuple[Any] | None:
    """Return the run (in a tuple) of a line that is one event; None for a line that is a run."""
    if isinstance(record, dict) and "events" not in record and "type" in record:
        return (record.get("run"),)
    return None


class AgentTurns(Turns):
    """Join thoughts and actions to assistant turns."""

    def __init__(self, tools: Any) -> None:
        super().__init__(tools)
        self._thoughts: list[str] = []
        self._actions: list[Call] = []
        self._marks: list[Turn] = []

    def add(self, event: Any, place: str) -> None:
        """Append an event."""
        event = object_of(event, place)
        kind = event.get("type")
        if kind not in FIELDS:
            raise BadLineError(f"{place}.type is {show(kind)}; accepted are {', '.join(FIELDS)}")
        mark = Turn("assistant", "", [], (), *marks(event, place, ("run", "type", *FIELDS[kind])))
        if kind == "action":
            name = text_of(event.get("tool"), f"{place}.tool")
            given = {"name": name, "arguments": event.get("arguments")}
            self._actions.append(call(given, place, event.get("id")))
            self._marks.append(mark)
            return
        content = text_or_json(event.get("content"), f"{place}.content")
        if kind == "observation":
            self._speak()
            self.result(content, place, (event.get("id"), event.get("tool")), mark)
            return
        content = text_of(event.get("content"), f"{place}.content")
        if kind == "thought" or kind == "final":
            if self._actions:
                self._speak()
            self._thoughts.append(content)
            self._marks.append(mark)
        if kind != "thought":
            self._speak()
        if kind in ("system", "user"):
            self.say(kind, content, mark=mark)

    def record(self) -> dict[str, Any]:
        """Return the dialogue as a record."""
        self._speak()
        return super().record()

    def _speak(self) -> None:
        if self._thoughts or self._actions:
            words = BLANK_LINE.join(self._thoughts)
            is_trained = all(mark.is_trained for mark in self._marks)
            ignored = tuple(name for mark in self._marks for name in mark.ignored)
            mark = Turn("assistant", words, [], (), is_trained, ignored)
            calls, self._thoughts, self._actions, self._marks = self._actions, [], [], []
            self.say("assistant", words, calls=calls, mark=mark)
