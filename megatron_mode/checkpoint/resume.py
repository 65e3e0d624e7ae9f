"""Record the order of a run as it is taken, and go on from a checkpoint when the past agrees."""

from __future__ import annotations

import importlib.metadata
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mode.checkpoint.load import restore
from megatron_mode.checkpoint.manifest import (
    CHECKPOINTS_NAME,
    Manifest,
    check_resumable,
    find_latest,
    read_manifest,
)
from megatron_mode.checkpoint.verify import setting_differences
from megatron_mode.config import Config
from megatron_mode.engine.build import choose_dtype
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError
from megatron_mode.loss.normalise import BlockedShares
from megatron_mode.mix.corpus import Corpus, order_settings
from megatron_mode.mix.digest import OrderDigest
from megatron_mode.mix.edits import NO_EDITS, PlannedEdits
from megatron_mode.mix.order import Order, Rows

RECENT_STEPS = 8
PACKAGES = ("torch", "deepspeed", "megatron-core", "megatron-mode")


class OrderRecord:
    """Chain the digest over the steps taken and keep the newest links for a resume to check."""

    def __init__(self, settings: dict[str, object], edits: PlannedEdits = NO_EDITS) -> None:
        self.settings, self._edits = settings, edits
        self.digest = OrderDigest()
        self.recent: deque[tuple[int, str]] = deque(maxlen=RECENT_STEPS + 1)
        self.recent.append((0, self.digest.hex))

    @classmethod
    def start(cls, config: Config, corpus: Corpus, order: Order) -> OrderRecord:
        """Begin the record of a run."""
        return cls(order_settings(config, corpus, order), order.edits)

    def update(self, step: int, rows: Rows) -> None:
        """Append step `step` (0-based)."""
        self.digest.update(rows, self._edits)
        self.recent.append((step + 1, self.digest.hex))

    def restore(self, manifest: Manifest, order: Order, global_rows: int) -> None:
        """Take over a checkpoint's record after replaying its newest steps.

        Raises CheckpointError naming the step whose rows differ.
        """
        (step, digest), *rest = manifest.recent_digests
        replay = OrderDigest(digest)
        for done, expected in rest:
            rows = order.rows((done - 1) * global_rows, done * global_rows)
            replay.update(rows, self._edits)
            if replay.hex != expected:
                raise CheckpointError(
                    f"the rows of step {done} are not those that the checkpoint of step "
                    f"{manifest.step} was trained on: restore the mix, the seed and the data, or "
                    "start a new run.dir"
                )
            step = done
        assert step == manifest.step, "the newest link is the checkpoint's own"
        self.digest = replay
        self.recent = deque(manifest.recent_digests, maxlen=RECENT_STEPS + 1)


def make_manifest(engine: Engine, record: OrderRecord, step: int) -> Manifest:
    """Describe the state after `step` steps."""
    config = engine.config
    return Manifest(
        step=step,
        tokens_seen=step * config.batch.global_rows * config.model.seq_len,
        config=config.model_dump(mode="json"),
        layout=engine.layout._asdict(),
        precision=precision_name(config),
        order=record.settings,
        order_digest=record.digest.hex,
        recent_digests=list(record.recent),
        blocked_shares=(engine.blocked_shares.lm, engine.blocked_shares.mode),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )


def resume(engine: Engine, folder: Path, record: OrderRecord, order: Order) -> int:
    """Load the run's newest checkpoint into engine and record; return the step to go on from.

    Returns 0 for a run without a checkpoint. Raises CheckpointError when the checkpoint belongs to
    another config, layout or order, before anything is loaded.
    """
    chosen = [find_latest(folder / CHECKPOINTS_NAME)]
    dist.broadcast_object_list(chosen, src=0)
    newest = chosen[0]
    if newest is None:
        return 0
    manifest = read_manifest(newest)
    config = engine.config
    differences = setting_differences(manifest, record.settings)
    layout = engine.layout._asdict()
    check_resumable(manifest, config, layout, precision_name(config), differences)
    record.restore(manifest, order, config.batch.global_rows)
    restore(engine, newest)
    engine.blocked_shares = BlockedShares(*manifest.blocked_shares)
    return manifest.step


def precision_name(config: Config) -> str:
    """Return the precision that `auto` stands for on this machine."""
    return "bf16" if choose_dtype(config) == torch.bfloat16 else "fp32"
