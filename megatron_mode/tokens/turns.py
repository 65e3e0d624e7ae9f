"""Read the turns of a dialogue: one parser for `prepare`, `score` and every format of `convert`.

    {"role", "content", "tool_calls"?, "function_call"?, "refusal"?, "tool_call_id"?, "name"?,
     "weight"?, "train"?}

A content is a string or a list of {"type": "text", "text"}, joined by blank lines. `function_call`
is the older name of one call. `weight: 0` and `train: false` keep a turn from being learnt. Ids and
names tie results to calls, so that results stand in the order of their calls. Any other field that
holds something is refused, since it may change what the dialogue says, but for those of IGNORED.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron_mode.tokens.json_values import (
    BadLineError,
    meant_arguments,
    parameters_by_name,
    parse_tools,
    read_json,
    show,
)

BLANK_LINE = "\n\n"
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
READ = (
    "role", "content", "tool_calls", "function_call", "refusal", "tool_call_id", "weight", "train",
)  # fmt: skip
IGNORED = (
    "annotations", "created", "created_at", "date", "end_turn", "finish_reason", "id", "index",
    "lang", "language", "logprobs", "message_id", "metadata", "model", "name", "parent_id",
    "rating", "score", "source", "status", "time", "timestamp", "token_count", "tokens",
    "updated_at", "usage", "uuid",
)  # fmt: skip
EMPTY: tuple[Any, ...] = (None, "", [], {})


class Turn(NamedTuple):
    """Hold one turn as it was read."""

    role: str
    content: str
    calls: list[Any]
    keys: tuple[Any, ...] = ()
    """What may name the call that a result belongs to: its id, then its name."""
    is_trained: bool = True
    ignored: tuple[str, ...] = ()


class Call(NamedTuple):
    """Hold a call as it is written, and what its result may name it by: id, then name."""

    written: dict[str, Any]
    keys: tuple[Any, ...]


class Results:
    """Find the call that each of the results after a turn belongs to."""

    def __init__(self, calls: Sequence[tuple[Any, ...]] = ()) -> None:
        """Wait for the results of calls, each known by its keys."""
        self.calls = calls
        self._taken: list[int] = []

    def place(self, keys: Iterable[Any]) -> int | None:
        """Take the next result; return the place of its call, None where the keys name none."""
        free = [index for index in range(len(self.calls)) if index not in self._taken]
        known = [key for key in keys if key is not None]
        if known and self.calls:
            free = [i for key in known for i in free if key in self.calls[i]][:1]
            if not free:
                return None
        self._taken.append(free[0] if free else len(self._taken))
        return self._taken[-1]


def parse_turn(message: Any, place: str) -> Turn:
    """Check one turn; raise BadLineError naming the field that is wrong or unknown."""
    message = object_of(message, place)
    given = message.get("role")
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise BadLineError(f"{place}.role is {show(given)}; accepted are {', '.join(ROLES)}")
    calls = calls_of(message, place)
    content = content_of(message, place, is_needed=not calls)
    keys = (message.get("tool_call_id"), message.get("name")) if role == "tool" else ()
    return Turn(role, content, calls, keys, *marks(message, place, READ))


def marks(message: dict[str, Any], place: str, read: Sequence[str]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a turn is trained and which of its fields are ignored.

    Raises BadLineError for a field that is neither read nor harmless.
    """
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise BadLineError(f"{place}.weight is {show(weight)}; accepted are 0 and 1")
    if train not in (None, False, True):
        raise BadLineError(f"{place}.train is {show(train)}; accepted are false and true")
    is_trained = weight != 0 and train != 0
    known = ("weight", "train", *read)
    rest = [name for name, value in message.items() if name not in known and value not in EMPTY]
    for name in rest:
        if name not in IGNORED:
            raise BadLineError(
                f"{place}.{name} is {show(message[name])}; only text content can be mapped, and "
                f"this field may change it, so move it to the content or remove it"
            )
    is_result = message.get("role") in ("tool", "function")
    return is_trained, tuple(name for name in rest if not (name == "name" and is_result))


def content_of(message: dict[str, Any], place: str, *, is_needed: bool) -> str:
    """Return the text of a message; "" for a null one beside calls."""
    content, refusal = message.get("content"), message.get("refusal")
    if refusal:
        if content:
            raise BadLineError(
                f"{place} has a content and the refusal {show(refusal)}; accepted is one of them"
            )
        content = refusal
    if content is None and not is_needed:
        return ""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise BadLineError(
                f"{place}.content is {show(content)}; it must be a string (null only beside "
                "tool_calls)"
            )
        return content
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


