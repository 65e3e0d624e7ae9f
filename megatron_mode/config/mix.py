"""Declare the keys of `mix`: sources, schedules, loss masks and edits of single documents."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field

from megatron_mode.config.section import (
    Count,
    CountOrZero,
    DocumentName,
    Fraction01,
    Section,
    SourceName,
    Weight,
)

Shape = Literal["constant", "linear", "cosine", "step", "piecewise"]


class SourceConfig(Section):
    """Name one prepared source and its share inside its mode."""

    name: SourceName
    """Name of the source: the files are data.root/NAME.bin, .idx, .flags.bin, .json."""
    weight: Annotated[Decimal, Field(gt=0)] = Decimal(1)
    """Share relative to the other sources of the same mode; exact decimal."""
    onset_tokens: CountOrZero = 0
    """Tokens seen before which the source has no share."""
    ramp_tokens: CountOrZero = 0
    """Tokens over which the share rises from nothing, from onset_tokens on."""
    weight_points: tuple[tuple[CountOrZero, Weight], ...] = ()
    """Table of (tokens seen, weight) instead of weight; the share is a line between points."""
    epochs_max: Annotated[Decimal, Field(gt=0)] | None = None
    """Most passes over the source before it runs dry; unset: no limit."""
    when_dry: Literal["share", "repeat", "error"] = "share"
    """What happens then: the others of its mode take its share, it repeats with a warning, or the
    run is refused."""
    packing: Literal["stream", "whole"] = "stream"
    """stream cuts the documents into rows; whole packs them undivided (`megatron-mode pack`)."""
    mode: Literal[1, 2] | None = None
    """Mode of a source without flags in mix.valid; elsewhere the list it stands in decides."""


class SourcesConfig(Section):
    """List the sources of one mode, in the order in which they are apportioned."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources; the order is part of the run's order."""


class Mode2FractionConfig(Section):
    """Schedule the share of Mode 2 rows by tokens seen."""

    shape: Shape = "constant"
    """constant holds start; linear and cosine go from start to end between begin_tokens and
    end_tokens; step jumps from start to end at begin_tokens; piecewise joins points by lines."""
    start: Fraction01 = Decimal("0.5")
    """Fraction before begin_tokens, 0 to 1; exact decimal."""
    end: Fraction01 | None = None
    """Fraction after end_tokens (after begin_tokens for step), 0 to 1; exact decimal."""
    begin_tokens: CountOrZero = 0
    """Tokens seen at which the change begins."""
    end_tokens: CountOrZero | None = None
    """Tokens seen at which the change ends; unset: the end of the run."""
    points: tuple[tuple[CountOrZero, Fraction01], ...] = ()
    """Table of (tokens seen, fraction) for piecewise; flat outside."""


class RoleWeightsConfig(Section):
    """Weigh the LM loss of Mode 2 tokens by the role of the turn that they belong to."""

    system: Weight = Decimal(1)
    """Weight of system turns."""
    user: Weight = Decimal(1)
    """Weight of user turns."""
    assistant: Weight = Decimal(1)
    """Weight of assistant turns."""
    tool: Weight = Decimal(1)
    """Weight of tool turns."""


class InjectConfig(Section):
    """Show one document at chosen steps: alone in its row, in the place of a row of its mode."""

    document: DocumentName
    """The document as SOURCE/ID; the source needs no place in the mix."""
    steps: tuple[CountOrZero, ...] = ()
    """Steps (from 0) at which the document is shown."""
    count: CountOrZero = 0
    """Times the document is shown, instead of steps."""
    first_step: CountOrZero = 0
    """First of count steps."""
    every_steps: Count = 1
    """Spacing of count steps."""


class CohortConfig(Section):
    """Show every row of a source equally often inside a window of the run."""

    source: SourceName
    """Prepared source; its rows take the places of rows of its mode, spread evenly."""
    window: Literal["early", "mid", "late", "spread", "never"] = "spread"
    """Thirds of the run, all of it, or nothing of it."""
    begin_step: CountOrZero | None = None
    """First step of the window, instead of a named one."""
    end_step: CountOrZero | None = None
    """Step after the last one of the window, instead of a named one."""
    exposures: Count = 1
    """Times each row is shown."""
    packing: Literal["stream", "whole", "document"] = "document"
    """document gives each document a row of its own; stream and whole as in mix.mode1.sources."""


class ReplaceConfig(Section):
    """Put one document in the place of another, cut or padded to its length."""

    document: DocumentName
    """The document that goes, as SOURCE/ID."""
    by: DocumentName
    """The document that is read instead, as SOURCE/ID; the source needs no place in the mix."""


class EditsConfig(Section):
    """Change single documents of the data without moving any other row."""

    inject: tuple[InjectConfig, ...] = ()
    """Documents shown at chosen steps."""
    cohorts: tuple[CohortConfig, ...] = ()
    """Sources shown equally often inside windows."""
    drop: tuple[DocumentName, ...] = ()
    """Documents to blank, as SOURCE/ID."""
    replace: tuple[ReplaceConfig, ...] = ()
    """Documents to replace."""


class MixConfig(Section):
    """Say which rows are taken, in which share, and how they become loss."""

    mode1: SourcesConfig = SourcesConfig()
    """Sources of text to continue."""
    mode2: SourcesConfig = SourcesConfig()
    """Sources of instructions, assistants and agents."""
    valid: SourcesConfig = SourcesConfig()
    """Held-out sources of either mode; never trained on."""
    mode2_fraction: Mode2FractionConfig = Mode2FractionConfig()
    """Share of Mode 2 rows over the run."""
    reset_at_documents: bool = True
    """Restart positions and attention at each document start."""
    mode2_lm_loss: Literal["all", "assistant", "weighted"] = "all"
    """Mode 2 tokens with LM loss: all, those of assistant turns, or by mix.role_weights."""
    role_weights: RoleWeightsConfig = RoleWeightsConfig()
    """Weights of the roles for mode2_lm_loss weighted."""
    edits: EditsConfig = EditsConfig()
    """Controlled changes of single documents."""
