"""Read documents from JSON lines, one at a time, and say what is wrong with a bad one.

Mode 1 lines hold `text`, Mode 2 lines hold `messages` (and perhaps `tools`: a list, an object, or
a string that holds one as JSON); `id` and `source` are optional, other keys are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mode.errors import DataError
from megatron_mode.tokens.flags import ROLES
from megatron_mode.tokens.read.lines import RefusedLine, compact_json
from megatron_mode.tokens.read.readers import open_reader

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# "tokenizer" is the corpus' own file; the others would meet files of a source with a shorter name.
RESERVED_NAME = re.compile(r"tokenizer|.*\.(flags|docs|rows\.\d+)")
MESSAGE_ROLES = ROLES[1:]
# Python's own limit depends on where it is reached; no tool schema comes near this one.
TOOLS_LEVELS = 100


class Message(NamedTuple):
    """Hold one turn of a dialogue."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """Hold one document: `text` in Mode 1, `messages` and `tools` in Mode 2."""

    id: str
    source: str
    mode: int
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: Any = None


class BadLineError(Exception):
    """Say why a line is no document; the reader adds file and line number."""


def file_stem(path: Path) -> str:
    """Return the source name of lines that carry none: the file name up to .jsonl and the like."""
    return re.sub(
        r"(\.(jsonl?|ndjson|parquet|arrow))?(\.(gz|zst))?$", "", path.name or path.resolve().name
    )


def parse_line(line: bytes, default_source: str, number: int) -> Document:
    """Turn one JSON line into a Document; raise BadLineError with the reason when it is none."""
    try:
        document = document_of(parse_json(line), default_source, number)
    except RecursionError:
        raise BadLineError("malformed JSON (nested too deep)") from None
    # Only an escape can bring a lone surrogate in, and few lines hold one.
    if b"\\ud" in line or b"\\uD" in line:
        check_surrogates(document)
    return document


def document_of(value: Any, default_source: str, number: int) -> Document:
    """Check the object of a line; raise BadLineError naming what is wrong in it."""
    if not isinstance(value, dict):
        raise BadLineError(f"the line is a JSON {type(value).__name__}; it must be an object")
    source = value.get("source")
    source = default_source if source is None else source
    if not isinstance(source, str) or not is_safe_name(source):
        raise BadLineError(
            f"source is {show(source)}; accepted are up to 100 letters, digits, '.', '_', '-' "
            "(not 'tokenizer', not ending in .flags, .docs or .rows.N), as it names files"
        )
    identifier = value.get("id")
    identifier = f"{default_source}:{number}" if identifier is None else identifier
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise BadLineError(f"id is {show(identifier)}; accepted are strings and whole numbers")
    text, messages = value.get("text"), value.get("messages")
    if text is not None and messages is not None:
        raise BadLineError(
            "the line has both text and messages; keep text (Mode 1) or messages (2)"
        )
    if text is not None:
        if not isinstance(text, str) or not text:
            raise BadLineError(
                f"text is {show(text)}; it must be a string with at least one character"
            )
        return Document(str(identifier), source, 1, text=text)
    if messages is not None:
        turns, tools = parse_messages(messages), parse_tools(value.get("tools"))
        return Document(str(identifier), source, 2, messages=turns, tools=tools)
    raise BadLineError("the line has neither text (Mode 1) nor messages (Mode 2); add one")


def parse_json(line: bytes) -> Any:
    """Decode a line; raise BadLineError when it is refused, not UTF-8 or not JSON."""
    if isinstance(line, RefusedLine):
        raise BadLineError(line.decode())
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadLineError(f"malformed JSON at column {error.colno} ({error.msg})") from None
    except (RecursionError, ValueError):
        raise BadLineError("malformed JSON (nested too deep, or a number too long)") from None


def is_safe_name(name: str) -> bool:
    """Tell whether a source name can stand in file names beside the corpus' own files."""
    return bool(SAFE_NAME.fullmatch(name)) and not RESERVED_NAME.fullmatch(name)


def parse_messages(messages: Any) -> tuple[Message, ...]:
    """Check the turns of a Mode 2 line; raise BadLineError naming the turn that is wrong."""
    if not isinstance(messages, list) or not messages:
        raise BadLineError(
            f"messages is {show(messages)}; it must be a list of at least one message"
        )
    return tuple(parse_message(message, turn) for turn, message in enumerate(messages))


def parse_message(message: Any, turn: int) -> Message:
    """Check one turn; a null content with tool_calls becomes the calls as compact JSON."""
    if not isinstance(message, dict):
        raise BadLineError(f"messages[{turn}] is {show(message)}; it must be an object")
    role = message.get("role")
    if role not in MESSAGE_ROLES:
        raise BadLineError(
            f"messages[{turn}].role is {show(role)}; accepted are {', '.join(MESSAGE_ROLES)}"
        )
    content, calls = message.get("content"), message.get("tool_calls")
    if calls and (content is None or content == ""):
        content = compact_json(calls)
    elif calls and isinstance(content, str):
        content = f"{content}\n\n{compact_json(calls)}"
    if not isinstance(content, str):
        raise BadLineError(
            f"messages[{turn}].content is {show(content)}; it must be a string (null only beside "
            "tool_calls)"
        )
    return Message(role, content)


def parse_tools(tools: Any) -> Any:
    """Check the tool schemas; a string is read as JSON, an empty one as none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise BadLineError(
                f"tools is {show(tools)}, a tool schema that is not JSON; give a list of schemas "
                "or a string that holds one"
            ) from None
    if tools is None:
        return None
    if not isinstance(tools, list | dict):
        raise BadLineError(f"tools is {show(tools)}; accepted is a list of tool schemas")
    level: list[Any] = [tools]
    for _ in range(TOOLS_LEVELS):
        held = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [value for values in held for value in values]
        if not level:
            return tools
    raise BadLineError(f"tools is nested deeper than {TOOLS_LEVELS} levels; flatten the schemas")


def check_surrogates(document: Document) -> None:
    """Raise BadLineError when a text holds half of a surrogate pair, which no UTF-8 file can."""
    parts = [document.id, document.text, compact_json(document.tools)]
    parts += [message.content for message in document.messages]
    try:
        "".join(parts).encode("utf-8")
    except UnicodeEncodeError:
        raise BadLineError(
            "a string holds half of a \\uD800 surrogate pair; write whole ones"
        ) from None


def show(value: Any) -> str:
    """Show a value in an error, cut to 60 characters."""
    text = "missing" if value is None else json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def bad_line_error(path: str | Path, number: int, reason: str) -> DataError:
    """Name file, line and reason of a line that nothing tolerates."""
    return DataError(f"{path}:{number}: {reason}; mend or remove the line.")


def read_documents(
    path: str | Path, mode: int | None = None, max_bad_lines: int = 0
) -> Iterator[Document]:
    """Stream the documents of one file, skipping up to max_bad_lines bad lines.

    mode 1 or 2 refuses lines of the other mode. Raises DataError naming file and line.
    """
    path = Path(path)
    bad_lines = 0
    with open_reader(path) as lines:
        for number, line in lines:
            try:
                document = parse_line(line, file_stem(path), number)
                if mode is not None and document.mode != mode:
                    raise BadLineError(
                        f"the line is Mode {document.mode}; only Mode {mode} is accepted"
                    )
            except BadLineError as reason:
                bad_lines += 1
                if bad_lines > max_bad_lines:
                    raise bad_line_error(path, number, str(reason)) from None
                continue
            yield document
