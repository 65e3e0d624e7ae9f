"""State the rules between fields, and which world sizes a layout accepts."""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import NamedTuple

from megatron_mode.config.fields import (
    BatchConfig,
    Config,
    MixConfig,
    Mode2FractionConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
)
from megatron_mode.errors import ConfigError

VOCAB_MULTIPLE = 128
LARGEST_SEED = 2**63 - 1
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_world_size(config: Config, world_size: int) -> int:
    """Return the data-parallel size of a world of so many ranks.

    Raises ConfigError naming the nearest world sizes that work.
    """
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    micro_batches = config.batch.global_rows // config.batch.micro_rows
    data, rest = divmod(world_size, model_ranks)
    if rest == 0 and data >= 1 and micro_batches % data == 0:
        return data
    works = [model_ranks * d for d in range(1, micro_batches + 1) if micro_batches % d == 0]
    near = [max((w for w in works if w < world_size), default=None),
            min((w for w in works if w > world_size), default=None)]  # fmt: skip
    raise ConfigError(
        f"world size is {world_size}: accepted is parallel.tensor * parallel.pipeline = "
        f"{model_ranks} times a divisor of batch.global_rows / batch.micro_rows = {micro_batches}; "
        f"start {' or '.join(str(w) for w in near if w)} processes, or change the batch"
    )


class Rule(NamedTuple):
    """Tie a check to the keys whose values it looks at."""

    keys: tuple[str, ...]
    check: Callable[..., Iterator[str]]


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
            f"model.attention_heads is {attention_heads}: accepted is a number that divides "
            f"model.hidden_size = {hidden_size} into heads of even size (RoPE turns pairs); "
            f"{fix}"
        )
    if attention_heads % kv_heads:
        yield (
            f"model.kv_heads is {kv_heads}: accepted is a divisor of model.attention_heads = "
            f"{attention_heads}; use {_nearest_divisor(kv_heads, attention_heads)}"
        )


def _nearest_divisor(given: int, size: int) -> int:
    """Return the divisor of `size` nearest to `given`, the smaller of two."""
    below = next(d for d in range(min(given, size), 0, -1) if size % d == 0)
    reach = range(given + 1, min(2 * given - below, size + 1))
    return next((d for d in reach if size % d == 0), below)


def _check_vocabulary(vocab_size: int | None) -> Iterator[str]:
    if vocab_size is not None and vocab_size % VOCAB_MULTIPLE:
        above = vocab_size + -vocab_size % VOCAB_MULTIPLE
        yield (
            f"model.vocab_size is {vocab_size}: accepted is a multiple of {VOCAB_MULTIPLE} or "
            f"null; use {above}"
        )


