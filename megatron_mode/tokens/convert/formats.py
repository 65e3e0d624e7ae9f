"""Read files of a foreign format and write each dialogue as one line that `documents` accepts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mode.tokens.convert import agent_log, function_call, openai, sharegpt
from megatron_mode.tokens.documents import Document, file_stem, is_safe_name, parse_line
from megatron_mode.tokens.json_values import BadLineError, parse_json
from megatron_mode.tokens.read.lines import MAX_LINE_BYTES, compact_json
from megatron_mode.tokens.read.readers import open_reader

FORMATS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "sharegpt": sharegpt.convert,
    "openai": openai.convert,
    "function-call": function_call.convert,
    "agent-log": agent_log.convert,
}
ReportProgress = Callable[[int], None]


class Record(NamedTuple):
    """Hold one record of an input, or the reason why there is none, with its line number."""

    number: int
    value: Any
    reason: str | None = None


class Converted(NamedTuple):
    """Hold a dialogue as a line and as what `documents` reads from it, or why there is none."""

    number: int
    line: bytes
    document: Document | None
    reason: str | None = None
    ignored: tuple[str, ...] = ()
    """Fields of its turns that change no text."""


def read_records(path: Path, report_progress: ReportProgress) -> Iterator[Record]:
    """Yield the records of one file, every column of a table included."""
    read_bytes = 0
    with open_reader(path, columns=None) as reader:
        for number, line in reader:
            try:
                yield Record(number, parse_json(line))
            except BadLineError as reason:
                yield Record(number, None, str(reason))
            report_progress(reader.position_bytes - read_bytes)
            read_bytes = reader.position_bytes


def joined_events(records: Iterator[Record]) -> Iterator[Record]:
    """Join events that stand one a line to runs; a run that lost a line to an error is refused."""
    run: tuple[Any] | None = None
    first, events, size_bytes = 0, list[Any](), 0
    reason: str | None = None
    for record in records:
        its_run = None if record.reason else agent_log.run_of(record.value)
        if run is not None and record.reason:
            reason = f"line {record.number} of the run is bad ({record.reason})"
            continue
        if run is not None and its_run != run:
            yield Record(first, {"id": run[0], "events": events}, reason)
            run = None
        if its_run is None:
            yield record
            continue
        if run is None:
            run, first, events, size_bytes, reason = its_run, record.number, [], 0, None
        size_bytes += len(compact_json(record.value))
        if size_bytes > MAX_LINE_BYTES:
            reason = f"the run is longer than {MAX_LINE_BYTES >> 20} MiB; split it"
            events.clear()
        else:
            events.append(record.value)
    if run is not None:
        yield Record(first, {"id": run[0], "events": events}, reason)


def converted(
    path: Path, form: str, source: str | None, report_progress: ReportProgress
) -> Iterator[Converted]:
    """Yield every dialogue of one file; source names it, else the record or the file does."""
    records = read_records(path, report_progress)
    for number, value, reason in joined_events(records) if form == "agent-log" else records:
        try:
            if reason is not None:
                raise BadLineError(reason)
            dialogue = {**names_of(value, path, number, source), **FORMATS[form](value)}
            ignored = tuple(dialogue.pop("ignored", ()))
            line = compact_json(dialogue).encode("utf-8")
            if len(line) > MAX_LINE_BYTES:
                raise BadLineError(f"the dialogue is longer than {MAX_LINE_BYTES >> 20} MiB")
            yield Converted(number, line, parse_line(line, "input", number), ignored=ignored)
        except BadLineError as error:
            yield Converted(number, b"", None, str(error))
        except UnicodeEncodeError:
            reason = "a string holds half of a \\uD800 surrogate pair; write whole ones"
            yield Converted(number, b"", None, reason)
        except RecursionError:
            yield Converted(number, b"", None, "the record is nested too deep; flatten it")


def names_of(record: Any, path: Path, number: int, source: str | None) -> dict[str, str]:
    """Return id and source of a dialogue: the record's own where they are legal."""
    stem = re.sub(r"[^A-Za-z0-9._]+", "-", file_stem(path)).strip("-._")[:100]
    stem = stem if is_safe_name(stem) else "input"
    found = record if isinstance(record, dict) else {}
    identifier, named = found.get("id"), found.get("source")
    if not isinstance(identifier, str | int) or isinstance(identifier, bool) or identifier == "":
        identifier = f"{stem}:{number}"
    is_legal = isinstance(named, str) and is_safe_name(named)
    return {"id": str(identifier), "source": source or (str(named) if is_legal else stem)}
