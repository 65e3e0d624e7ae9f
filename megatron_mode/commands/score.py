"""Score each document of a file with a checkpoint: loss and mode probability.

Mode 2 documents are rendered without role markers by default: with markers the mode is given away.
Mode tokens stand where the run's data had them, unless --mode-tokens says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mode.command_line import MOST_WORKERS, whole
from megatron_mode.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_mode.score import Scorer, TokenScores
    from megatron_mode.tokens.documents import Document
    from megatron_mode.tokens.mode_tokens import ModeTokens, Setting

PLACES_SEED = 1234  # that of `prepare`, for places that no manifest records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint folder, or a run folder"
    )
    parser.add_argument(
        "file",
        metavar="FILE.jsonl",
        type=Path,
        help="documents; also .gz, .zst, .parquet, .arrow, or a folder by save_to_disk",
    )
    parser.add_argument(
        "--render", choices=("chat", "plain"), default="plain", help="rendering of Mode 2 documents"
    )
    parser.add_argument(
        "--mode-tokens",
        choices=("keep", "strip", "swap", "forge"),
        default="keep",
        help="as in the run's data, none, those of the other mode, or one false one more in the "
        "middle of the content",
    )
    parser.add_argument(
        "--mode-token-placement",
        choices=("none", "start", "end", "sporadic"),
        help="where true ones stand (default: as in the run's data)",
    )
    parser.add_argument(
        "--mode-token-rate",
        type=float,
        metavar="R",
        help="share (0 to 1) of content tokens preceded by one, for sporadic",
    )
    parser.add_argument("--per-token", action="store_true", help="also report every token")
    parser.add_argument(
        "--limit", type=whole(1), metavar="N", help="score the first N documents only"
    )
    parser.add_argument(
        "--threads", type=whole(0, MOST_WORKERS), default=0, help="CPU threads; 0: all cores"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a document instead of a table"
    )


def run(args: argparse.Namespace) -> int:
    """Score and print; raises MegatronModeError for what cannot be read or done."""
    from megatron_mode.quiet import import_quietly
    from megatron_mode.tokens.documents import read_documents
    from megatron_mode.tokens.mode_tokens import checked, rearrange
    from megatron_mode.tokens.prepare.request import draw, mode_token_key
    from megatron_mode.tokens.template import render

    given = None
    if args.mode_token_placement is not None or args.mode_token_rate is not None:
        given = checked(args.mode_token_placement or "sporadic", args.mode_token_rate)
    documents = read_documents(args.file)
    first = next(documents, None)  # a file that cannot be read is reported before a model loads
    if first is None:
        raise DataError(
            f"{args.file} holds no documents; name a file with lines like "
            '{"text": "..."} or {"messages": [...]}'
        )
    scorer: Scorer = import_quietly("megatron_mode.score", args.threads).Scorer(args.checkpoint)
    true_tokens, seed = reading(args.mode_tokens, given, scorer)
    if not args.json:
        print(f"{'id':<32} {'source':<20} {'tokens':>7} {'nll':>7} {'mode logit':>11} {'p':>6}")
    for document in islice(chain([first], documents), args.limit):
        rendered = render(document, scorer.tokenizer, args.render)
        forged = draw(seed, "forge", document.source, document.id)
        keys = (mode_token_key(seed, document), forged)
        control = scorer.tokenizer.control
        ids, flags = rearrange(rendered, args.mode_tokens, true_tokens, control, keys)
        result = summarise(document, scorer, ids, flags, per_token=args.per_token)
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
        else:
            print_row(result)
    return 0


def reading(setting: Setting, given: ModeTokens | None, scorer: Scorer) -> tuple[ModeTokens, int]:
    """Return the true mode tokens and the seed of their places.

    `given` is what the options say of them; None leaves it to the run's data. Raises ConfigError
    if there is nothing to exchange.
    """
    from megatron_mode.tokens.mode_tokens import ModeTokens, read_order

    tokens, seed = given or ModeTokens(), PLACES_SEED
    if given is None and setting != "strip":
        tokens, seed = read_order(scorer.manifest.order, PLACES_SEED)
    if setting == "swap" and tokens.placement == "none":
        raise ConfigError(
            "--mode-tokens is swap, but the run's data has no mode tokens; give "
            "--mode-token-placement to put them in"
        )
    return tokens, seed


def summarise(
    document: Document, scorer: Scorer, ids: Sequence[int], flags: bytes, *, per_token: bool
) -> dict[str, Any]:
    """Score one document.

    nll_mean (nats) is over all predicted tokens but mode tokens, the other means over tokens that
    are no control pieces; null where there is none. Turns that are marked as not to be learnt count
    in the mode means only.
    """
    from megatron_mode.tokens.flags import CONTROL, NO_LM_LOSS
    from megatron_mode.tokens.mode_tokens import MODE_PIECES

    scores: TokenScores = scorer.score(ids)
    nll, logit = scores.nll_N.tolist(), scores.mode_logit_N.tolist()
    probability = scores.mode_logit_N.sigmoid().tolist()
    mode_ids = {scorer.tokenizer.control[piece] for piece in MODE_PIECES}
    content = [index for index, flag in enumerate(flags) if not flag & CONTROL]
    learnt = [index for index, flag in enumerate(flags) if index and not flag & NO_LM_LOSS]
    result: dict[str, Any] = {
        "id": document.id,
        "source": document.source,
        "tokens": len(ids),
        "nll_mean": _mean(nll[index] for index in learnt if ids[index] not in mode_ids),
        "nll_content_mean": _mean(nll[index] for index in learnt if not flags[index] & CONTROL),
        "mode_logit_mean": _mean(logit[index] for index in content),
        "mode_probability_mean": _mean(probability[index] for index in content),
    }
    if per_token:
        columns = (scorer.tokenizer.pieces(ids), nll, logit, probability, flags)
        result["per_token"] = [
            {
                "token": text,
                "nll": None if math.isnan(nll_of) else nll_of,
                "mode_logit": logit_of,
                "mode_probability": probability_of,
                "control": bool(flag & CONTROL),
            }
            for text, nll_of, logit_of, probability_of, flag in zip(*columns, strict=True)
        ]
    return result


def print_row(result: dict[str, Any]) -> None:
    """Print a document as a line of the table, and its tokens coloured if there are any."""
    from megatron_mode.report.heatmap import print_tokens

    numbers = [result[key] for key in ("nll_mean", "mode_logit_mean", "mode_probability_mean")]
    nll, logit, probability = ("-" if value is None else f"{value:.3f}" for value in numbers)
    print(
        f"{result['id'][:32]:<32} {result['source'][:20]:<20} {result['tokens']:>7} {nll:>7} "
        f"{logit:>11} {probability:>6}"
    )
    if tokens := result.get("per_token"):
        print_tokens((token["token"], token["mode_probability"]) for token in tokens)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None
