"""Break training steps down by what takes their time, as torch's profiler sees it.

One process. Time inside an operation of torch counts for the part of the step that called it. What
is left is Python, of the model's modules (megatron-core's and ours) or of DeepSpeed and our step;
DeepSpeed's part also has what it does with each gradient that arrives.

    python tests/bench/step_profile.py --config configs/run/tiny.yaml [--steps 20] [key.path=value]
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UNTIMED_STEPS = 5
LOADER, METRICS, OPTIMIZER = "loader", "metrics", "optimizer, clipping and health"
MODEL, STEP = "Python of the model", "DeepSpeed"
LOSS, ATTENTION, PRODUCTS = "loss", "attention and rotary positions", "matrix products"
ELEMENTS, COPIES = "norms and element-wise", "copies and zero-filling"
MARKS = (LOADER, METRICS, OPTIMIZER, MODEL, STEP)
COPYING = ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_")
# What an operation, or the autograd function around it, says of its part of the step.
SIGNS = {
    "ChunkedLoss": LOSS,
    "part: loss": LOSS,
    "scaled_dot_product": ATTENTION,
    "Rotate": ATTENTION,
    "AccumulateGrad": STEP,
    "aten::mm": PRODUCTS,
    "aten::addmm": PRODUCTS,
    "aten::bmm": PRODUCTS,
}


def part_of(event: Any) -> str:
    """Return the part of the step that an event belongs to, by itself and what encloses it."""
    above = event
    while above is not None:
        for sign, part in SIGNS.items():
            if sign in above.name:
                return part
        if above.name in MARKS:
            if above is event or above.name not in (MODEL, STEP):
                return str(above.name)
            return COPIES if event.name in COPYING else ELEMENTS
        above = above.cpu_parent
    return STEP


def marked(function: Any, name: str) -> Any:
    """Return the function inside a range of the profiler."""
    import torch

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return call


def profile(config: Path, overrides: list[str], steps: int, threads: int) -> None:
    """Profile `steps` steps after the untimed ones and print the table."""
    sys.path.append(str(ROOT / "tests/bench"))
    from throughput import build_ours

    engine, order, loader = build_ours(config, overrides, UNTIMED_STEPS + steps, threads)
    import torch

    from megatron_mode.report.step_metrics import StepTimer, metrics_line

    deepspeed, timer = engine.deepspeed, StepTimer()
    deepspeed._take_model_step = marked(deepspeed._take_model_step, OPTIMIZER)
    deepspeed.module.forward = marked(deepspeed.module.forward, MODEL)
    deepspeed.module.loss_fn.mode_loss.forward = marked(
        deepspeed.module.loss_fn.mode_loss.forward, "part: loss"
    )
    batches = iter(loader)
    recorded = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    for number in range(UNTIMED_STEPS + steps):
        if number == UNTIMED_STEPS:
            recorded.start()
            begin = time.perf_counter()
        batch = marked(next, LOADER)(batches)
        result = marked(engine.train_step, STEP)(batch.step, batch.micro_batches)
        marked(metrics_line, METRICS)(engine, order, batch, result, timer)
    seconds = time.perf_counter() - begin
    recorded.stop()
    events = recorded.events()
    (thread,) = {event.thread for event in events if event.name == STEP}
    found: Counter[str] = Counter()
    for event in events:
        if event.thread == thread:
            found[part_of(event)] += event.self_cpu_time_total
    print(f"{1e3 * seconds / steps:.1f} ms a step, {steps} steps, profiled")
    for part, microseconds in found.most_common():
        print(f"| {part} | {microseconds / 1e4 / seconds:.1f} % |")


def main() -> None:
    """Read the command line and profile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/run/tiny.yaml")
    parser.add_argument("--steps", type=int, default=20, help="steps that are profiled")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")
    profile(args.config, args.overrides, args.steps, args.threads)


if __name__ == "__main__":
    main()
