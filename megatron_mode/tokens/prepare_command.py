"""Offer `megatron-mode prepare`: arguments, checks and output.

Importing this is cheap; numpy, pyarrow and sentencepiece load when the verb runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_mode.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mode.tokens.prepare import Preparation

DESCRIPTION = """\
Turn JSON lines into a tokenizer and prepared sources, one for each `source` named in the lines
(the file's name where a line has none). Lines with `text` are Mode 1, lines with `messages` Mode 2.
Held-out documents become NAME-valid (Mode 1), or NAME-valid-plain and NAME-valid-chat (Mode 2)."""

SAMPLE_FOLDER = Path(__file__).parent / "sample"
SAMPLE_LICENCES = {
    "moby-dick": "public domain",
    "chatterbot": "BSD-3-Clause (chatterbot-corpus, Gunther Cox and contributors)",
    "bfcl": "Apache-2.0 (Berkeley Function-Calling Leaderboard, gorilla)",
}
VOCAB_SIZE = 32768
SAMPLE_VOCAB_SIZE = 2048
# Starting a process costs about what tokenising this much compressed text does.
INPUT_BYTES_PER_WORKER = 4 << 20


def useful_workers(inputs: Sequence[Path]) -> int:
    """Return the cores available, but no more processes than the input repays the start of."""
    from megatron_mode.tokens.readers import size_bytes

    total_bytes = sum(map(size_bytes, inputs))
    return min(len(os.sched_getaffinity(0)), 1 + total_bytes // INPUT_BYTES_PER_WORKER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write: data.root")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--input",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".jsonl (.gz, .zst), .parquet or .arrow files, or folders by save_to_disk",
    )
    inputs.add_argument("--sample", action="store_true", help="use the corpus that ships here")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer",
        type=Path,
        metavar="MODEL",
        help="tokenizer.model of an earlier preparation (default: train one)",
    )
    tokenizer.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"pieces of the tokenizer to train (default: {VOCAB_SIZE}; "
        f"{SAMPLE_VOCAB_SIZE} with --sample)",
    )
    add_split_arguments(parser)
    add_mode_token_arguments(parser)
    add(
        "--workers", type=int, metavar="N", help="processes (default: the cores, but one per 4 MiB)"
    )
    add(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="N",
        help="bad lines to skip before giving up (default: %(default)s)",
    )
    add("--licence", metavar="TEXT", help="licence recorded in every NAME.json")
    add("--json", action="store_true", help="print the summary as one JSON object")


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the seeded draws."""
    add = parser.add_argument
    add(
        "--plain-share",
        type=float,
        default=0.25,
        metavar="X",
        help="share (0 to 1) of Mode 2 training documents without role markers "
        "(default: %(default)s)",
    )
    add(
        "--valid-share",
        type=float,
        default=0.0,
        metavar="X",
        help="share (0 to 1) of the documents of each source to hold out (default: %(default)s)",
    )
    add(
        "--valid-sources",
        metavar="A,B",
        help="sources to hold out whole (default: none)",
    )
    add(
        "--seed",
        type=int,
        default=1234,
        metavar="N",
        help="seed of shuffle, held-out and plain documents (default: %(default)s)",
    )


def add_mode_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the mode tokens."""
    add = parser.add_argument
    add(
        "--mode-tokens",
        choices=("none", "start", "end", "sporadic"),
        default="none",
        help="write <|mode1|> or <|mode2|> into the documents: after <|doc|>, last, or before "
        "content tokens here and there (default: %(default)s)",
    )
    add(
        "--mode-token-rate",
        type=float,
        metavar="R",
        help="share (0 to 1) of content tokens preceded by one, for sporadic",
    )
    add(
        "--mode-token-loss",
        choices=("on", "off"),
        default="off",
        help="train the language model to predict them (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Prepare what the arguments ask for; raise ConfigError or DataError with one sentence."""
    plan = preparation(args)
    from megatron_mode.tokens.folder import disk_error
    from megatron_mode.tokens.prepare import prepare

    started_seconds = time.monotonic()
    try:
        with terminated_by_exit():
            summary = prepare(plan, show_progress=not args.json)
    except OSError as error:
        raise disk_error(error, plan.out) from None
    summary["seconds"] = round(time.monotonic() - started_seconds, 2)
    for warning in summary["warnings"] + summary["first_bad_lines"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(summary, ensure_ascii=False) if args.json else table(summary))
    return 0


def preparation(args: argparse.Namespace) -> Preparation:
    """Check the arguments and turn them into a plan."""
    check_ranges(args)
    from megatron_mode.tokens.mode_tokens import checked
    from megatron_mode.tokens.prepare import Preparation
    from megatron_mode.tokens.split import Split

    mode_tokens = checked(
        args.mode_tokens, args.mode_token_rate, train=args.mode_token_loss == "on"
    )

    inputs = sorted(SAMPLE_FOLDER.glob("*.jsonl.gz")) if args.sample else args.input
    default_size = SAMPLE_VOCAB_SIZE if args.sample else VOCAB_SIZE
    licences = SAMPLE_LICENCES if args.sample and args.licence is None else {}
    return Preparation(
        out=args.out,
        inputs=tuple(inputs),
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size or default_size,
        split=Split(
            seed=args.seed,
            plain_share=args.plain_share,
            valid_share=args.valid_share,
            valid_sources=frozenset(filter(None, re.split(r"[,\s]+", args.valid_sources or ""))),
            mode_tokens=mode_tokens,
        ),
        workers=args.workers or useful_workers(inputs),
        max_bad_lines=args.max_bad_lines,
        licence_of=lambda source: licences.get(source, args.licence),
    )


def check_ranges(args: argparse.Namespace) -> None:
    """Raise ConfigError for a number outside of its range or an input given twice."""
    for name in ("plain_share", "valid_share"):
        value = getattr(args, name)
        if not 0 <= value <= 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is {value}; accepted is 0 to 1, so give a share.")
    for name, least in (("workers", 1), ("vocab_size", 1), ("max_bad_lines", 0)):
        count = getattr(args, name)
        if count is not None and count < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is {count}; accepted is {least} or more, so raise it.")
    paths = [os.path.realpath(path) for path in args.input or ()]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"--input names {path} twice; each file is read once, so drop one.")


@contextmanager
def terminated_by_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that what is half-written is removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def table(summary: dict[str, Any]) -> str:
    """Lay the summary out for a terminal."""
    lines = [
        f"{summary['out']}: vocabulary {summary['vocab_size']} "
        f"(padded {summary['padded_vocab_size']}), {summary['bad_lines']} bad lines, "
        f"{summary['seconds']} s",
        f"{'source':<28}{'mode':>5}{'rendering':>11}{'documents':>11}{'tokens':>14}",
    ]
    lines += [
        f"{s['name']:<28}{s['mode']:>5}{s['rendering']:>11}{s['documents']:>11,}{s['tokens']:>14,}"
        for s in summary["sources"]
    ]
    return "\n".join(lines)
