"""Read documents from JSON lines, one at a time, and say what is wrong with a bad one.

Mode 1 lines hold `text`, Mode 2 lines hold `messages` (`turns` says what of a turn is read, and
`tools` may be a list, an object, or a string that holds one as JSON); `id` and `source` are
optional, other keys of a line are ignored.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mode.errors import DataError
from megatron_mode.tokens.json_values import BadLineError as BadLineError
from megatron_mode.tokens.json_values import parse_json, show
from megatron_mode.tokens.read.lines import compact_json
from megatron_mode.tokens.read.readers import open_reader
from megatron_mode.tokens.turns import BLANK_LINE, in_call_order, parse_turns, tools_of

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# "tokenizer" is the corpus' own file; the others would meet files of a source with a shorter name.
RESERVED_NAME = re.compile(r"tokenizer|.*\.(flags|docs|rows\.\d+)")

HALF_A_PAIR = "a string holds half of a \\uD800 surrogate pair; write both halves"


class Message(NamedTuple):
    """Hold one turn of a dialogue; is_trained says whether its tokens carry LM loss."""

    role: str
    content: str
    is_trained: bool = True


@dataclass(frozen=True)
class Document:
    """Hold one document: `text` in Mode 1, `messages` and `tools` in Mode 2."""

    id: str
    source: str
    mode: int
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: Any = None
    ignored: tuple[str, ...] = ()
    """Fields of its turns that change no text, once for each turn."""

    @functools.cached_property
    def dialogue(self) -> tuple[Message, ...]:
        """Return the messages with the tools as JSON at the head of a leading system message."""
        if not self.tools:
            return self.messages
        schema = compact_json(self.tools)
        first, *others = self.messages
        if first.role == "system":
            merged = f"{schema}{BLANK_LINE}{first.content}" if first.content else schema
            return (Message("system", merged, first.is_trained), *others)
        return (Message("system", schema), *self.messages)


def file_stem(path: Path) -> str:
    """Return the source name of lines that carry none: the file name up to .jsonl and the like."""
    return re.sub(
        r"(\.(jsonl?|ndjson|parquet|arrow))?(\.(gz|zst))?$", "", path.name or path.resolve().name
    )


def parse_line(line: bytes, default_source: str, number: int) -> Document:
    """Turn one JSON line into a Document; raise BadLineError with the reason when it is none."""
    try:
        document = document_of(parse_json(line), default_source, number)
        # Only an escape can bring a lone surrogate in, and few lines hold one.
        if b"\\ud" in line or b"\\uD" in line:
            texts = [document.id, document.text, compact_json(document.tools)]
            "".join([*texts, *(message.content for message in document.messages)]).encode()
    except RecursionError:
        raise BadLineError("malformed JSON (nested too deep)") from None
    except UnicodeEncodeError:
        raise BadLineError(HALF_A_PAIR) from None
    return document


def document_of(value: Any, default_source: str, number: int) -> Document:
    """Check the object of a line; raise BadLineError naming what is wrong in it."""
    if not isinstance(value, dict):
        raise BadLineError(f"the line is a JSON {type(value).__name__}; it must be an object")
    source, identifier, text, messages = map(value.get, ("source", "id", "text", "messages"))
    source = default_source if source is None else source
    if not isinstance(source, str) or not is_safe_name(source):
        raise BadLineError(
            f"source is {show(source)}; accepted are up to 100 letters, digits, '.', '_', '-' "
            "(not 'tokenizer', not ending in .flags, .docs or .rows.N), as it names files"
        )
    identifier = f"{default_source}:{number}" if identifier is None else identifier
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise BadLineError(f"id is {show(identifier)}; accepted are strings and integers")
    if text is not None and messages is not None:
        raise BadLineError(
            "the line has both text and messages; keep text (Mode 1) or messages (2)"
        )
    if messages is not None:
        tools = tools_of(value)
        turns, ignored = parse_messages(messages, tools)
        return Document(str(identifier), source, 2, messages=turns, tools=tools, ignored=ignored)
    if text is None:
        raise BadLineError("the line has neither text (Mode 1) nor messages (Mode 2); add one")
    if not isinstance(text, str) or not text:
        raise BadLineError(f"text is {show(text)}; it must be a string with at least one character")
    return Document(str(identifier), source, 1, text=text)


def is_safe_name(name: str) -> bool:
    """Tell whether a source name can stand in file names beside the corpus' own files."""
    return bool(SAFE_NAME.fullmatch(name)) and not RESERVED_NAME.fullmatch(name)


def parse_messages(messages: Any, tools: Any) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Return the turns of a Mode 2 line, calls as compact JSON, and the fields that are ignored.

    Raises BadLineError naming the turn that is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise BadLineError(
            f"messages is {show(messages)}; it must be a list of at least one message"
        )
    turns = in_call_order(parse_turns(messages, "messages", tools))
    if not any(turn.content or turn.calls for turn in turns):
        raise BadLineError("messages holds only empty turns; give one at least one character")
    found = []
    for turn in turns:
        parts = [turn.content] if turn.content or not turn.calls else []
        parts += [compact_json([call.given for call in turn.calls])] if turn.calls else []
        found.append(Message(turn.role, BLANK_LINE.join(parts), turn.is_trained))
    return tuple(found), tuple(name for turn in turns for name in turn.ignored)


def bad_line_error(path: str | Path, number: int, reason: str) -> DataError:
    """Name file, line and reason of a line that nothing tolerates."""
    return DataError(f"{path}:{number}: {reason}; mend or remove the line.")


def read_documents(path: Path) -> Iterator[Document]:
    """Stream the documents of one file; raise DataError naming file and line of a bad one."""
    with open_reader(path) as lines:
        for number, line in lines:
            try:
                yield parse_line(line, file_stem(path), number)
            except BadLineError as reason:
                raise bad_line_error(path, number, str(reason)) from None
