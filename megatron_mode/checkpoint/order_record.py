"""Record the order of a run as it is taken, and describe the run for a checkpoint."""

from __future__ import annotations

import importlib.metadata
from collections import deque
from typing import Any

import torch

from megatron_mode.checkpoint.manifest import Manifest
from megatron_mode.config import Config
from megatron_mode.engine.build import choose_dtype
from megatron_mode.engine.step import Engine
from megatron_mode.errors import CheckpointError
from megatron_mode.mix.corpus import Corpus, order_settings
from megatron_mode.mix.digest import OrderDigest
from megatron_mode.mix.edits.overrides import NO_EDITS, PlannedEdits
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
        self.skips: list[int] = []
        """Steps taken whose updates were left out, ascending."""

    @classmethod
    def start(cls, config: Config, corpus: Corpus, order: Order) -> OrderRecord:
        """Begin the record of a run."""
        return cls(order_settings(config, corpus, order), order.edits)

    def update(self, step: int, rows: Rows, *, left_out: bool = False) -> None:
        """Append step `step` (0-based); `left_out` tells that it did not update the weights."""
        self.digest.update(rows, self._edits, left_out=left_out)
        self.skips += [step] if left_out else []
        self.recent.append((step + 1, self.digest.hex))

    def restore(self, manifest: Manifest, order: Order, global_rows: int) -> None:
        """Take over a checkpoint's record after replaying its newest steps.

        Raises CheckpointError naming the step whose rows differ.
        """
        (step, digest), *rest = manifest.recent_digests
        replay = OrderDigest(digest)
        for done, expected in rest:
            rows = order.rows((done - 1) * global_rows, done * global_rows)
            replay.update(rows, self._edits, left_out=done - 1 in manifest.skips)
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
        self.skips = list(manifest.skips)


def make_manifest(
    engine: Engine, record: OrderRecord, step: int, probe: dict[str, Any]
) -> Manifest:
    """Describe the state after `step` steps; `probe` is what `Probe.measure` gave there."""
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
        probe=probe,
        skips=list(record.skips),
        recent_losses=list(engine.judge.losses),
    )


def precision_name(config: Config) -> str:
    """Return the precision that `auto` stands for on this machine."""
    return "bf16" if choose_dtype(config) == torch.bfloat16 else "fp32"