def calls_of(message: dict[str, Any], place: str) -> list[Any]:
    """Return the calls of a message as given; a string is read as JSON, an empty one as none."""
    given = message.get("tool_calls")
    if isinstance(given, str):
        given = parsed(given, f"{place}.tool_calls") if given.strip() else None
    given = [given] if isinstance(given, dict) and given else given or []
    if not isinstance(given, list):
        raise BadLineError(f"{place}.tool_calls is {show(given)}; it must be a list of calls")
    calls = [object_of(one, f"{place}.tool_calls[{n}]") for n, one in enumerate(given)]
    if not message.get("function_call"):
        return calls
    if calls:
        raise BadLineError(f"{place} has function_call and tool_calls; accepted is one of them")
    return [call(message["function_call"], f"{place}.function_call").written]


def is_padded(messages: Sequence[Any]) -> bool:
    """Tell whether a table filled turns up: only it writes null for a field that a turn lacks."""
    turns = (message for message in messages if isinstance(message, dict))
    return any(v is None for turn in turns for name, v in turn.items() if name != "content")


def without_null_fields(call: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a table padded a call with; parameters are the schemas of the arguments."""
    kept = {name: value for name, value in call.items() if value is not None}
    if isinstance(kept.get("function"), dict):
        return {**kept, "function": without_null_fields(kept["function"], parameters)}
    schema = parameters.get(str(kept.get("name")))
    given = {name: kept[name] for name in ("arguments", "parameters") if name in kept}
    return {**kept, **{name: meant_arguments(value, schema) for name, value in given.items()}}


def unpadded(turns: list[Turn], messages: Sequence[Any], tools: Any) -> list[Turn]:
    """Return the turns of these messages without what a table padded their calls with."""
    if not is_padded(messages):
        return turns
    parameters = parameters_by_name(tools)
    return [
        turn._replace(calls=[without_null_fields(one, parameters) for one in turn.calls])
        for turn in turns
    ]


def tools_of(record: dict[str, Any]) -> Any:
    """Return the tools of a dialogue, checked; `functions` is their older name."""
    if record.get("system"):
        raise BadLineError(
            f"system is {show(record['system'])} beside messages; make it the first message, of "
            "the role system"
        )
    return parse_tools(record.get("tools") or record.get("functions"))


def in_call_order(turns: Iterable[Turn]) -> list[Turn]:
    """Put the results that follow calls in the order of these, unless one names another call."""
    ordered: list[Turn] = []
    found: list[tuple[int | None, Turn]] = []
    waiting = Results()

    def results() -> list[Turn]:
        if all(place is not None for place, _ in found):
            found.sort(key=lambda result: result[0] or 0)
        return [turn for _, turn in found]

    for turn in turns:
        if turn.role == "tool":
            found.append((waiting.place(turn.keys), turn))
            continue
        ordered += [*results(), turn]
        found, waiting = [], Results([call_keys(one) for one in turn.calls])
    return ordered + results()


def call_keys(given: dict[str, Any]) -> tuple[Any, ...]:
    """Return what names a call as it was given: its id, then the tool's name."""
    function = given.get("function", given)
    return given.get("id"), function.get("name") if isinstance(function, dict) else None


def call(value: Any, field: str, key: Any = None) -> Call:
    """Read a call {"name", "arguments"}; key is its id where it has one."""
    if not isinstance(value, dict):
        raise BadLineError(f"{field} is {show(value)}; a call must be an object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise BadLineError(f"{field}.name is {show(name)}; accepted is the name of a tool")
    given = [value.get("arguments"), value.get("parameters")]
    arguments: Any = next((one for one in given if one not in (None, "")), {})
    arguments = parsed(arguments, f"{field}.arguments")
    if not isinstance(arguments, dict | list):
        raise BadLineError(f"{field}.arguments is {show(arguments)}; accepted is an object")
    return Call({"name": name, "arguments": arguments}, (name,) if key is None else (key, name))


def parsed(value: Any, field: str) -> Any:
    """Return a value, one that is a string read as JSON; BadLineError when it is broken."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value, field)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"{field} is {show(value)}, broken JSON ({error})") from None


def text_of(value: Any, field: str) -> str:
    """Return a content that must be a string."""
    if not isinstance(value, str):
        raise BadLineError(f"{field} is {show(value)}; accepted is a string")
    return value


def object_of(value: Any, field: str) -> dict[str, Any]:
    """Return a value that must be an object."""
    if not isinstance(value, dict):
        raise BadLineError(f"{field} is {show(value)}; it must be an object")
    return value