def _check_tensor(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    names = ("attention_heads", "kv_heads", "ffn_hidden_size", "vocab_size")
    given = {f"model.{name}": getattr(model, name) for name in names}
    sizes: dict[str, int] = {key: size for key, size in given.items() if size is not None}
    undivided = [f"{key} = {size}" for key, size in sizes.items() if size % parallel.tensor]
    if undivided:
        yield (
            f"parallel.tensor is {parallel.tensor}: accepted is a divisor of "
            f"{' and of '.join(undivided)}; use "
            f"{_nearest_divisor(parallel.tensor, math.gcd(*sizes.values()))}"
        )


def _check_pipeline(layers: int, pipeline: int) -> Iterator[str]:
    if pipeline > layers:
        yield (
            f"parallel.pipeline is {pipeline}: accepted is at most model.layers = {layers}, one "
            f"layer in each stage; use {layers}"
        )


def _check_batch(batch: BatchConfig) -> Iterator[str]:
    if batch.global_rows % batch.micro_rows:
        yield (
            f"batch.micro_rows is {batch.micro_rows}: accepted is a divisor of batch.global_rows = "
            f"{batch.global_rows}; use {_nearest_divisor(batch.micro_rows, batch.global_rows)}"
        )


def _check_seed(seed: int) -> Iterator[str]:
    if seed > LARGEST_SEED:
        yield f"run.seed is {seed}: accepted is at most 2**63 - 1; use a smaller one"


def _check_fraction(plan: Mode2FractionConfig) -> Iterator[str]:
    """Require the keys that a shape uses, refuse the ones that it would ignore."""
    here = "mix.mode2_fraction"
    needs_end = plan.shape in ("linear", "cosine", "step")
    uses_end_tokens = plan.shape in ("linear", "cosine")
    if needs_end and plan.end is None:
        yield f"{here}.end is null: accepted is a fraction for shape {plan.shape}; set it"
    if not needs_end and plan.end is not None:
        yield f"{here}.end is {plan.end}: accepted is null for shape {plan.shape}; remove it"
    if not needs_end and plan.begin_tokens:
        yield (
            f"{here}.begin_tokens is {plan.begin_tokens}: accepted is 0 for shape {plan.shape}; "
            "remove it"
        )
    if not uses_end_tokens and plan.end_tokens is not None:
        yield (
            f"{here}.end_tokens is {plan.end_tokens}: accepted is null for shape {plan.shape}; "
            "remove it"
        )
    if uses_end_tokens and plan.end_tokens is not None and plan.end_tokens <= plan.begin_tokens:
        yield (
            f"{here}.end_tokens is {plan.end_tokens}: accepted is more than begin_tokens = "
            f"{plan.begin_tokens}; raise it, or use shape step"
        )


def _check_points(plan: Mode2FractionConfig) -> Iterator[str]:
    here = "mix.mode2_fraction.points"
    tokens = [point[0] for point in plan.points]
    if plan.shape != "piecewise" and plan.points:
        yield f"{here} is given: accepted is none for shape {plan.shape}; use shape piecewise"
    if plan.shape == "piecewise" and not plan.points:
        yield f"{here} is empty: accepted is a list of [tokens, fraction] for piecewise; add it"
    for before, after in itertools.pairwise(tokens):
        if after <= before:
            yield (
                f"{here} has {after} tokens after {before}: accepted is rising tokens; sort the "
                "points and give each number of tokens once"
            )


def _check_fraction_fits_run(
    plan: Mode2FractionConfig, steps: int, global_rows: int, seq_len: int
) -> Iterator[str]:
    total_tokens = steps * global_rows * seq_len
    needs_room = plan.shape in ("linear", "cosine") and plan.end_tokens is None
    if needs_room and plan.begin_tokens >= total_tokens:
        yield (
            f"mix.mode2_fraction.begin_tokens is {plan.begin_tokens}: accepted is less than the "
            f"run's {total_tokens} tokens; lower it or set end_tokens"
        )


def _check_sources(mix: MixConfig) -> Iterator[str]:
    lists = {"mode1": mix.mode1.sources, "mode2": mix.mode2.sources, "valid": mix.valid.sources}
    counts = Counter(source.name for sources in lists.values() for source in sources)
    for section, sources in lists.items():
        for position, source in enumerate(sources):
            yield from _check_source(f"mix.{section}.sources.{position}", source, section)
    for name, count in counts.items():
        if count > 1:
            yield (
                f"the source name {name!r} stands {count} times in mix.mode1, mix.mode2 and "
                "mix.valid: accepted is once; remove the others"
            )


def _check_source(key: str, source: SourceConfig, section: str) -> Iterator[str]:
    if not SOURCE_NAME.fullmatch(source.name):
        yield (
            f"{key}.name is {source.name!r}: accepted is up to 100 letters, digits, '.', '_' and "
            "'-', as it is a file name; rename the source"
        )
    if source.mode is not None and section == f"mode{3 - source.mode}":
        yield (
            f"{key}.mode is {source.mode}: accepted is {section[-1]} in mix.{section}; remove it "
            "or move the source"
        )


def _check_modes_have_sources(mix: MixConfig) -> Iterator[str]:
    plan = mix.mode2_fraction
    fractions: list[Decimal] = [fraction for _, fraction in plan.points]
    if plan.shape != "piecewise":
        fractions = [plan.start, *([plan.end] if plan.end is not None else [])]
    if not mix.mode2.sources and any(fraction > 0 for fraction in fractions):
        yield (
            f"mix.mode2.sources is empty: accepted is at least one source while mix.mode2_fraction "
            f"reaches {max(fractions)}; add a source or set the fraction to 0"
        )
    if not mix.mode1.sources and any(fraction < 1 for fraction in fractions):
        yield (
            f"mix.mode1.sources is empty: accepted is at least one source while mix.mode2_fraction "
            f"falls to {min(fractions)}; add a source or set the fraction to 1"
        )


def _check_learning_rate(optimizer: OptimizerConfig, steps: int) -> Iterator[str]:
    wsd = optimizer.schedule == "wsd"
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate is {optimizer.min_learning_rate}: accepted is at most "
            f"optimizer.learning_rate = {optimizer.learning_rate}; lower it"
        )
    if wsd and not optimizer.decay_steps:
        yield "optimizer.decay_steps is 0: accepted is at least 1 for schedule wsd; set it"
    if not wsd and optimizer.decay_steps:
        yield (
            f"optimizer.decay_steps is {optimizer.decay_steps}: accepted is 0 for schedule "
            f"{optimizer.schedule}; remove it or use wsd"
        )
    if optimizer.warmup_steps + optimizer.decay_steps > steps:
        yield (
            f"optimizer.warmup_steps + optimizer.decay_steps is "
            f"{optimizer.warmup_steps + optimizer.decay_steps}: accepted is at most run.steps = "
            f"{steps}; shorten them"
        )


RULES = (
    Rule(("model.hidden_size", "model.attention_heads", "model.kv_heads"), _check_heads),
    Rule(("model.vocab_size",), _check_vocabulary),
    Rule(("model", "parallel"), _check_tensor),
    Rule(("model.layers", "parallel.pipeline"), _check_pipeline),
    Rule(("batch",), _check_batch),
    Rule(("run.seed",), _check_seed),
    Rule(("mix.mode2_fraction",), _check_fraction),
    Rule(("mix.mode2_fraction",), _check_points),
    Rule(
        ("mix.mode2_fraction", "run.steps", "batch.global_rows", "model.seq_len"),
        _check_fraction_fits_run,
    ),
    Rule(("mix",), _check_sources),
    Rule(("mix",), _check_modes_have_sources),
    Rule(("optimizer", "run.steps"), _check_learning_rate),
)
