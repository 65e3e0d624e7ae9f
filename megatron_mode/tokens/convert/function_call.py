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
from typing import Any

from megatron_mode.tokens.convert.openai import add
from megatron_mode.tokens.convert.turns import Turns, parsed_list
from megatron_mode.tokens.json_values import STRICT, BadLineError, show
from megatron_mode.tokens.turns import Call, call, object_of, parse_turn, parsed, text_of

SPEAKER = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
END_OF_TEXT = "<|endoftext|>"
CALL_MARK = "<functioncall>"
# Arguments stand in single quotes there, as a string of JSON inside of something like JSON.
QUOTED_CALL = re.compile(
    r"""\{\s*"name":\s*"(?P<name>[^"]+)",\s*"arguments":\s*'(?P<arguments>.*)'\s*\}""", re.DOTALL
)


def convert(record: Any) -> dict[str, Any]:
    """Turn one record of either form into one dialogue."""
    record = object_of(record, "the record")
    return from_query(record) if record.get("chat") is None else from_chat(record)


def from_query(record: dict[str, Any]) -> dict[str, Any]:
    """Read the form with a query and its answers."""
    asked = next((name for name in ("query", "question") if record.get(name) is not None), None)
    if asked is None or record.get("answers") is None:
        raise BadLineError(
            f"the record has the fields {show(sorted(record))}; accepted are query, tools and "
            "answers, or system and chat"
        )
    tools = record.get("tools") or record.get("functions") or record.get("function")
    turns = Turns(tools)
    question = record[asked]
    if isinstance(question, list):
        nested = question[0] if len(question) == 1 and isinstance(question[0], list) else question
        for index, message in enumerate(nested):
            place = f"{asked}[{index}]"
            add(turns, parse_turn(message, place), place)
    else:
        turns.say("user", text_of(question, asked))
    answers = parsed_list(record["answers"], "answers")
    calls = [call(one, f"answers[{index}]") for index, one in enumerate(answers)]
    if not calls:
        raise BadLineError("answers is []; it must hold at least one call")
    turns.say("assistant", "", calls=calls)
    return turns.record()


def from_chat(record: dict[str, Any]) -> dict[str, Any]:
    """Read the form with a system text and a chat text."""
    system = text_of(record.get("system") or "", "system").strip()
    system, tools = split_schemas(system.removeprefix("SYSTEM:").strip())
    turns = Turns(tools)
    if system:
        turns.say("system", system)
    before, *spoken = SPEAKER.split(text_of(record["chat"], "chat"))
    if before.strip() or not spoken:
        raise BadLineError(
            f"chat begins with {show(before.strip())}; it must begin with USER: or ASSISTANT:"
        )
    pairs = list(zip(spoken[::2], spoken[1::2], strict=True))
    for index, (speaker, text) in enumerate(pairs):
        content, place = text.replace(END_OF_TEXT, "").strip(), f"chat turn {index + 1}"
        if speaker == "FUNCTION RESPONSE":
            turns.result(content, place)
        elif speaker == "ASSISTANT" and CALL_MARK in content:
            words, _, called = content.partition(CALL_MARK)
            turns.say("assistant", words.strip(), calls=[written_call(called.strip(), place)])
        else:
            turns.say(speaker.lower(), content)
    return turns.record()


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


def written_call(text: str, place: str) -> Call:
    """Read a call out of a text."""
    quoted = QUOTED_CALL.fullmatch(text)
    if quoted:
        return call(quoted.groupdict(), place)
    return call(parsed(text, place), place)
