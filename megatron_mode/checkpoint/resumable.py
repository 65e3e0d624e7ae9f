"""Refuse to continue from a checkpoint of another model, recipe or order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_mode.checkpoint.manifest import Manifest
from megatron_mode.config import Config
from megatron_mode.engine.optimizer import learning_rate
from megatron_mode.errors import CheckpointError

# What a resumed run may change: where things are, how often it reports, and how rows fall into
# micro-batches. run.steps is judged by the past it implies.
FREE_KEYS = (
    "run.dir", "run.resume_from", "run.steps", "run.eval_every_steps", "run.eval_rows",
    "run.time_", "run.threads", "data.", "mix.valid.", "checkpoint.", "health.",
    "batch.micro_rows", "parallel.tensor", "parallel.pipeline", "parallel.schedule",
    "parallel.activation_checkpointing", "parallel.sequence_parallel", "loss.check_targets",
)  # fmt: skip
MOST_NAMED = 8
END_KEY = "mix.mode2_fraction.end_tokens"
# The order's own record judges these, by what they do to the rows.
ORDER_KEYS = ("mix.mode1.", "mix.mode2.", "mix.mode2_fraction.", "mix.edits.")


def check_resumable(
    manifest: Manifest, config: Config, precision: str, order_differences: Mapping[str, str]
) -> None:
    """Refuse to resume under another model, recipe or order; name the first differing keys.

    `order_differences` are those of the order's settings, a sentence for each key.
    """
    saved, wanted = _flatten(_completed(manifest.config)), _flatten(config.model_dump(mode="json"))
    by_key = {
        key: f"{key} is {wanted.get(key)!r} but the checkpoint has {saved.get(key)!r}"
        for key in sorted(saved | wanted)
        if not key.startswith((*FREE_KEYS, *ORDER_KEYS))
        and saved.get(key) != wanted.get(key)
        and _number(saved.get(key)) != _number(wanted.get(key))
    }
    differing = list({**order_differences, **by_key}.values())
    if manifest.precision != precision:
        differing.append(f"precision is {precision}, the checkpoint has {manifest.precision}")
    differing += _changed_past(manifest, config)
    if END_KEY in order_differences and config.run.steps != manifest.config["run"]["steps"]:
        differing.append(
            f"{END_KEY} follows run.steps where it is not given: set it to "
            f"{manifest.order.get(END_KEY)} to keep the plan"
        )
    refuse(manifest, differing)


def refuse(manifest: Manifest, differing: Iterable[str]) -> None:
    """Raise CheckpointError where a run and a checkpoint differ."""
    said = list(differing)
    if not said:
        return
    rest = f"; and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
    raise CheckpointError(
        f"the checkpoint at step {manifest.step} belongs to another run: "
        f"{'; '.join(said[:MOST_NAMED])}{rest} -- restore these or start a new run.dir"
    )


def setting_differences(manifest: Manifest, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence for each setting of the order that differs from a checkpoint's."""
    saved = manifest.order
    return {
        key: _difference(key, settings.get(key), saved.get(key))
        for key in sorted(saved.keys() | settings.keys())
        if saved.get(key) != settings.get(key)
    }


def _difference(key: str, given: Any, saved: Any) -> str:
    """Name both values; of content digests only the files that differ."""
    if isinstance(given, Mapping | None) and isinstance(saved, Mapping | None):
        given, saved = given or {}, saved or {}
        files = [name for name in sorted({*given, *saved}) if given.get(name) != saved.get(name)]
        return f"{key} is not that of the checkpoint ({', '.join(files)})"
    return f"{key} is {given!r} but the checkpoint has {saved!r}"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """Give keys that the checkpoint's version did not know their defaults, which mean the same."""
    try:
        return Config.model_validate(saved).model_dump(mode="json")
    except ValueError:
        return saved


def _number(value: Any) -> Any:
    """Read a decimal written as text: 0.5 and 0.50 are one setting."""
    try:
        return Decimal(value) if isinstance(value, str) else value
    except InvalidOperation:
        return value


def _changed_past(manifest: Manifest, config: Config) -> list[str]:
    old_steps, new_steps = int(manifest.config["run"]["steps"]), config.run.steps
    if new_steps < manifest.step:
        return [f"run.steps is {new_steps} but {manifest.step} steps are already taken"]
    planned = {step for step in config.health.leave_out_steps if step < manifest.step}
    if missed := planned.difference(manifest.skips):
        return [f"health.leave_out_steps names step {min(missed)}, whose update is taken already"]
    samples = {*range(min(manifest.step, 1000)), *range(0, manifest.step, 997), manifest.step - 1}
    for step in sorted(samples - {-1}):
        old, new = (learning_rate(config.optimizer, step, n) for n in (old_steps, new_steps))
        if old != new:
            return [
                f"run.steps is {new_steps} instead of {old_steps}, which would have changed the "
                f"learning rate of step {step} (optimizer.schedule {config.optimizer.schedule}; "
                "constant and wsd can be prolonged)"
            ]
    return []
