"""Read the turns of a dialogue: one parser for `prepare`, `score` and every format of `convert`.

    {"role", "content", "tool_calls"?, "function_call"?, "refusal"?, "tool_call_id"?, "name"?,
     "weight"?, "train"?}

A content is a string or a list of {"type": "text", "text"}, joined by blank lines. `function_call`
is the older name of one call. `weight: 0` and `train: false` keep a turn from being learnt. Ids and
names tie results to calls, so that results stand in the order of their calls. Any other field that
holds something is refused, since it may change what the dialogue says, but for those of IGNORED.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from megatron_mode.tokens.json_values import (
    BadLineError,
    meant_values,
    parameters_by_name,
    parse_tools,
    parsed,
    show,
)

BLANK_LINE = "\n\n"
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **{role: role for role in ("user", "assistant", "tool")},
    "function": "tool",
}
TEXT_PARTS = {**dict.fromkeys(("text", "input_text", "output_text"), "text"), "refusal": "refusal"}
READ = ("role", "content", "tool_calls", "function_call", "refusal", "tool_call_id")
IGNORED = (
    "annotations", "created", "created_at", "date", "end_turn", "finish_reason", "id", "index",
    "lang", "language", "logprobs", "message_id", "metadata", "model", "name", "parent_id",
    "rating", "score", "source", "status", "time", "timestamp", "token_count", "tokens",
    "updated_at", "usage", "uuid",
)  # fmt: skip
EMPTY: tuple[Any, ...] = (None, "", [], {})


class Call(NamedTuple):
    """Hold a call as it is given: {"name", "arguments"}, or "function" with both and its "id"."""

    given: dict[str, Any]
    field: str

    @property
    def keys(self) -> tuple[Any, ...]:
        """Return what a result may name the call by: its id, then the tool's name."""
        function = self.given.get("function", self.given)
        name = function.get("name") if isinstance(function, dict) else None
        return known(self.given.get("id"), name)


class Turn(NamedTuple):
    """Hold one turn as it was read."""

    field: str
    role: str
    content: str
    calls: Sequence[Call] = ()
    keys: tuple[Any, ...] = ()
    """What may name the call that a result belongs to: its id, then its name."""
    is_trained: bool = True
    ignored: tuple[str, ...] = ()


def parse_turns(messages: Sequence[Any], field: str, tools: Any) -> list[Turn]:
    """Check turns, with the tools that they may call.

    Raises BadLineError naming the field that is wrong or unknown.
    """
    turns = [parse_turn(message, f"{field}[{n}]") for n, message in enumerate(messages)]
    return without_padded_calls(turns, tools) if any(map(is_padded, messages)) else turns


def parse_turn(message: Any, field: str) -> Turn:
    """Check one turn."""
    message = object_of(message, field)
    role = one_of(ROLES, message.get("role"), f"{field}.role")
    calls = calls_of(message, field)
    content = content_of(message, field, is_needed=not calls)
    keys = known(message.get("tool_call_id"), message.get("name")) if role == "tool" else ()
    return marked(Turn(field, role, content, calls, keys), message, READ)


def known(*keys: Any) -> tuple[Any, ...]:
    """Return the keys that are given."""
    return tuple(key for key in keys if key is not None)


def marked(turn: Turn, message: dict[str, Any], read: Collection[str]) -> Turn:
    """Return a turn with whether it is trained and which fields of its message are ignored.

    Raises BadLineError for a field that is neither read nor harmless.
    """
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise BadLineError(f"{turn.field}.weight is {show(weight)}; accepted are 0 and 1")
    if train not in (None, False, True):
        raise BadLineError(f"{turn.field}.train is {show(train)}; accepted are false and true")
    ignored = []
    for name, value in message.items():
        if name in read or name in ("weight", "train") or value in EMPTY:
            continue
        if name not in IGNORED:
            raise BadLineError(
                f"{turn.field}.{name} is {show(value)}; only text content can be mapped, and "
                "this field may change it, so move it to the content or remove it"
            )
        if name != "name" or message.get("role") not in ("tool", "function"):
            ignored.append(name)
    return turn._replace(is_trained=weight != 0 and train != 0, ignored=tuple(ignored))


def content_of(message: dict[str, Any], field: str, *, is_needed: bool) -> str:
    """Return the text of a message; "" for a null one beside calls."""
    content, refusal = message.get("content"), message.get("refusal")
    if refusal:
        if content:
            raise BadLineError(
                f"{field} has a content and the refusal {show(refusal)}; use one of them"
            )
        content = refusal
    if content is None and not is_needed:
        return ""
    if isinstance(content, list):
        parts = enumerate(content)
        return BLANK_LINE.join(part_of(part, f"{field}.content[{n}]") for n, part in parts)
    if not isinstance(content, str):
        raise BadLineError(
            f"{field}.content is {show(content)}; it must be a string (null only beside tool_calls)"
        )
    return content


