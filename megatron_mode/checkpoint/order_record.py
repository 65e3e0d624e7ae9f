"""Record the order of a run as it is taken, for checkpoints and for a resume to check."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

from megatron_mode.checkpoint.manifest import Manifest
from megatron_mode.config import Config
from megatron_mode.errors import CheckpointError
from megatron_mode.mix.corpus import Corpus, order_settings
from megatron_mode.mix.digest import OrderDigest
from megatron_mode.mix.edits.overrides import NO_EDITS, PlannedEdits
from megatron_mode.mix.order import Order, Rows

RECENT_STEPS = 8


class OrderRecord:
    """Chain the digest over the steps taken and keep the newest links for a resume to check."""

    def __init__(self, settings: dict[str, object], edits: PlannedEdits = NO_EDITS) -> None:
        self.settings, self._edits = settings, edits
        self.digest = OrderDigest()
        self.recent = deque([(0, self.digest.hex)], maxlen=RECENT_STEPS + 1)
        """The newest links: how many steps were taken, and the digest after them."""
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
        first, digest = manifest.recent_digests[0]
        self.digest = OrderDigest(digest)
        self.recent = deque([(first, digest)], maxlen=RECENT_STEPS + 1)
        self.skips = [step for step in manifest.skips if step < first]
        expected = dict(manifest.recent_digests)
        for step in self.follow(order, manifest.step, global_rows, manifest.skips):
            if self.digest.hex != expected.get(step):
                raise CheckpointError(
                    f"the rows of step {step} are not those that the checkpoint of step "
                    f"{manifest.step} was trained on: restore the mix, the seed and the data, or "
                    "start a new run.dir"
                )

    def follow(
        self, order: Order, end: int, global_rows: int, skips: Collection[int]
    ) -> Iterator[int]:
        """Append the steps up to `end` as the order has them, `skips` left out; count them."""
        first = self.recent[-1][0]
        for step, rows in enumerate(order.steps(first, end, global_rows), start=first):
            self.update(step, rows, left_out=step in skips)
            yield step + 1
