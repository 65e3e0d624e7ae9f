"""State the rules between fields, and which world sizes a layout accepts."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator

from megatron_mode.config.fields import (
    BatchConfig,
    Config,
    HealthConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_mode.config.mix_rules import MIX_RULES, Rule
from megatron_mode.errors import ConfigError

VOCAB_MULTIPLE = 128
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LARGEST_RUN_ROWS = 10**12  # up to which the order is exact


def check_world_size(config: Config, world_size: int) -> int:
    """Return the data-parallel size of a world of so many ranks.

    Raises ConfigError naming the nearest world sizes that work.
    """
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    micro_batches = config.batch.global_rows // config.batch.micro_rows
    least = least_micro_batches(config.parallel)
    sizes = [size for size in _divisors(micro_batches) if size <= micro_batches // least]
    data, rest = divmod(world_size, model_ranks)
    if rest == 0 and data in sizes:
        return data
    works = [model_ranks * size for size in sizes]
    each = f", at least {least} for each data rank (parallel.schedule)" if least > 1 else ""
    near = [*[w for w in works if w < world_size][-1:], *[w for w in works if w > world_size][:1]]
    raise ConfigError(
        f"world size is {world_size}; accepted: parallel.tensor * parallel.pipeline = "
        f"{model_ranks} times a divisor of batch.global_rows / batch.micro_rows = {micro_batches}"
        f"{each}; start {' or '.join(map(str, near))} processes, or change the batch"
    )


def least_micro_batches(parallel: ParallelConfig) -> int:
    """Return how many micro-batches a step of one data rank needs at least."""
    return 2 * parallel.pipeline if parallel.schedule == "dualpipev" else 1


def find_broken_rules(config: Config, is_wrong: Callable[[str], bool]) -> Iterator[str]:
    """Yield a sentence for each broken rule; rules that look at wrong keys are skipped."""
    for rule in RULES:
        if not any(is_wrong(key) for key in rule.keys):
            yield from rule.check(*(operator.attrgetter(key)(config) for key in rule.keys))


def _check_heads(hidden_size: int, attention_heads: int, kv_heads: int) -> Iterator[str]:
    if hidden_size % (2 * attention_heads):
        fix = "make model.hidden_size even"
        if hidden_size % 2 == 0:
            fix = f"use {_nearest_divisor(attention_heads, hidden_size // 2)}"
        yield (
            f"model.attention_heads is {attention_heads}; accepted: a number that divides "
            f"model.hidden_size = {hidden_size} into heads of even size (RoPE turns pairs); "
            f"{fix}"
        )
    if attention_heads % kv_heads:
        yield (
            f"model.kv_heads is {kv_heads}; accepted: a divisor of model.attention_heads = "
            f"{attention_heads}; use {_nearest_divisor(kv_heads, attention_heads)}"
        )


def _divisors(size: int) -> list[int]:
    """Return the divisors of a number, rising; takes its square root of steps."""
    low = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return sorted({*low, *(size // d for d in low)})


def _nearest_divisor(given: int, size: int) -> int:
    """Return the divisor of `size` nearest to `given`, the smaller of two."""
    return min(_divisors(size), key=lambda divisor: (abs(divisor - given), divisor))


def _check_vocabulary(vocab_size: int | None) -> Iterator[str]:
    if vocab_size is not None and vocab_size % VOCAB_MULTIPLE:
        yield (
            f"model.vocab_size is {vocab_size}; accepted: a multiple of {VOCAB_MULTIPLE} or "
            f"null; use {vocab_size + -vocab_size % VOCAB_MULTIPLE}"
        )


def _check_tensor(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    names = ("attention_heads", "kv_heads", "ffn_hidden_size", "vocab_size")
    given = {f"model.{name}": getattr(model, name) for name in names}
    sizes: dict[str, int] = {key: size for key, size in given.items() if size is not None}
    undivided = [f"{key} = {size}" for key, size in sizes.items() if size % parallel.tensor]
    if undivided:
        yield (
            f"parallel.tensor is {parallel.tensor}; accepted: a divisor of "
            f"{' and of '.join(undivided)}; use "
            f"{_nearest_divisor(parallel.tensor, math.gcd(*sizes.values()))}"
        )


def _check_sequence_parallel(seq_len: int, parallel: ParallelConfig) -> Iterator[str]:
    if not parallel.sequence_parallel:
        return
    if parallel.tensor == 1:
        yield (
            "parallel.sequence_parallel is true; accepted: false where parallel.tensor = 1, "
            "which leaves nothing to share; remove it or raise parallel.tensor"
        )
    elif seq_len % parallel.tensor:
        yield (
            f"model.seq_len is {seq_len}; accepted: a multiple of parallel.tensor = "
            f"{parallel.tensor} with parallel.sequence_parallel; use "
            f"{seq_len + -seq_len % parallel.tensor}"
        )


def _check_pipeline(layers: int, batch: BatchConfig, parallel: ParallelConfig) -> Iterator[str]:
    pipeline, least = parallel.pipeline, least_micro_batches(parallel)
    if pipeline > layers:
        yield (
            f"parallel.pipeline is {pipeline}; accepted: at most model.layers = {layers}, one "
            f"layer in each stage; use {layers}"
        )
    elif parallel.schedule == "dualpipev" and not 2 <= pipeline <= layers // 2:
        yield (
            f"parallel.schedule is {parallel.schedule} with parallel.pipeline = {pipeline}; "
            f"accepted: parallel.pipeline from 2 to model.layers / 2 = {layers // 2}, as each "
            "rank holds two stages; use 1f1b or change parallel.pipeline"
        )
    elif batch.global_rows // batch.micro_rows < least:
        yield (
            f"batch.global_rows is {batch.global_rows}; accepted: at least 2 * parallel.pipeline "
            f"* batch.micro_rows = {least * batch.micro_rows} for parallel.schedule = "
            f"{parallel.schedule}; use {least * batch.micro_rows}"
        )


def _check_zero(precision: str, zero_stage: int) -> Iterator[str]:
    # DeepSpeed sums bf16 gradients in fp32 under ZeRO-1 only, and raises NotImplementedError else.
    if precision == "bf16" and zero_stage == 0:
        yield (
            "parallel.zero_stage is 0; accepted: 1 for run.precision bf16; use 1, or precision fp32"
        )


def _check_batch(batch: BatchConfig) -> Iterator[str]:
    if batch.global_rows % batch.micro_rows:
        yield (
            f"batch.micro_rows is {batch.micro_rows}; accepted: a divisor of batch.global_rows = "
            f"{batch.global_rows}; use {_nearest_divisor(batch.micro_rows, batch.global_rows)}"
        )


def _check_places(folder: str, root: str, name: str) -> Iterator[str]:
    for key, text in {"run.dir": folder, "data.root": root, "model.name": name}.items():
        if not text.strip() or _CONTROL.search(text):
            yield (
                f"{key} is {text[:60]!r}; accepted: text that is not empty, without line breaks "
                "and control characters; name it anew"
            )
        elif key != "model.name" and text.startswith("~"):
            yield (
                f"{key} is {text[:60]!r}; accepted: after ~, nothing or the name of a user with a "
                "home folder; write the path out, or ./~ for a folder of that name"
            )
    if any(sign in folder for sign in "*?["):
        yield (
            f"run.dir is {folder[:60]!r}; accepted: a path without *, ? and [, by which "
            "DeepSpeed would look for other folders; name it anew"
        )


def _check_run_rows(steps: int, global_rows: int) -> Iterator[str]:
    if steps * global_rows > LARGEST_RUN_ROWS:
        yield (
            f"run.steps * batch.global_rows is {steps * global_rows} rows; accepted: up to "
            f"{LARGEST_RUN_ROWS}; lower one of them"
        )


def _check_time_limit(limit_seconds: float | None, margin_seconds: float) -> Iterator[str]:
    if limit_seconds is not None and limit_seconds <= margin_seconds:
        yield (
            f"run.time_limit_seconds is {limit_seconds:g}; accepted: more than "
            f"run.time_margin_seconds = {margin_seconds:g}, or every start would stop after one "
            "step; raise it or lower the margin"
        )


def _check_learning_rate(optimizer: OptimizerConfig, steps: int) -> Iterator[str]:
    wsd, planned = optimizer.schedule == "wsd", optimizer.warmup_steps + optimizer.decay_steps
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate is {optimizer.min_learning_rate}; accepted: at most "
            f"optimizer.learning_rate = {optimizer.learning_rate}; lower it"
        )
    if wsd and not optimizer.decay_steps:
        yield "optimizer.decay_steps is 0; accepted: at least 1 for schedule wsd; set it"
    if not wsd and optimizer.decay_steps:
        yield (
            f"optimizer.decay_steps is {optimizer.decay_steps}; accepted: 0 for schedule "
            f"{optimizer.schedule}; remove it or use wsd"
        )
    if planned > steps:
        yield (
            f"optimizer.warmup_steps + optimizer.decay_steps is {planned}; accepted: at most "
            f"run.steps = {steps}; shorten them"
        )


def _check_health(health: HealthConfig, steps: int) -> Iterator[str]:
    named = list(health.leave_out_steps)
    if named != sorted(set(named)) or (named and named[-1] >= steps):
        yield (
            f"health.leave_out_steps is {named}; accepted: ascending steps from 0 to run.steps - 1 "
            f"= {steps - 1}; correct them"
        )
    rolls_back = "rollback" in (health.non_finite, health.spike)
    if rolls_back and health.rollback_steps > health.max_skips:
        yield (
            f"health.rollback_steps is {health.rollback_steps}; accepted: at most "
            f"health.max_skips = {health.max_skips}, or the first rollback stops the run; lower it"
        )


RULES = (
    Rule(("model.hidden_size", "model.attention_heads", "model.kv_heads"), _check_heads),
    Rule(("model.vocab_size",), _check_vocabulary),
    Rule(("model", "parallel"), _check_tensor),
    Rule(("model.seq_len", "parallel"), _check_sequence_parallel),
    Rule(("run.precision", "parallel.zero_stage"), _check_zero),
    Rule(("model.layers", "batch", "parallel"), _check_pipeline),
    Rule(("batch",), _check_batch),
    Rule(("run.time_limit_seconds", "run.time_margin_seconds"), _check_time_limit),
    Rule(("run.dir", "data.root", "model.name"), _check_places),
    Rule(("run.steps", "batch.global_rows"), _check_run_rows),
    *MIX_RULES,
    Rule(("optimizer", "run.steps"), _check_learning_rate),
    Rule(("health", "run.steps"), _check_health),
)