def part_of(part: Any, field: str) -> str:
    """Return the text of one part of a content."""
    kind = object_of(part, field).get("type")
    key = TEXT_PARTS.get(str(kind))
    if key is None:
        raise BadLineError(f"{field}.type is {show(kind)}; only text content can be mapped")
    return text_of(part.get(key), f"{field}.{key}")


def calls_of(message: dict[str, Any], field: str) -> list[Call]:
    """Return the calls of a message as given; a string is read as JSON, an empty one as none."""
    given = message.get("tool_calls")
    if isinstance(given, str):
        given = parsed(given, f"{field}.tool_calls") if given.strip() else None
    given = [given] if isinstance(given, dict) and given else given or []
    if not isinstance(given, list):
        raise BadLineError(f"{field}.tool_calls is {show(given)}; it must be a list of calls")
    calls = [
        Call(object_of(one, f"{field}.tool_calls[{n}]"), f"{field}.tool_calls[{n}].function")
        for n, one in enumerate(given)
    ]
    if message.get("function_call"):
        if calls:
            raise BadLineError(f"{field} has function_call and tool_calls; use one of them")
        field = f"{field}.function_call"
        calls = [written_call(Call(object_of(message["function_call"], field), field))]
    return calls


def written_call(call: Call) -> Call:
    """Return a call as {"name", "arguments"}, its arguments an object."""
    function = object_of(call.given.get("function", call.given), call.field)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadLineError(f"{call.field}.name is {show(name)}; use the name of a tool")
    given = [function.get("arguments"), function.get("parameters")]
    arguments: Any = next((one for one in given if one not in (None, "")), {})
    arguments = parsed(arguments, f"{call.field}.arguments")
    if not isinstance(arguments, dict | list):
        raise BadLineError(f"{call.field}.arguments is {show(arguments)}; use an object")
    return Call({"name": name, "arguments": arguments}, call.field)


def is_padded(turn: Any, meant: Collection[str] = ("content",)) -> bool:
    """Tell whether a table filled a turn up: only it writes null for a field that a turn lacks."""
    return isinstance(turn, dict) and any(v is None and n not in meant for n, v in turn.items())


def without_padded_calls(turns: Iterable[Turn], tools: Any) -> list[Turn]:
    """Return turns without what a table padded their calls with."""
    schemas = parameters_by_name(tools)

    def unpadded(call: Call) -> Call:
        function = call.given.get("function", call.given)
        schema = schemas.get(str(function.get("name"))) if isinstance(function, dict) else None
        fields = {"arguments": schema, "parameters": schema}
        kinds = {"properties": {**fields, "function": {"properties": fields}}}
        return call._replace(given=meant_values(call.given, kinds))

    return [turn._replace(calls=list(map(unpadded, turn.calls))) for turn in turns]


def in_call_order(turns: Iterable[Turn], *, is_strict: bool = False) -> list[Turn]:
    """Put the results that follow calls in the order of these.

    Results of which one names another call stay as they are, unless is_strict refuses it.
    """
    ordered: list[Turn] = []
    for is_result, group in itertools.groupby(turns, lambda turn: turn.role == "tool"):
        found = list(group)
        if is_result:
            keys = [call.keys for call in ordered[-1].calls] if ordered else []
            places = places_of(found, keys)
            if None not in places:
                by_place = sorted(zip(places, found, strict=True), key=lambda pair: pair[0] or 0)
                found = [turn for _, turn in by_place]
            elif is_strict:
                stranger = found[places.index(None)]
                names = [next(iter(named), None) for named in keys]
                raise BadLineError(
                    f"{stranger.field} is the result of call {show(stranger.keys[0])}; accepted "
                    f"are the calls of the turn before it, {show(names)}, once each"
                )
        ordered += found
    return ordered


def places_of(results: Iterable[Turn], calls: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Return the place of each result's call, None where its keys name none; calls are keys."""
    places: list[int | None] = []
    for result in results:
        free = [index for index in range(len(calls)) if index not in places]
        if result.keys and calls:
            places.append(next((i for key in result.keys for i in free if key in calls[i]), None))
        else:
            places.append(free[0] if free else len(places) - places.count(None))
    return places


def tools_of(record: dict[str, Any]) -> Any:
    """Return the tools of a dialogue, checked; `functions` is their older name."""
    if record.get("system"):
        raise BadLineError(
            f"system is {show(record['system'])} beside messages; make it the first message, of "
            "the role system"
        )
    return parse_tools(record.get("tools") or record.get("functions"))


def one_of(table: dict[str, Any], key: Any, field: str) -> Any:
    """Return what a table says of a key; BadLineError names the keys that it has."""
    if not isinstance(key, str) or key not in table:
        raise BadLineError(f"{field} is {show(key)}; accepted are {', '.join(table)}")
    return table[key]


def text_of(value: Any, field: str) -> str:
    """Return a content that must be a string."""
    if not isinstance(value, str):
        raise BadLineError(f"{field} is {show(value)}; use a string")
    return value


def object_of(value: Any, field: str) -> dict[str, Any]:
    """Return a value that must be an object."""
    if not isinstance(value, dict):
        raise BadLineError(f"{field} is {show(value)}; it must be an object")
    return value
