"""Turn dialogue files of other formats into the JSON lines that `prepare` takes.

Every record becomes one line of messages, tools, id and source; nothing of its text is dropped. A
record that cannot be mapped (images, unknown roles, a tool result without a call, broken JSON) is a
bad line. OUT is written beside its place and renamed at the end: a former one is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from megatron_mode.command_line import whole
from megatron_mode.errors import ConfigError, DataError, refusal
from megatron_mode.tokens.convert import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    add = parser.add_argument
    add(
        "inputs",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help=".jsonl or .json (.gz, .zst), .parquet or .arrow files, or folders by save_to_disk",
    )
    add(
        "--from",
        dest="format",
        choices=FORMATS,
        required=True,
        metavar="FORMAT",
        help=f"format of the inputs: {', '.join(FORMATS)}",
    )
    add("--out", type=Path, required=True, metavar="OUT", help=".jsonl or .jsonl.gz file to write")
    add(
        "--source", metavar="NAME", help="source of all dialogues (default: the record's or file's)"
    )
    add(
        "--max-bad-lines",
        type=whole(0),
        default=0,
        metavar="N",
        help="records to skip before giving up",
    )
    add("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Convert; raise ConfigError or DataError with one sentence."""
    if not args.out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"--out is {args.out}; accepted are names in .jsonl or .jsonl.gz.")
    from megatron_mode.tokens.convert.convert import convert
    from megatron_mode.tokens.documents import is_safe_name
    from megatron_mode.tokens.prepare.output import terminated_by_exit

    if args.source is not None and not is_safe_name(args.source):
        raise ConfigError(
            f"--source is {args.source!r}; accepted are up to 100 letters, digits, '.', '_', '-', "
            "so rename it."
        )
    started_seconds = time.monotonic()
    try:
        with terminated_by_exit():
            summary = convert(
                args.inputs,
                args.format,
                args.out,
                source=args.source,
                max_bad_lines=args.max_bad_lines,
                show_progress=not args.json,
            )
    except OSError as error:
        remedy = "convert again, or name another --out"
        raise DataError(refusal(args.out, error, remedy, option="--out")) from None
    summary["seconds"] = round(time.monotonic() - started_seconds, 2)
    for warning in summary["first_bad_lines"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(summary, ensure_ascii=False) if args.json else sentence(summary))
    return 0


def sentence(summary: dict[str, Any]) -> str:
    """Say what was written."""
    turns = ", ".join(f"{count:,} {role}" for role, count in summary["messages"].items())
    return (
        f"{summary['out']}: {summary['documents']:,} dialogues of {summary['records']:,} records "
        f"({turns} turns), {summary['bad_lines']} bad lines, {summary['seconds']} s"
    )
