"""Read function-calling records, of two forms.

    xlam, BFCL    {"query": "...", "tools": [...], "answers": [{"name", "arguments"}, ...]}
    glaive        {"system": "SYSTEM: ... {schema} {schema}", "chat": "USER: ... ASSISTANT: ..."}

In the first, tools and answers may be strings that hold JSON, `question` and `function` are other
names of query and tools, and a query may be a list of messages. In the second, a call is written
<functioncall> {"name", "arguments"}, its result FUNCTION RESPONSE: ..., and schemas that end the
system text become `tools`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_mode.tokens.convert.chats import calls_in, dialogue
from megatron_mode.tokens.json_values import STRICT, BadLineError, parse_tools, parsed, show
from megatron_mode.tokens.turns import (
    Call,
    Turn,
    is_padded,
    object_of,
    parse_turns,
    text_of,
    without_padded_calls,
)

SPEAKER = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
END_OF_TEXT = "<|endoftext|>"
CALL_MARK = "<functioncall>"
# Arguments stand in single quotes there, as a string of JSON inside of something like JSON.
QUOTED_CALL = re.compile(
    r"""\{\s*"name":\s*"(?P<name>[^"]+)",\s*"arguments":\s*'(?P<arguments>.*)'\s*\}""", re.DOTALL
)


def function_call(record: Any) -> dict[str, Any]:
    """Turn one record of either form into one dialogue."""
    record = object_of(record, "the record")
    if record.get("chat") is None:
        return from_query(record)
    system = text_of(record.get("system") or "", "system").strip()
    system, schemas = split_schemas(system.removeprefix("SYSTEM:").strip())
    said = [Turn("system", "system", system)] if system else []
    return dialogue([*said, *chat_turns(text_of(record["chat"], "chat"))], parse_tools(schemas))


def from_query(record: dict[str, Any]) -> dict[str, Any]:
    """Read the form with a query and its answers."""
    field = next((name for name in ("query", "question") if record.get(name) is not None), None)
    if field is None or record.get("answers") is None:
        raise BadLineError(
            f"the record has the fields {show(sorted(record))}; accepted are query, tools and "
            "answers, or system and chat"
        )
    given = record.get("tools") or record.get("functions") or record.get("function")
    tools, asked, answers = parse_tools(given), record[field], record["answers"]
    if isinstance(asked, list):
        asked = asked[0] if len(asked) == 1 and isinstance(asked[0], list) else asked
        turns = parse_turns(asked, field, tools)
    else:
        turns = [Turn(field, "user", text_of(asked, field))]
    calls = calls_in(answers, "answers")
    if not calls:
        raise BadLineError("answers is []; it must hold at least one call")
    answer = [Turn("answers", "assistant", "", calls)]
    # A table pads the schemas with the fields of other tools, and the calls likewise.
    is_table = not isinstance(given, str) and tools != given
    is_table = is_table or any(is_padded(one.given, ("arguments", "parameters")) for one in calls)
    if is_table and not isinstance(answers, str):
        answer = without_padded_calls(answer, tools)
    return dialogue([*turns, *answer], tools)


def chat_turns(chat: str) -> Iterator[Turn]:
    """Yield the turns of a chat text."""
    before, *spoken = SPEAKER.split(chat)
    if before.strip() or not spoken:
        raise BadLineError(
            f"chat begins with {show(before.strip())}; it must begin with USER: or ASSISTANT:"
        )
    for index, (speaker, text) in enumerate(zip(spoken[::2], spoken[1::2], strict=True), start=1):
        content, place = text.replace(END_OF_TEXT, "").strip(), f"chat turn {index}"
        if speaker == "FUNCTION RESPONSE":
            yield Turn(place, "tool", content)
        elif speaker == "ASSISTANT" and CALL_MARK in content:
            words, _, called = (part.strip() for part in content.partition(CALL_MARK))
            quoted = QUOTED_CALL.fullmatch(called)
            given = quoted.groupdict() if quoted else object_of(parsed(called, place), place)
            yield Turn(place, "assistant", words, [Call(given, place)])
        else:
            yield Turn(place, speaker.lower(), content)


def split_schemas(system: str) -> tuple[str, list[Any] | None]:
    """Cut the JSON objects that end a system text off; they are the tools."""
    start = re.search(r"^\s*[{\[]", system, re.MULTILINE)
    if start is None:
        return system, None
    rest, schemas = system[start.start() :].strip(), []
    while rest:
        try:
            schema, end = STRICT.raw_decode(rest)
        except (BadLineError, ValueError, RecursionError):
            return system, None  # it stays as the text that it is
        schemas += schema if isinstance(schema, list) else [schema]
        rest = rest[end:].lstrip().removeprefix(",").lstrip()
    if not all(isinstance(schema, dict) for schema in schemas):
        return system, None
    return system[: start.start()].strip(), schemas
