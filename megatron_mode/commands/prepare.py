"""Offer `megatron-mode prepare`: arguments, checks and output.

Importing this is cheap; numpy, pyarrow and sentencepiece load when the verb runs.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mode.command_line import MOST_WORKERS, whole
from megatron_mode.errors import ConfigError
from megatron_mode.tokens.prepare.output import print_summary, stoppable

if TYPE_CHECKING:
    from megatron_mode.tokens.prepare.request import Preparation

DESCRIPTION = """\
Turn JSON lines into a tokenizer and prepared sources, one for each `source` named in the lines
(the file's name where a line has none). Lines with `text` are Mode 1, lines with `messages` Mode 2.
Held-out documents become NAME-valid (Mode 1), or NAME-valid-plain and NAME-valid-chat (Mode 2).
The same command continues a run that was stopped or killed."""

SAMPLE_FOLDER = Path(__file__).parents[1] / "tokens" / "sample"
SAMPLE_LICENCES = {
    "moby-dick": "public domain",
    "chatterbot": "BSD-3-Clause (chatterbot-corpus, Gunther Cox and contributors)",
    "bfcl": "Apache-2.0 (Berkeley Function-Calling Leaderboard, gorilla)",
}
VOCAB_SIZE = 32768
MOST_PIECES = 1 << 24  # what model.vocab_size takes
SAMPLE_VOCAB_SIZE = 2048
# Starting a process costs about what tokenising this much compressed text does.
INPUT_BYTES_PER_WORKER = 4 << 20


def useful_workers(inputs: Sequence[Path]) -> int:
    """Return the cores available, but no more processes than the input repays the start of."""
    from megatron_mode.tokens.read.readers import size_bytes

    total_bytes = sum(map(size_bytes, inputs))
    return min(len(os.sched_getaffinity(0)), 1 + total_bytes // INPUT_BYTES_PER_WORKER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write or replace: data.root",
    )
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
        type=whole(1, MOST_PIECES),
        metavar="N",
        help=f"pieces of the tokenizer to train (default: {VOCAB_SIZE}; "
        f"{SAMPLE_VOCAB_SIZE} with --sample)",
    )
    add_split_arguments(parser)
    add_mode_token_arguments(parser)
    add_work_arguments(parser)
    add("--licence", metavar="TEXT", help="licence recorded in every NAME.json")
    add("--json", action="store_true", help="print the summary as one JSON object")


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare who works, on which part, and what happens to bad lines and copies."""
    add = parser.add_argument
    add(
        "--workers",
        type=whole(1, MOST_WORKERS),
        metavar="N",
        help="processes (default: the cores, but one per 4 MiB)",
    )
    add(
        "--max-bad-lines",
        type=whole(0),
        default=0,
        metavar="N",
        help="bad lines to skip before giving up (default: %(default)s)",
    )
    add(
        "--shard",
        metavar="I/N",
        help="do part I (0 to N-1) of N; `megatron-mode merge` joins them (default: all)",
    )
    add(
        "--duplicates",
        choices=("drop", "keep"),
        default="drop",
        help="documents whose contents came before in their source, held-out part included",
    )
    add(
        "--duplicate-ids",
        choices=("rename", "error"),
        default="rename",
        help="ids that come again with other contents: id#2, or stop",
    )


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
        help="sources to hold out completely (default: none)",
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
    from megatron_mode.tokens.prepare.prepare import prepare

    with stoppable(plan.out):
        started_seconds = time.monotonic()
        summary = prepare(plan, show_progress=not args.json)
    print_summary(summary, time.monotonic() - started_seconds, as_json=args.json)
    return 0


def preparation(args: argparse.Namespace) -> Preparation:
    """Check the arguments and turn them into a plan."""
    check_values(args)
    shard, shards = parsed_shard(args)
    from megatron_mode.tokens.mode_tokens import checked
    from megatron_mode.tokens.prepare.request import Preparation, Split

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
            mode_tokens=checked(
                args.mode_tokens, args.mode_token_rate, train=args.mode_token_loss == "on"
            ),
            keeps_copies=args.duplicates == "keep",
        ),
        workers=args.workers or useful_workers(inputs),
        max_bad_lines=args.max_bad_lines,
        refuses_repeated_ids=args.duplicate_ids == "error",
        licence=args.licence,
        licences=tuple(licences.items()),
        is_shard=args.shard is not None,
        shard=shard,
        shards=shards,
    )


def parsed_shard(args: argparse.Namespace) -> tuple[int, int]:
    """Return index and count of --shard; raise ConfigError for anything else."""
    if args.shard is None:
        return 0, 1
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", args.shard)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--shard is {args.shard}; use I/N with I from 0 to N-1, such as 0/8.")
    if args.tokenizer is None:
        raise ConfigError(
            f"--shard {args.shard} has no --tokenizer; all shards need the same one, so give the "
            "tokenizer.model of an earlier preparation."
        )
    return int(found[1]), int(found[2])


def check_values(args: argparse.Namespace) -> None:
    """Raise ConfigError for a share out of range, a repeated input or a licence not in UTF-8."""
    try:
        (args.licence or "").encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"--licence is {args.licence!r}; use text in UTF-8, so write it anew"
        ) from None
    for name in ("plain_share", "valid_share"):
        value = getattr(args, name)
        if not 0 <= value <= 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is {value}; use a share from 0 to 1.")
    paths = [os.path.realpath(path) for path in args.input or ()]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"--input names {path} twice; each file is read once, so drop one.")
