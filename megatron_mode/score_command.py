"""Score each document of a JSON lines file with a checkpoint: loss and mode probability.

Mode 2 documents are rendered without role markers by default: with markers the mode is given away.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mode.arguments import whole
from megatron_mode.errors import DataError

if TYPE_CHECKING:
    from megatron_mode.score import Scorer, TokenScores
    from megatron_mode.tokens.documents import Document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint folder, or a run folder"
    )
    parser.add_argument("file", metavar="FILE.jsonl", type=Path, help="documents, perhaps .gz")
    parser.add_argument(
        "--render", choices=("chat", "plain"), default="plain", help="rendering of Mode 2 documents"
    )
    parser.add_argument("--per-token", action="store_true", help="also report every token")
    parser.add_argument(
        "--limit", type=whole(1), metavar="N", help="score the first N documents only"
    )
    parser.add_argument("--threads", type=whole(0), default=0, help="CPU threads; 0: all cores")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a document instead of a table"
    )


def run(args: argparse.Namespace) -> int:
    """Score and print; raises DataError or CheckpointError for what cannot be read."""
    from megatron_mode.quiet import import_quietly
    from megatron_mode.tokens.documents import read_documents
    from megatron_mode.tokens.template import render

    documents = read_documents(args.file)
    first = next(documents, None)  # A file that cannot be read is told before a model is loaded.
    if first is None:
        raise DataError(
            f"{args.file} holds no documents: accepted are lines like "
            '{"text": "..."} or {"messages": [...]}; name another file'
        )
    score = import_quietly("megatron_mode.score", args.threads)
    scorer: Scorer = score.Scorer(args.checkpoint)
    if not args.json:
        print(f"{'id':<32} {'source':<20} {'tokens':>7} {'nll':>7} {'mode logit':>11} {'p':>6}")
    for document in islice(chain([first], documents), args.limit):
        ids, flags = render(document, scorer.tokenizer, args.render)
        result = summarise(document, scorer, ids, flags, per_token=args.per_token)
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
        else:
            print_row(result)
    return 0


def summarise(
    document: Document, scorer: Scorer, ids: Sequence[int], flags: bytes, *, per_token: bool
) -> dict[str, Any]:
    """Score one document.

    nll_mean (nats) is over all predicted tokens, the mode means over tokens that are no control
    pieces; null where there is none.
    """
    from megatron_mode.tokens.flags import CONTROL

    scores: TokenScores = scorer.score(ids)
    content = [index for index, flag in enumerate(flags) if not flag & CONTROL]
    logits = scores.mode_logit_N[content]
    result: dict[str, Any] = {
        "id": document.id,
        "source": document.source,
        "tokens": len(ids),
        "nll_mean": _mean(scores.nll_N[1:].tolist()),
        "mode_logit_mean": _mean(logits.tolist()),
        "mode_probability_mean": _mean(logits.sigmoid().tolist()),
    }
    if per_token:
        result["per_token"] = [
            {
                "token": text,
                "nll": None if math.isnan(nll) else nll,
                "mode_logit": logit,
                "mode_probability": probability,
                "control": bool(flag & CONTROL),
            }
            for text, nll, logit, probability, flag in zip(
                scorer.tokenizer.pieces(ids),
                scores.nll_N.tolist(),
                scores.mode_logit_N.tolist(),
                scores.mode_logit_N.sigmoid().tolist(),
                flags,
                strict=True,
            )
        ]
    return result


def print_row(result: dict[str, Any]) -> None:
    """Print a document as a line of the table, and its tokens coloured where asked for."""
    import os
    import sys

    from megatron_mode.report.heatmap import ansi_token, wants_colour

    numbers = [result[key] for key in ("nll_mean", "mode_logit_mean", "mode_probability_mean")]
    nll, logit, probability = ("-" if value is None else f"{value:.3f}" for value in numbers)
    print(
        f"{result['id'][:32]:<32} {result['source'][:20]:<20} {result['tokens']:>7} {nll:>7} "
        f"{logit:>11} {probability:>6}"
    )
    if "per_token" in result:
        colour = wants_colour(sys.stdout, os.environ)
        tokens = result["per_token"]
        print("".join(ansi_token(t["token"], t["mode_probability"], colour=colour) for t in tokens))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
