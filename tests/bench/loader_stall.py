"""Compare the time of a step with the real loader and with one batch given again and again.

Both kinds of steps alternate in one process, with the same engine; the wait for the loader is noted
as in a run. Prints one JSON object.

    python tests/bench/loader_stall.py --config configs/run/real-small.yaml --steps 24
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mode.engine.step import Engine
    from megatron_mode.mix.loader import Loader

ROOT = Path(__file__).resolve().parents[2]
UNTIMED_STEPS = 2


def measure(config_path: Path, overrides: list[str], steps: int) -> dict[str, object]:
    from megatron_mode.config import load_config
    from megatron_mode.process.launch import identify, prepare_environment
    from megatron_mode.quiet import quiet_libraries

    config = load_config(config_path, overrides)
    process = identify({})
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
    join_group(process, config.run.threads)
    engine = build_engine(config, build_mesh(config, 1), corpus.vocabulary.vocab_size)
    order = build_order(config, corpus)
    loader = Loader(
        order,
        build_train_reader(config, corpus, order),
        global_rows=config.batch.global_rows,
        micro_rows=config.batch.micro_rows,
        end_step=steps + UNTIMED_STEPS,
    )
    real_seconds, same_seconds, waits = alternate(engine, loader, steps)
    ratios = [a / b for a, b in zip(real_seconds, same_seconds, strict=True)]
    return {
        "steps": len(ratios),
        "real_over_same": round(statistics.median(ratios), 4),
        "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        "data_wait_share_median": round(statistics.median(waits), 6),
        "data_wait_share_max": round(max(waits), 6),
    }


def alternate(
    engine: Engine, loader: Loader, steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Step with the loader's batch and with the first one in turn; return seconds and waits."""
    same = next(loader)
    real_seconds: list[float] = []
    same_seconds: list[float] = []
    waits: list[float] = []
    for step in range(steps + UNTIMED_STEPS - 1):
        begin = time.perf_counter()
        batch = next(loader)
        wait = time.perf_counter() - begin
        engine.train_step(step, batch.micro_batches)
        real = time.perf_counter() - begin
        begin = time.perf_counter()
        engine.train_step(step, same.micro_batches)
        if step >= UNTIMED_STEPS:
            waits.append(wait / real)
            real_seconds.append(real)
            same_seconds.append(time.perf_counter() - begin)
    return real_seconds, same_seconds, waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    print(json.dumps(measure(args.config, args.overrides, args.steps)))


if __name__ == "__main__":
    main()
