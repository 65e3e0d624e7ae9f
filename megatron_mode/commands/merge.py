"""Offer `megatron-mode merge`: arguments and output.

Importing this is cheap; numpy, pyarrow and sentencepiece load when the verb runs.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from megatron_mode.command_line import MOST_WORKERS, whole
from megatron_mode.tokens.prepare.output import print_summary, stoppable

DESCRIPTION = """\
Join the shards that `megatron-mode prepare --out DIR --shard I/N` left beside DIR into prepared
sources, the same to the byte as without --shard. The shards are removed when DIR is complete; the
same command continues a merge that was stopped or killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder that the shards were given")
    add(
        "--workers",
        type=whole(1, MOST_WORKERS),
        metavar="N",
        help="processes (default: the cores)",
    )
    add("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Merge; raise ConfigError or DataError with one sentence."""
    from megatron_mode.tokens.prepare.prepare import merge

    with stoppable(args.out):
        started_seconds = time.monotonic()
        workers = args.workers or len(os.sched_getaffinity(0))
        summary = merge(args.out, workers, show_progress=not args.json)
    print_summary(summary, time.monotonic() - started_seconds, as_json=args.json)
    return 0
