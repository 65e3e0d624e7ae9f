"""Convert dialogue files of other formats to one file of JSON lines, which appears whole."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_mode.errors import ConfigError, DataError
from megatron_mode.tokens.convert.formats import converted
from megatron_mode.tokens.prepare.output import progress_bar
from megatron_mode.tokens.prepare.verdicts import BadLines
from megatron_mode.tokens.read.readers import size_bytes


@dataclass(frozen=True)
class Conversion:
    """Hold what `megatron-mode convert` was asked for."""

    format: str
    inputs: tuple[Path, ...]
    out: Path
    source: str | None
    """Name of the source of all dialogues; None takes the record's or the file's."""
    max_bad_lines: int


def convert(plan: Conversion, *, show_progress: bool) -> dict[str, Any]:
    """Convert the inputs in order and return counts; raise DataError on bad input.

    OSError from the target passes through; the former target stays until the new one is whole.
    """
    bad_lines, roles, ignored = BadLines(plan.max_bad_lines), Counter[str](), Counter[str]()
    records = documents = 0
    with (
        progress_bar("convert", sum(map(size_bytes, plan.inputs)), show_progress) as bar,
        whole_file(plan.out, plan.inputs) as stream,
    ):
        for path in plan.inputs:
            for found in converted(path, plan.format, plan.source, bar.update):
                records += 1
                if found.document is None:
                    bad_lines.add(path, [(found.number, str(found.reason))])
                    continue
                documents += 1
                roles.update(message.role for message in found.document.messages)
                ignored.update(found.ignored)
                stream.write(found.line + b"\n")
        if not documents:
            raise no_dialogues(plan, bad_lines)
    return {
        "out": str(plan.out),
        "format": plan.format,
        "records": records,
        "documents": documents,
        "messages": dict(sorted(roles.items())),
        "ignored_fields": dict(sorted(ignored.items())),
        "bad_lines": bad_lines.count,
        "first_bad_lines": bad_lines.first,
    }


def no_dialogues(plan: Conversion, bad_lines: BadLines) -> DataError:
    """Say that nothing could be converted, and what was wrong with the first record."""
    reason = f" ({bad_lines.first[0]})" if bad_lines.first else ""
    return DataError(
        f"{', '.join(map(str, plan.inputs))} holds no dialogues of the format {plan.format}"
        f"{reason}; name another file or format."
    )


@contextmanager
def whole_file(target: Path, inputs: tuple[Path, ...]) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Write beside the target and rename at the end; an exception leaves the target as it was."""
    real = Path(os.path.realpath(target))
    if real.is_dir():
        raise ConfigError(f"--out {target} is a folder; name a .jsonl or .jsonl.gz file.")
    if any(real == Path(os.path.realpath(path)) for path in inputs):
        raise ConfigError(f"--out {target} is also an input; name another file.")
    descriptor, name = tempfile.mkstemp(prefix=f".{real.name}.partial-", dir=real.parent)
    try:
        with open(descriptor, "wb") as raw:
            if real.suffix == ".gz":
                # Without a time or name in the header equal input gives equal bytes.
                with gzip.GzipFile("", "wb", 6, raw, mtime=0) as stream:
                    yield stream
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, real)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
