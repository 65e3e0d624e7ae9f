"""Compare training throughput with a plain Hugging Face loop of the same dimensions.

One process, two threads. Both sides take the same micro-batches of prepared data, alternating step
by step: ours with the mode head, document resets and the whole engine; Hugging Face's
LlamaForCausalLM with its plain causal attention and torch.optim.AdamW(fused=True).

    python tests/bench/throughput.py --config configs/run/tiny.yaml [--steps 20] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_mode.config import Config
    from megatron_mode.engine.step import Engine
    from megatron_mode.mix.loader import Loader
    from megatron_mode.mix.order import Order

ROOT = Path(__file__).resolve().parents[2]
UNTIMED_PAIRS = 3


def main() -> None:
    """Run the comparison and print tokens/s of both and the ratio of each pair of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/run/tiny.yaml")
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")
    result = compare(args.config, args.overrides, args.steps, args.threads)
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{result['model']}: ours {result['ours_tokens_per_second']:,.0f} tokens/s, "
        f"Hugging Face {result['peer_tokens_per_second']:,.0f} tokens/s; ratio of medians "
        f"{result['ratio']:.3f}, paired quartiles {result['ratio_quartiles']}"
    )


def compare(config_path: Path, overrides: list[str], steps: int, threads: int) -> dict[str, Any]:
    """Time `steps` alternating pairs after three untimed ones."""
    engine, _, loader = build_ours(config_path, overrides, steps + UNTIMED_PAIRS, threads)
    config = engine.config
    peer, optimizer = build_peer(config)
    ours_seconds, peer_seconds = time_pairs(engine, peer, optimizer, loader)
    ratios = [theirs / ours for ours, theirs in zip(ours_seconds, peer_seconds, strict=True)]
    tokens = config.batch.global_rows * config.model.seq_len
    return {
        "model": config.model.name,
        "threads": threads,
        "pairs": steps,
        "ours_tokens_per_second": tokens / statistics.median(ours_seconds),
        "peer_tokens_per_second": tokens / statistics.median(peer_seconds),
        "ratio": statistics.median(peer_seconds) / statistics.median(ours_seconds),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
    }


def build_ours(
    config_path: Path, overrides: list[str], steps: int, threads: int
) -> tuple[Engine, Order, Loader]:
    """Return the trainer's engine in this process, the order of rows and batches of `steps`."""
    from megatron_mode.config import load_config
    from megatron_mode.process.launch import Process, identify, prepare_environment
    from megatron_mode.quiet import quiet_libraries

    config = load_config(config_path, overrides)
    process: Process = identify({})
    prepare_environment(process)
    quiet_libraries()
    from megatron_mode.engine.build import build_engine, build_mesh, join_group
    from megatron_mode.mix.corpus import (
        build_order,
        build_train_reader,
        open_corpus,
        resolve_vocabulary,
    )
    from megatron_mode.mix.loader import Loader

    corpus = open_corpus(config)
    config = resolve_vocabulary(config, corpus)
    join_group(process, threads)
    engine = build_engine(config, build_mesh(config, 1), corpus.vocabulary.vocab_size)
    order = build_order(config, corpus)
    loader = Loader(
        order,
        build_train_reader(config, corpus, order),
        global_rows=config.batch.global_rows,
        micro_rows=config.batch.micro_rows,
        end_step=steps,
    )
    return engine, order, loader


def time_pairs(
    engine: Engine, peer: Any, optimizer: torch.optim.Optimizer, loader: Loader
) -> tuple[list[float], list[float]]:
    """Step both sides in turn on each batch; return the seconds of the timed pairs."""
    import torch

    ours_seconds: list[float] = []
    peer_seconds: list[float] = []
    for batch in loader:
        began = time.perf_counter()
        engine.train_step(batch.step, batch.micro_batches)
        ours_seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for micro in batch.micro_batches:
            loss = peer(input_ids=micro.input_BT, labels=micro.input_BT).loss
            (loss / len(batch.micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peer_seconds.append(time.perf_counter() - began)
    return ours_seconds[UNTIMED_PAIRS:], peer_seconds[UNTIMED_PAIRS:]


def build_peer(config: Config) -> tuple[Any, torch.optim.Optimizer]:
    """Return Hugging Face's Llama of the same dimensions and its optimizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.attention_heads,
            num_key_value_heads=model.kv_heads,
            max_position_embeddings=model.seq_len,
            tie_word_embeddings=model.tied_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    return peer.train(), torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True)


if __name__ == "__main__":
    main()
