"""Collect the turns of a dialogue and refuse what no turn can hold.

A call is written as {"name", "arguments"}, its arguments as an object; ids only tie results to
calls, so they are left out, and the results of a turn are put in the order of its calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_mode.tokens.documents import BadLineError, parse_tools, show
from megatron_mode.tokens.read.lines import compact_json

BLANK_LINE = "\n\n"


class Call(NamedTuple):
    """Hold a call as it is written, and what its result may name it by: id, then name."""

    written: dict[str, Any]
    keys: tuple[Any, ...]


class Turns:
    """Hold the messages so far and the calls that wait for a result."""

    def __init__(self, tools: Any = None, *, calls_in_text: bool = False) -> None:
        """Start a dialogue; tools is a list of schemas, one schema, or a string that holds them.

        With calls_in_text any turn of the assistant may hold a call, and so be followed by results.
        """
        tools = parse_tools(tools)
        self._tools = [tools] if isinstance(tools, dict) else tools
        self._messages: list[dict[str, Any]] = []
        self._calls: list[Call] = []
        self._results: list[tuple[int, str]] = []
        self._calls_in_text = calls_in_text
        self._takes_results = False

    def say(self, role: str, content: str, *, calls: Sequence[Call] = ()) -> None:
        """Append a turn of system, user or assistant; calls are those of `call`."""
        self._close()
        message: dict[str, Any] = {"role": role, "content": content}
        if calls:
            message["tool_calls"] = [one.written for one in calls]
        self._messages.append(message)
        self._calls = list(calls)
        self._takes_results = bool(calls) or (self._calls_in_text and role == "assistant")

    def result(self, content: str, field: str, *keys: Any) -> None:
        """Append what a tool returned; keys are id and name of its call where they are known."""
        if not self._takes_results:
            raise BadLineError(
                f"{field} is a tool result without a call before it; accepted is a result after "
                "the assistant's call"
            )
        taken = {index for index, _ in self._results}
        free = [index for index in range(len(self._calls)) if index not in taken]
        known = [key for key in keys if key is not None]
        if known and self._calls:
            matches = (i for key in known for i in free if key in self._calls[i].keys)
            free = list(matches)[:1]
            if not free:
                raise BadLineError(
                    f"{field} is the result of call {show(known[0])}; accepted are the calls of "
                    f"the turn before it, {show([one.keys[0] for one in self._calls])}, once each"
                )
        self._results.append((free[0] if free else len(self._results), content))

    def record(self) -> dict[str, Any]:
        """Return the dialogue as a record; BadLineError when nothing was said."""
        self._close()
        if not self._messages:
            raise BadLineError("the dialogue holds no turn; accepted is at least one")
        return {"messages": self._messages, **({"tools": self._tools} if self._tools else {})}

    def _close(self) -> None:
        for _, content in sorted(self._results, key=lambda result: result[0]):
            self._messages.append({"role": "tool", "content": content})
        self._results = []


def call(value: Any, field: str, key: Any = None) -> Call:
    """Read a call {"name", "arguments"}; key is its id where it has one."""
    if not isinstance(value, dict):
        raise BadLineError(f"{field} is {show(value)}; a call must be an object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise BadLineError(f"{field}.name is {show(name)}; accepted is the name of a tool")
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments = parsed(arguments, f"{field}.arguments") if arguments != "" else {}
    if not isinstance(arguments, dict | list):
        raise BadLineError(f"{field}.arguments is {show(arguments)}; accepted is an object")
    return Call({"name": name, "arguments": arguments}, (name,) if key is None else (key, name))


def parsed(value: Any, field: str) -> Any:
    """Return a value, one that is a string read as JSON; BadLineError when it is broken."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"{field} is {show(value)}, broken JSON ({error})") from None


def parsed_list(value: Any, field: str) -> list[Any]:
    """Return a list, one element where a single value is given, read from a string where it is."""
    value = parsed(value, field)
    return value if isinstance(value, list) else [value]


def text_of(value: Any, field: str) -> str:
    """Return a content that must be a string."""
    if not isinstance(value, str):
        raise BadLineError(f"{field} is {show(value)}; accepted is a string")
    return value


def text_or_json(value: Any, field: str) -> str:
    """Return what a tool gave back: a string as it is, any other value as compact JSON."""
    if value is None:
        raise BadLineError(f"{field} is missing; accepted is a string or a JSON value")
    return value if isinstance(value, str) else compact_json(value)


def object_of(value: Any, field: str) -> dict[str, Any]:
    """Return a value that must be an object."""
    if not isinstance(value, dict):
        raise BadLineError(f"{field} is {show(value)}; it must be an object")
    return value


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


def refuse_media(message: dict[str, Any], field: str) -> None:
    """Refuse images, audio and the like, and text in places that no turn takes."""
    for name in ("image", "images", "audio", "audios", "video", "videos", "reasoning_content"):
        if message.get(name):
            raise BadLineError(
                f"{field}{name} is {show(message[name])}; only text content can be mapped"
            )
