"""Share the rules of all configuration sections and the kinds of numbers they hold."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction01 = Annotated[Decimal, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
# Beyond these a number is a slip: counts of tokens and bytes are exact in float64; the rows of a
# batch fit memory; positions travel between stages as three base-256 digits; seeds have 63 bits.
LARGEST_COUNT, LARGEST_SIZE, LARGEST_THREADS, LARGEST_SEED = 10**15, 2**24, 1024, 2**63 - 1
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Weight = Annotated[Decimal, Field(ge=0)]


class Section(BaseModel):
    """Share the rules of all sections: immutable, no unknown keys, field docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
