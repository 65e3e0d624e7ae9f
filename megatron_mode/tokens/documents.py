"""Read documents from JSON lines, one at a time, and say what is wrong with a bad one.

Mode 1 lines hold `text`, Mode 2 lines hold `messages` (and perhaps `tools`); `id` and `source` are
optional, other keys are ignored. Files may be gzip'd.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from megatron_mode.errors import DataError
from megatron_mode.tokens.flags import ROLES

GZIP_MAGIC = b"\x1f\x8b"
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# "tokenizer" is the corpus' own file; the others would meet files of a source with a shorter name.
RESERVED_NAME = re.compile(r"tokenizer|.*\.(flags|docs|rows\.\d+)")
MESSAGE_ROLES = ROLES[1:]


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


def compact_json(value: Any) -> str:
    """Write a value as JSON without spaces, keys in their own order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class LineReader:
    """Iterate over (line number from 1, line as bytes) of a plain or gzip'd file.

    Raises DataError for a file that is missing, a folder, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise DataError(
                f"Input {path} cannot be read ({error.strerror}); name .jsonl or .jsonl.gz files."
            ) from None
        is_gzip = self._raw.read(2) == GZIP_MAGIC
        self._raw.seek(0)
        zipped = gzip.GzipFile(fileobj=self._raw) if is_gzip else None
        self._stream: IO[bytes] | gzip.GzipFile = zipped or self._raw

    @property
    def position_bytes(self) -> int:
        """Return how far the file on disk has been read."""
        return self._raw.tell()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            for number, line in enumerate(self._stream, start=1):
                if not line.isspace():
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.path}:{number + 1}: the gzip file is damaged or cut off ({error}); "
                "fetch it again."
            ) from None

    def __enter__(self) -> LineReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._raw.close()


def file_stem(path: Path) -> str:
    """Return the source name of lines that carry none: the file name up to .jsonl or .json."""
    return re.sub(r"\.(jsonl?|ndjson)?(\.gz)?$", "", path.name)


def parse_line(line: bytes, default_source: str, number: int) -> Document:
    """Turn one JSON line into a Document; raise BadLineError with the reason when it is none."""
    value = parse_json(line)
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
        document = Document(str(identifier), source, 1, text=text)
    elif messages is not None:
        turns = parse_messages(messages)
        document = Document(str(identifier), source, 2, messages=turns, tools=value.get("tools"))
    else:
        raise BadLineError("the line has neither text (Mode 1) nor messages (Mode 2); add one")
    # Only an escape can bring a lone surrogate in, and few lines hold one.
    if b"\\ud" in line or b"\\uD" in line:
        check_surrogates(document)
    return document


def parse_json(line: bytes) -> Any:
    """Decode a line; raise BadLineError when it is not UTF-8 or not JSON."""
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
    with LineReader(path) as lines:
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
