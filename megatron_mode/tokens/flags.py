"""Define the byte that stands beside every token in NAME.flags.bin.

bit 0      the token belongs to a Mode 2 document
bit 1      predicting this token carries no LM loss
bit 2      this token carries no mode loss
bits 3-5   role: 0 none, 1 system, 2 user, 3 assistant, 4 tool
bit 6      control piece

Bit 7 is never written: rows set it on padding and on documents that were dropped, where no loss of
either kind is taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MODE2 = 1
NO_LM_LOSS = 2
NO_MODE_LOSS = 4
ROLE_SHIFT = 3
ROLE_MASK = 0b111000
CONTROL = 64
BLANK = 128

ROLES = ("none", "system", "user", "assistant", "tool")


def role_bits(role: str) -> int:
    """Return the flag bits of a role name out of ROLES."""
    return ROLES.index(role) << ROLE_SHIFT


def role_of(flags: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the role index (into ROLES) of each flag byte; same shape, uint8."""
    return (flags & np.uint8(ROLE_MASK)) >> np.uint8(ROLE_SHIFT)


def counts_by_flag(histogram: NDArray[np.int64]) -> dict[str, int]:
    """Sum a 256-bin histogram of flag bytes into one count (tokens) by flag and by role."""
    flags = np.arange(256, dtype=np.uint8)
    bits = {"mode2": MODE2, "no_lm_loss": NO_LM_LOSS, "no_mode_loss": NO_MODE_LOSS}
    chosen = {name: flags & bit != 0 for name, bit in {**bits, "control": CONTROL}.items()}
    chosen |= {f"role_{role}": flags & ROLE_MASK == role_bits(role) for role in ROLES}
    return {name: int(histogram[where].sum()) for name, where in chosen.items()}
