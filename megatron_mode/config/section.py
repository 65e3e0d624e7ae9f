"""Share the rules of all configuration sections and the kinds of numbers they hold."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, NamedTuple

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


class Text(NamedTuple):
    """Say in words what text a field takes, with a text that it takes."""

    words: str
    example: str


SourceName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"),
    Text("up to 100 letters, digits, '.', '_' and '-', as it is a file name", "books"),
]
DocumentName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}/(?s:.)+$"),
    Text("SOURCE/ID, a source and the id of a document in it", "books/1"),
]
CheckpointName = Annotated[str, Field(pattern=r"^step-[0-9]+$"), Text("step-N", "step-1")]


class Section(BaseModel):
    """Share the rules of all sections: immutable, no unknown keys, field docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
