"""Continue a prompt with a checkpoint, showing each token's mode probability by colour."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mode.command_line import LARGEST, MOST_WORKERS, real, whole
from megatron_mode.errors import ConfigError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from megatron_mode.score import Scorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint folder, or a run folder"
    )
    parser.add_argument("--prompt", required=True, help="text to continue, or to ask with --chat")
    parser.add_argument(
        "--chat", action="store_true", help="give the prompt as a user's message and let it answer"
    )
    parser.add_argument("--tokens", type=whole(1), default=100, help="most tokens to generate")
    parser.add_argument(
        "--temperature", type=real(0), default=0.8, help="0 takes the likeliest token each time"
    )
    parser.add_argument(
        "--top-k", type=whole(0), default=50, help="sample among so many tokens; 0: all"
    )
    parser.add_argument("--seed", type=whole(0, LARGEST), default=0, help="seed of the sampling")
    parser.add_argument(
        "--threads", type=whole(0, MOST_WORKERS), default=0, help="CPU threads; 0: all cores"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with text and tokens"
    )


def run(args: argparse.Namespace) -> int:
    """Generate and print; raises CheckpointError or ConfigError for what cannot be used."""
    from megatron_mode.quiet import import_quietly
    from megatron_mode.report.heatmap import print_tokens

    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--prompt holds bytes that are not UTF-8 at character {error.start + 1}; convert it "
            "to UTF-8"
        ) from None
    scorer: Scorer = import_quietly("megatron_mode.score", args.threads).Scorer(args.checkpoint)
    control = scorer.tokenizer.control
    ids = [control["<|doc|>"], *scorer.tokenizer.encode(args.prompt)]
    if args.chat:
        ids.insert(1, control["<|user|>"])
        ids += [control["<|end|>"], control["<|assistant|>"]]
    given = len(ids)
    ids += continuation(
        scorer, ids, args.tokens, temperature=args.temperature, top_k=args.top_k, seed=args.seed
    )
    # Scored once more together, so that one rule colours prompt and continuation.
    probabilities = scorer.score(ids).mode_logit_N.sigmoid().tolist()
    texts = scorer.tokenizer.pieces(ids)
    if args.json:
        tokens = [
            {"token": text, "mode_probability": p, "generated": index >= given}
            for index, (text, p) in enumerate(zip(texts, probabilities, strict=True))
        ]
        print(json.dumps({"text": "".join(texts[given:]), "tokens": tokens}, ensure_ascii=False))
    else:
        print_tokens(zip(texts, probabilities, strict=True), legend=True)
        if (made := len(ids) - given) < args.tokens:
            print(f"The model ended the document after {made} of {args.tokens} tokens.")
    return 0


def continuation(
    scorer: Scorer, ids: list[int], tokens: int, *, temperature: float, top_k: int, seed: int
) -> Iterator[int]:
    """Sample up to `tokens` ids; a new document or the end of the turn stops."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    stops = {scorer.tokenizer.control[piece] for piece in ("<|doc|>", "<|end|>")}
    ids = list(ids)
    for _ in range(tokens):
        chosen = sample(scorer.next_logits(ids), temperature, top_k, generator)
        if chosen in stops:
            return
        ids.append(chosen)
        yield chosen


def sample(logits_V: Tensor, temperature: float, top_k: int, generator: Generator) -> int:
    """Draw a token from the `top_k` likeliest at a temperature."""
    import torch

    if temperature == 0:
        return int(logits_V.argmax())
    count = min(top_k, len(logits_V)) if top_k else len(logits_V)
    top_K, token_K = logits_V.topk(count)
    # In float64, and below zero: no temperature above 0 is too small for it.
    scaled_K = (top_K - top_K[0]).double() / temperature
    drawn = torch.multinomial(scaled_K.softmax(-1), 1, generator=generator)
    return int(token_K[drawn])
