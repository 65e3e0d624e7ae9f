"""Judge each step before its update: what is not finite is found, and spikes of the loss.

Nothing here talks to other ranks: all of them get the same numbers and come to the same verdict. A
step that is left out keeps its number, rows and learning rate, and changes no weight, no moment and
nothing that the judge remembers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal, NamedTuple

from megatron_mode.config.fields import HealthConfig

Kind = Literal["non_finite_loss", "non_finite_gradient", "loss_spike"]
Action = Literal["apply", "skip", "rollback", "stop"]

# Where losses hardly differ, as on text learnt by heart, any step would be a spike.
LEAST_SPREAD = 0.01
LARGEST_FP32 = float.fromhex("0x1.fffffep127")


class Verdict(NamedTuple):
    """Say what becomes of a step's update, and why: no `kind` for a step left out by plan."""

    action: Action
    kind: Kind | None = None
    reason: str = ""
    first_left_out: int = 0
    """For a rollback: the first step that it leaves out; the step itself is the last."""

    @property
    def is_left_out(self) -> bool:
        """Tell whether the step's update is not applied."""
        return self.action != "apply"


APPLY = Verdict("apply")


def spike_limit(losses: Sequence[float], factor: float) -> float:
    """Return the loss above which a step spikes: median + factor * median absolute deviation.

    The deviation counts as at least `LEAST_SPREAD` of the median.
    """
    middle = median(losses)
    spread = median(abs(loss - middle) for loss in losses)
    return middle + factor * max(spread, LEAST_SPREAD * abs(middle))


class HealthJudge:
    """Remember the newest losses and the updates left out."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window_steps)
        self.chosen: set[int] = set()
        """Steps that a policy left out, as opposed to `health.leave_out_steps`."""

    def is_left_out(self, step: int) -> bool:
        """Tell whether the update of a step is left out, by plan or by an earlier verdict."""
        return step in self.chosen or step in self._config.leave_out_steps

    def decide(self, step: int, loss: float, gradient_square: float) -> Verdict:
        """Judge step `step` (0-based) by its loss and the sum of squares of its gradient."""
        if self.is_left_out(step):
            return Verdict("skip")
        config = self._config
        kind, reason = self._find(loss, gradient_square)
        policy = config.spike if kind == "loss_spike" else config.non_finite
        if kind is None or policy == "report":
            self.losses.append(loss)
            return Verdict("apply", kind, reason)
        if policy == "stop":
            return Verdict("stop", kind, reason)
        first = step if policy == "skip" else max(0, step - config.rollback_steps + 1)
        recent = {s for s in self.chosen if s > step - config.max_skips_window_steps}
        if len(recent.union(range(first, step + 1))) > config.max_skips:
            within = f"{len(recent)} updates within {config.max_skips_window_steps} steps"
            return Verdict("stop", kind, f"{reason}, and {within} are left out already")
        self.chosen.update(range(first, step + 1))
        return Verdict(policy, kind, reason, first)

    def restore(self, losses: Iterable[float], left_out: Iterable[int]) -> None:
        """Take over what a checkpoint remembers; verdicts of this process stay in force."""
        self.losses.clear()
        self.losses.extend(losses)
        self.chosen.update(set(left_out) - set(self._config.leave_out_steps))

    def _find(self, loss: float, gradient_square: float) -> tuple[Kind | None, str]:
        if not math.isfinite(loss):
            return "non_finite_loss", f"the loss is {loss}"
        # Above fp32 a gradient cannot be clipped: its norm is infinite.
        if not gradient_square <= LARGEST_FP32:
            return "non_finite_gradient", "the gradient is not finite"
        if len(self.losses) == self.losses.maxlen:
            limit = spike_limit(self.losses, self._config.spike_factor)
            if loss > limit:
                reason = f"the loss is {loss:.4g}, above the limit {limit:.4g} of the last "
                return "loss_spike", f"{reason}{len(self.losses)} steps"
        return None, ""
