"""Describe a checkpoint in its own file, and refuse to resume what does not belong together.

A checkpoint is `RUN/checkpoints/step-NNNNNNNN/`; its manifest is written last, so a folder without
one is unfinished and is ignored. `latest` names the newest finished one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from megatron_mode.config import Config
from megatron_mode.engine.optimizer import learning_rate
from megatron_mode.errors import CheckpointError

FORMAT = 1
MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest"
TOKENIZER_NAME = "tokenizer.model"
CHECKPOINTS_NAME = "checkpoints"

# What a resumed run may change: where things lie, how often it reports, and how rows fall into
# micro-batches. run.steps is judged by the past it implies.
FREE_KEYS = (
    "run.dir",
    "run.steps",
    "run.eval_every_steps",
    "run.eval_rows",
    "run.threads",
    "data.",
    "mix.valid.",
    "checkpoint.",
    "batch.micro_rows",
    "parallel.activation_checkpointing",
    "loss.check_targets",
)
# The order's own record judges these, by what they do to the rows.
ORDER_KEYS = ("mix.mode1.", "mix.mode2.", "mix.mode2_fraction.", "mix.edits.")


@dataclass(frozen=True)
class Manifest:
    """State what a checkpoint holds; every field is JSON."""

    step: int
    tokens_seen: int
    config: dict[str, Any]
    layout: dict[str, int]
    precision: str
    order: dict[str, Any]
    order_digest: str
    recent_digests: list[tuple[int, str]]
    blocked_shares: tuple[float, float]
    versions: dict[str, str]
    format: int = FORMAT


def tag_of(step: int) -> str:
    """Return the folder name of the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest whole or not at all."""
    _replace(folder / MANIFEST_NAME, json.dumps(asdict(manifest), indent=1))


def write_latest(checkpoints: Path, step: int) -> None:
    """Point `latest` at a finished checkpoint."""
    _replace(checkpoints / LATEST_NAME, tag_of(step) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest; CheckpointError when it is missing or not ours."""
    path = folder / MANIFEST_NAME
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no {MANIFEST_NAME}: name a finished checkpoint folder such as "
            f"RUN/checkpoints/{tag_of(100)}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): name another checkpoint or delete this one"
        ) from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a manifest of format {FORMAT}: it was written by another version; "
            "start a new run.dir or use that version"
        )
    try:
        fields["recent_digests"] = [tuple(pair) for pair in fields["recent_digests"]]
        fields["blocked_shares"] = tuple(fields["blocked_shares"])
        return _checked(Manifest(**fields))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): name another checkpoint or delete this one"
        ) from None


def _checked(manifest: Manifest) -> Manifest:
    """Raise ValueError for fields of other kinds and for links that do not end in this step."""
    kinds = {"step": int, "config": dict, "layout": dict, "order": dict, "order_digest": str}
    for name, kind in kinds.items():
        if not isinstance(getattr(manifest, name), kind):
            raise ValueError(f"{name} is {getattr(manifest, name)!r}")
    if not manifest.recent_digests or manifest.recent_digests[-1][0] != manifest.step:
        raise ValueError(f"recent_digests do not end with step {manifest.step}")
    return manifest


def find_latest(checkpoints: Path) -> Path | None:
    """Return the newest finished checkpoint of a run, or None when it has none."""
    finished = finished_checkpoints(checkpoints)
    return finished[-1] if finished else None


def finished_checkpoints(checkpoints: Path) -> list[Path]:
    """List the finished checkpoints of a run, oldest first; copies under other names are none."""
    found = (path.parent for path in checkpoints.glob(f"step-*/{MANIFEST_NAME}"))
    ours = [path for path in found if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(ours, key=lambda path: int(path.name.removeprefix("step-")))


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
    layout: dict[str, int],
    precision: str,
    order_differences: Mapping[str, str],
) -> None:
    """Refuse to resume under another model, layout, recipe or order, naming every differing key.

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
    for axis, size in layout.items():
        if manifest.layout[axis] != size:
            saved_size = manifest.layout[axis]
            differing.append(f"the {axis} size is {size}, the checkpoint has {saved_size}")
    if manifest.precision != precision:
        differing.append(f"precision is {precision}, the checkpoint has {manifest.precision}")
    differing += _changed_past(manifest, config)
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


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
