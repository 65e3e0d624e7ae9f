"""Refuse to go on from a checkpoint of another model, recipe or order."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_mode.checkpoint.manifest import Manifest
from megatron_mode.config import Config
from megatron_mode.engine.optimizer import learning_rate
from megatron_mode.errors import CheckpointError

# What a resumed run may change: where things lie, how often it reports, and how rows fall into
# micro-batches. run.steps is judged by the past it implies.
FREE_KEYS = (
    "run.dir",
    "run.resume_from",
    "run.steps",
    "run.eval_every_steps",
    "run.eval_rows",
    "run.time_",
    "run.threads",
    "data.",
    "mix.valid.",
    "checkpoint.",
    "health.",
    "batch.micro_rows",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.schedule",
    "parallel.activation_checkpointing",
    "parallel.sequence_parallel",
    "loss.check_targets",
)
END_KEY = "mix.mode2_fraction.end_tokens"
# The order's own record judges these, by what they do to the rows.
ORDER_KEYS = ("mix.mode1.", "mix.mode2.", "mix.mode2_fraction.", "mix.edits.")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def check_resumable(
    manifest: Manifest,
    config: Config,
    precision: str,
    order_differences: Mapping[str, str],
) -> None:
    """Refuse to resume under another model, recipe or order, naming every differing key.

    `order_differences` are those of the order's settings, a sentence for each key.
    """
    saved, wanted = flatten(_completed(manifest.config)), flatten(config.model_dump(mode="json"))
    keys = [k for k in sorted(saved | wanted) if not k.startswith((*FREE_KEYS, *ORDER_KEYS))]
    by_key = {
        key: f"{key} is {wanted.get(key)!r} but the checkpoint has {saved.get(key)!r}"
        for key in keys
        if saved.get(key) != wanted.get(key) and _number(saved.get(key)) != _number(wanted.get(key))
    }
    differing = list({**order_differences, **by_key}.values())
    if manifest.precision != precision:
        differing.append(f"precision is {precision}, the checkpoint has {manifest.precision}")
    differing += _changed_past(manifest, config)
    end_tokens = manifest.order.get(END_KEY)
    if END_KEY in order_differences and config.run.steps != manifest.config["run"]["steps"]:
        differing.append(
            f"{END_KEY} follows run.steps where it is not given: set it to {end_tokens} to keep "
            "the plan"
        )
    if differing:
        raise CheckpointError(
            f"the checkpoint at step {manifest.step} belongs to another run: "
            + "; ".join(differing)
            + " -- restore these or start a new run.dir"
        )


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
    old_steps = int(manifest.config["run"]["steps"])
    if config.run.steps < manifest.step:
        return [f"run.steps is {config.run.steps} but {manifest.step} steps are already taken"]
    planned = {step for step in config.health.leave_out_steps if step < manifest.step}
    if missed := planned.difference(manifest.skips):
        return [f"health.leave_out_steps names step {min(missed)}, whose update is taken already"]
    samples = {*range(min(manifest.step, 1000)), *range(0, manifest.step, 997), manifest.step - 1}
    for step in sorted(samples - {-1}):
        old = learning_rate(config.optimizer, step, old_steps)
        if learning_rate(config.optimizer, step, config.run.steps) != old:
            return [
                f"run.steps is {config.run.steps} instead of {old_steps}, which would have changed "
                f"the learning rate of step {step} (optimizer.schedule "
                f"{config.optimizer.schedule}; constant and wsd can be prolonged)"
            ]
    return []
