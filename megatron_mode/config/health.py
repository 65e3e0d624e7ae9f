"""Declare what a run does about steps that cannot be right and about ranks that stand still."""

from __future__ import annotations

from typing import Literal

from megatron_mode.config.section import Count, CountOrZero, NonNegative, Positive, Section


class HealthConfig(Section):
    """Choose what happens at a loss or gradient that is not finite, at a spike and at a stall."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """At a loss or gradient that is not finite: stop; skip the update; or reload the newest
    checkpoint and leave the update out."""
    spike: Literal["report", "stop", "skip", "rollback"] = "report"
    """The same at a spike of the loss; report writes it to health.jsonl and goes on."""
    spike_window_steps: Count = 64
    """Steps whose losses a spike is judged by; none is found before so many are taken."""
    spike_factor: Positive = 12.0
    """A loss spikes above the window's median + this times its median absolute deviation, which
    counts as at least 1 % of the median."""
    rollback_steps: Count = 1
    """Steps whose updates a rollback leaves out: the one at fault and those right before it."""
    max_skips: CountOrZero = 8
    """Most updates left out by these policies within max_skips_window_steps; one more stops."""
    max_skips_window_steps: Count = 1000
    """Steps within which max_skips counts."""
    leave_out_steps: tuple[CountOrZero, ...] = ()
    """Steps (from 0) whose updates are left out from the start: repeats what a run chose."""
    stall_seconds: NonNegative = 600.0
    """Seconds without progress after which a run writes its stacks and ends; 0: nobody watches, and
    only the collectives' own time limit of ten minutes and more is left."""
    start_stall_seconds: Positive = 900.0
    """The same for the start with its resume, the first step and the final report, which may take
    longer."""
