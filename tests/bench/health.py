"""Time what judging a step and agreeing to stop cost, as shares of a training step.

Steps of a model on one process, or on two data ranks on this machine (gloo); the judge is timed
inside them, the agreement after each. Prints one JSON object a world.

    python tests/bench/health.py --model tiny --data data/tiny --steps 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

import gloo_world  # noqa: E402  # it lies beside the tests

ROOT = Path(__file__).resolve().parents[2]


def measure(process, model, root, steps, seq_len, folder):
    """Return seconds of each step, of the judge in it and of the agreement after it, on a rank."""
    from unittest import mock

    from megatron_mode.config import load_config
    from megatron_mode.engine import update_gate
    from megatron_mode.engine.build import join_group
    from megatron_mode.engine.step import Engine
    from megatron_mode.process.stopping import Reason
    from megatron_mode.train import build_run, open_data
    from megatron_mode.train import steps as steps_of

    overrides = [f"model={model}", f"data.root={root}", f"run.steps={steps}"]
    overrides += [f"run.dir={folder}/run"]
    overrides += [f"model.seq_len={seq_len}", "batch.global_rows=4", "batch.micro_rows=1"]
    overrides += ["run.threads=1", "optimizer.warmup_steps=0", "run.precision=fp32"]
    config = load_config(ROOT / "configs/run/tiny.yaml", overrides)
    judged = [0.0]

    def timed(function):
        def call(*args):
            begin = time.perf_counter()
            result = function(*args)
            judged[0] += time.perf_counter() - begin
            return result

        return call

    found = []
    with (
        mock.patch.object(Engine, "_lets_through", timed(Engine._lets_through)),
        mock.patch.object(update_gate, "gradient_square", timed(update_gate.gradient_square)),
    ):
        data = open_data(config)
        join_group(process, 1)
        run = build_run(data, process)
        for batch in steps_of(run, 0):
            judged[0] = 0.0
            begin = time.perf_counter()
            run.engine.train_step(batch.step, batch.micro_batches)
            step_seconds = time.perf_counter() - begin
            begin = time.perf_counter()
            run.engine.largest_over_ranks(Reason.NONE)
            found.append((step_seconds, judged[0], time.perf_counter() - begin))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="preset of configs/model (default: tiny)")
    parser.add_argument("--data", type=Path, default=ROOT / "data/tiny", help="prepared data")
    parser.add_argument("--steps", type=int, default=20, help="steps of each world (default: 20)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a row (default: 256)")
    options = parser.parse_args()
    for ranks in (1, 2):
        arguments = (options.model, options.data.resolve(), options.steps, options.seq_len)
        with tempfile.TemporaryDirectory() as folder:
            first, *_ = gloo_world.run_world(ranks, measure, *arguments, folder)
        settled = first[3:]
        shares = [(judge / step, stop / step) for step, judge, stop in settled]
        result = {
            "model": options.model,
            "ranks": ranks,
            "step_seconds": round(statistics.median(step for step, *_ in settled), 4),
            "judge_share": round(statistics.median(judge for judge, _ in shares), 5),
            "stop_share": round(statistics.median(stop for _, stop in shares), 5),
        }
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
