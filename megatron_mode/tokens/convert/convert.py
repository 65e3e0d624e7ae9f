"""Convert dialogue files of other formats to one file of JSON lines, which appears at once."""

from __future__ import annotations

import gzip
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_mode.errors import ConfigError, DataError
from megatron_mode.tokens.convert import FORMATS
from megatron_mode.tokens.convert.agent_log import run_of
from megatron_mode.tokens.documents import HALF_A_PAIR, file_stem, is_safe_name, parse_line
from megatron_mode.tokens.json_values import BadLineError, parse_json
from megatron_mode.tokens.prepare.output import progress_bar
from megatron_mode.tokens.prepare.verdicts import BadLines
from megatron_mode.tokens.read.lines import MAX_LINE_BYTES, compact_json
from megatron_mode.tokens.read.readers import open_reader, size_bytes

Record = tuple[int, Any]
"""Hold the line number of a record and its value, or a BadLineError that says why it has none."""


def convert(
    inputs: Sequence[Path],
    form: str,
    out: Path,
    *,
    source: str | None,
    max_bad_lines: int,
    show_progress: bool,
) -> dict[str, Any]:
    """Convert the inputs in order and return counts; raise DataError on bad input.

    source names all dialogues; None takes the record's or the file's name. OSError from the target
    passes through; the former target stays until the new one is complete.
    """
    bad_lines, roles, ignored = BadLines(max_bad_lines), Counter[str](), Counter[str]()
    records = documents = 0
    with (
        progress_bar("convert", sum(map(size_bytes, inputs)), show_progress) as bar,
        replaced_file(out, inputs) as stream,
    ):
        for path in inputs:
            found = read_records(path, bar.update)
            for number, value in joined_events(found) if form == "agent-log" else found:
                records += 1
                try:
                    line, unread = converted(value, form, names_of(value, path, number, source))
                    document = parse_line(line, "input", number)
                except BadLineError as error:
                    bad_lines.add(path, [(number, str(error))])
                    continue
                documents += 1
                roles.update(message.role for message in document.messages)
                ignored.update(unread)
                stream.write(line + b"\n")
        if not documents:
            reason = f" ({bad_lines.first[0]})" if bad_lines.first else ""
            raise DataError(
                f"{', '.join(map(str, inputs))} holds no dialogues of the format {form}{reason}; "
                "name another file or format."
            )
    return {
        "out": str(out),
        "format": form,
        "records": records,
        "documents": documents,
        "messages": dict(sorted(roles.items())),
        "ignored_fields": dict(sorted(ignored.items())),
        "bad_lines": bad_lines.count,
        "first_bad_lines": bad_lines.first,
    }


def read_records(path: Path, report_progress: Callable[[int], object]) -> Iterator[Record]:
    """Yield the records of one file, every column of a table included."""
    read_bytes = 0
    with open_reader(path, columns=None) as reader:
        for number, line in reader:
            try:
                yield number, parse_json(line)
            except BadLineError as reason:
                yield number, reason
            report_progress(reader.position_bytes - read_bytes)
            read_bytes = reader.position_bytes


def joined_events(records: Iterator[Record]) -> Iterator[Record]:
    """Join events that stand one a line to runs; a bad line belongs to the run before it."""
    current: tuple[Any] | None = None

    def run_at(record: Record) -> tuple[Any] | None:
        nonlocal current
        if current is None or not isinstance(record[1], BadLineError):
            current = run_of(record[1])
        return current

    for run, group in itertools.groupby(records, run_at):
        if run is None:
            yield from group
        else:
            yield joined_run(run[0], group)


def joined_run(run: Any, records: Iterator[Record]) -> Record:
    """Join the events of a run, which is refused when one of its lines is bad."""
    first, events, size_bytes = 0, list[Any](), 0
    reason: BadLineError | None = None
    for number, value in records:
        first = first or number
        if isinstance(value, BadLineError):
            reason = BadLineError(f"line {number} of the run is bad ({value})")
            continue
        size_bytes += len(compact_json(value))
        events.append(value)
        if size_bytes > MAX_LINE_BYTES:
            reason = BadLineError(f"the run is longer than {MAX_LINE_BYTES >> 20} MiB; split it")
            events.clear()
    return first, reason or {"id": run, "events": events}


def converted(value: Any, form: str, names: dict[str, str]) -> tuple[bytes, list[str]]:
    """Return a record as the line of a dialogue, and the fields of its turns that are ignored."""
    if isinstance(value, BadLineError):
        raise value
    try:
        dialogue = {**names, **FORMATS[form](value)}
        ignored = dialogue.pop("ignored", [])
        line = compact_json(dialogue).encode("utf-8")
    except UnicodeEncodeError:
        raise BadLineError(HALF_A_PAIR) from None
    except RecursionError:
        raise BadLineError("the record is nested too deep; flatten it") from None
    if len(line) > MAX_LINE_BYTES:
        raise BadLineError(f"the dialogue is longer than {MAX_LINE_BYTES >> 20} MiB")
    return line, ignored


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


@contextmanager
def replaced_file(target: Path, inputs: Sequence[Path]) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Write beside the target and rename at the end; an exception leaves the target as it was."""
    real = Path(os.path.realpath(target))
    if real.is_dir():
        raise ConfigError(f"--out {target} is a folder; name a .jsonl or .jsonl.gz file.")
    if any(real == Path(os.path.realpath(path)) for path in inputs):
        raise ConfigError(f"--out {target} is also an input; name another file.")
    partial = real.with_name(f".{real.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as raw:
            if real.suffix == ".gz":
                # Without a time or name in the header equal input gives equal bytes.
                with gzip.GzipFile("", "wb", 6, raw, mtime=0) as stream:
                    yield stream
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        partial.replace(real)
    finally:
        partial.unlink(missing_ok=True)
