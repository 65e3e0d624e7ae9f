"""State the rules between the keys of `mix`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import NamedTuple, assert_never

from megatron_mode.config.mix import (
    CohortConfig,
    EditsConfig,
    InjectConfig,
    MixConfig,
    Mode2FractionConfig,
    RoleWeightsConfig,
    Shape,
    SourceConfig,
)
from megatron_mode.config.section import Section
from megatron_mode.config.yaml_text import write_value


class Rule(NamedTuple):
    """Tie a check to the keys whose values it looks at."""

    keys: tuple[str, ...]
    check: Callable[..., Iterator[str]]


def _keys_of(shape: Shape) -> tuple[str, ...]:
    """Name the keys that a shape uses beside `start`."""
    match shape:
        case "constant":
            return ()
        case "linear" | "cosine":
            return ("end", "begin_tokens", "end_tokens")
        case "step":
            return ("end", "begin_tokens")
        case "piecewise":
            return ("points",)
    assert_never(shape)


def _check_unused(here: str, section: Section, names: Sequence[str], why: str) -> Iterator[str]:
    """Refuse keys that would be ignored."""
    for name in names:
        given, default = getattr(section, name), type(section).model_fields[name].default
        if given != default:
            yield (
                f"{here}.{name} is {write_value(given)}; accepted: {write_value(default)} {why}; "
                "remove it"
            )


def _check_table(key: str, points: Sequence[tuple[int, Decimal]]) -> Iterator[str]:
    for (before, _), (after, _) in itertools.pairwise(points):
        if after <= before:
            yield (
                f"{key} has {after} tokens after {before}; accepted: rising tokens; sort the "
                "points and give each number of tokens once"
            )


def _check_fraction(plan: Mode2FractionConfig) -> Iterator[str]:
    """Require the keys that a shape uses, refuse the ones that it would ignore."""
    here, used = "mix.mode2_fraction", _keys_of(plan.shape)
    unused = [n for n in ("end", "begin_tokens", "end_tokens", "points") if n not in used]
    yield from _check_unused(here, plan, unused, f"for shape {plan.shape}")
    if "end" in used and plan.end is None:
        yield f"{here}.end is null; accepted: a fraction for shape {plan.shape}; set it"
    if "points" in used and not plan.points:
        yield f"{here}.points is empty; accepted: a list of [tokens, fraction]; add it"
    end_tokens = plan.end_tokens
    if "end_tokens" in used and end_tokens is not None and end_tokens <= plan.begin_tokens:
        yield (
            f"{here}.end_tokens is {end_tokens}; accepted: more than begin_tokens = "
            f"{plan.begin_tokens}; raise it, or use shape step"
        )
    yield from _check_table(f"{here}.points", plan.points)


def _check_fraction_fits_run(
    plan: Mode2FractionConfig, steps: int, global_rows: int, seq_len: int
) -> Iterator[str]:
    total_tokens = steps * global_rows * seq_len
    needs_room = "end_tokens" in _keys_of(plan.shape) and plan.end_tokens is None
    if needs_room and plan.begin_tokens >= total_tokens:
        yield (
            f"mix.mode2_fraction.begin_tokens is {plan.begin_tokens}; accepted: less than the "
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
                "mix.valid; accepted: once; remove the others"
            )


def _check_source(key: str, source: SourceConfig, section: str) -> Iterator[str]:
    if source.mode is not None and section == f"mode{3 - source.mode}":
        yield (
            f"{key}.mode is {source.mode}; accepted: {section[-1]} in mix.{section}; remove it "
            "or move the source"
        )
    yield from _check_table(f"{key}.weight_points", source.weight_points)
    plan = ("weight", "onset_tokens", "ramp_tokens")
    if source.weight_points:
        yield from _check_unused(key, source, plan, "beside weight_points, which say the same")
        if not any(weight for _, weight in source.weight_points):
            yield f"{key}.weight_points are all 0; accepted: one above 0; remove the source"
    if source.when_dry != "share" and source.epochs_max is None:
        yield (
            f"{key}.when_dry is {source.when_dry}; accepted: share where epochs_max is null, as "
            "the source never runs dry; set epochs_max"
        )
    if section == "valid":
        unused = (*plan, "weight_points", "epochs_max", "packing")
        why = "in mix.valid, which is read as a stream and never trained on"
        yield from _check_unused(key, source, unused, why)


def _check_modes_have_sources(mix: MixConfig) -> Iterator[str]:
    plan = mix.mode2_fraction
    fractions = [fraction for _, fraction in plan.points]
    if plan.shape != "piecewise":
        fractions = [plan.start, plan.start if plan.end is None else plan.end]
    least, most = min(fractions, default=Decimal(1)), max(fractions, default=Decimal(0))
    for mode, sources, reaches in (
        (1, mix.mode1.sources, f"falls to {least}" if least < 1 else ""),
        (2, mix.mode2.sources, f"reaches {most}" if most > 0 else ""),
    ):
        if reaches and not sources:
            yield (
                f"mix.mode{mode}.sources is empty; accepted: at least one source while "
                f"mix.mode2_fraction {reaches}; add a source or set the fraction to {2 - mode}"
            )


def _check_role_weights(mode2_lm_loss: str, weights: RoleWeightsConfig) -> Iterator[str]:
    if mode2_lm_loss != "weighted" and weights != RoleWeightsConfig():
        yield (
            f"mix.role_weights are set; accepted: the default for mix.mode2_lm_loss "
            f"{mode2_lm_loss}; set mix.mode2_lm_loss to weighted"
        )


def _check_edits(edits: EditsConfig, steps: int) -> Iterator[str]:
    for position, injection in enumerate(edits.inject):
        yield from _check_injection(f"mix.edits.inject.{position}", injection, steps)
    for position, cohort in enumerate(edits.cohorts):
        yield from _check_cohort(f"mix.edits.cohorts.{position}", cohort, steps)
    changed = Counter([*edits.drop, *(pair.document for pair in edits.replace)])
    for document, count in changed.items():
        if count > 1:
            yield (
                f"mix.edits drops or replaces {document!r} {count} times; accepted: once; remove "
                "the others"
            )


def _check_edits_spare_valid(mix: MixConfig) -> Iterator[str]:
    held_out = {source.name for source in mix.valid.sources}
    asked = [cohort.source for cohort in mix.edits.cohorts]
    asked += [injection.document.partition("/")[0] for injection in mix.edits.inject]
    asked += [pair.by.partition("/")[0] for pair in mix.edits.replace]
    for name in dict.fromkeys(asked):
        if name in held_out:
            yield (
                f"mix.edits shows documents of {name}, which stands in mix.valid; accepted: a "
                "source that is not held out; name another or take it out of mix.valid"
            )


def _check_injection(key: str, injection: InjectConfig, steps: int) -> Iterator[str]:
    if bool(injection.steps) == bool(injection.count):
        yield (
            f"{key} has steps {list(injection.steps)} and count {injection.count}; accepted: one "
            "of them; give steps, or count with first_step and every_steps"
        )
        return
    if injection.steps and (injection.first_step or injection.every_steps != 1):
        yield f"{key} has first_step or every_steps beside steps; accepted: steps alone; remove"
    last = injection.first_step + (injection.count - 1) * injection.every_steps
    last = max(injection.steps, default=last)
    if last >= steps:
        yield f"{key} reaches step {last}; accepted: less than run.steps = {steps}; lower it"


def _check_cohort(key: str, cohort: CohortConfig, steps: int) -> Iterator[str]:
    begin, end = cohort.begin_step, cohort.end_step
    if (begin is None) != (end is None):
        yield f"{key} has one of begin_step and end_step; accepted: both or neither; add it"
    elif begin is not None and end is not None and not begin < end <= steps:
        yield (
            f"{key} spans steps {begin} to {end}; accepted: begin_step < end_step <= run.steps = "
            f"{steps}; correct them"
        )
    if begin is not None and cohort.window != "spread":
        yield f"{key}.window is {cohort.window} beside begin_step; accepted: one of them; remove"


MIX_RULES = (
    Rule(("mix.mode2_fraction",), _check_fraction),
    Rule(
        ("mix.mode2_fraction", "run.steps", "batch.global_rows", "model.seq_len"),
        _check_fraction_fits_run,
    ),
    Rule(("mix",), _check_sources),
    Rule(("mix",), _check_modes_have_sources),
    Rule(("mix.mode2_lm_loss", "mix.role_weights"), _check_role_weights),
    Rule(("mix.edits", "run.steps"), _check_edits),
    Rule(("mix",), _check_edits_spare_valid),
)
