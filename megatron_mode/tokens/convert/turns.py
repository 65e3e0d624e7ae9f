"""Collect the turns of a dialogue that is converted, and refuse what no turn can hold.

A call is written as {"name", "arguments"}, its arguments as an object; ids only tie results to
calls, so they are left out, and the results of a turn are put in the order of its calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_mode.tokens.json_values import BadLineError, parse_tools, show
from megatron_mode.tokens.read.lines import compact_json
from megatron_mode.tokens.turns import Call, Results, Turn, parsed


class Turns:
    """Hold the messages so far and the calls that wait for a result."""

    def __init__(self, tools: Any = None, *, calls_in_text: bool = False) -> None:
        """Start a dialogue; tools is a list of schemas, one schema, or a string that holds them.

        With calls_in_text any turn of the assistant may hold a call, and so be followed by results.
        """
        tools = parse_tools(tools)
        self._tools = [tools] if isinstance(tools, dict) else tools
        self._messages: list[dict[str, Any]] = []
        self._results: list[tuple[int, dict[str, Any]]] = []
        self._waiting = Results()
        self._ignored: list[str] = []
        self._calls_in_text = calls_in_text
        self._takes_results = False

    def say(
        self, role: str, content: str, *, calls: Sequence[Call] = (), mark: Turn | None = None
    ) -> None:
        """Append a turn of system, user or assistant; calls are those of `call`.

        mark is what was read of the turn's other fields.
        """
        self._close()
        message: dict[str, Any] = {"role": role, "content": content}
        if calls:
            message["tool_calls"] = [one.written for one in calls]
        self._messages.append(self._marked(message, mark))
        self._waiting = Results([one.keys for one in calls])
        self._takes_results = bool(calls) or (self._calls_in_text and role == "assistant")

    def result(
        self, content: str, field: str, keys: Sequence[Any] = (), mark: Turn | None = None
    ) -> None:
        """Append what a tool returned; keys are id and name of its call where they are known."""
        if not self._takes_results:
            raise BadLineError(
                f"{field} is a tool result without a call before it; accepted is a result after "
                "the assistant's call"
            )
        place = self._waiting.place(keys)
        if place is None:
            known = next(key for key in keys if key is not None)
            raise BadLineError(
                f"{field} is the result of call {show(known)}; accepted are the calls of "
                f"the turn before it, {show([one[0] for one in self._waiting.calls])}, once each"
            )
        message = self._marked({"role": "tool", "content": content}, mark)
        self._results.append((place, message))

    def record(self) -> dict[str, Any]:
        """Return the dialogue as a record; BadLineError when nothing was said."""
        self._close()
        if not self._messages:
            raise BadLineError("the dialogue holds no turn; accepted is at least one")
        more = {"tools": self._tools, "ignored": self._ignored}
        return {"messages": self._messages, **{name: held for name, held in more.items() if held}}

    def _marked(self, message: dict[str, Any], mark: Turn | None) -> dict[str, Any]:
        if mark is not None:
            self._ignored += mark.ignored
            message.update({} if mark.is_trained else {"weight": 0})
        return message

    def _close(self) -> None:
        ordered = sorted(self._results, key=lambda result: result[0])
        self._messages += [message for _, message in ordered]
        self._results = []


def parsed_list(value: Any, field: str) -> list[Any]:
    """Return a list, one element where a single value is given, read from a string where it is."""
    value = parsed(value, field)
    return value if isinstance(value, list) else [value]


def text_or_json(value: Any, field: str) -> str:
    """Return what a tool gave back: a string as it is, any other value as compact JSON."""
    if value is None:
        raise BadLineError(f"{field} is missing; accepted is a string or a JSON value")
    return value if isinstance(value, str) else compact_json(value)


def turns_of(record: dict[str, Any], fields: tuple[str, ...]) -> tuple[str, list[Any]]:
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


def refuse_media(record: dict[str, Any]) -> None:
    """Refuse images, audio and the like beside the turns."""
    for name in ("image", "images", "audio", "audios", "video", "videos"):
        if record.get(name):
            raise BadLineError(f"{name} is {show(record[name])}; only text content can be mapped")
