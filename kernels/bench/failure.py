"""Put into one line why something could not be measured."""

from __future__ import annotations

REASON_CHARACTERS = 200


class MeasurementError(RuntimeError):
    """Report that a measurement gave no usable number; the message is the reason."""


def reason(error: BaseException) -> str:
    """Return kind and first line of an error; of ours the message, which says it all."""
    lines = str(error).strip().splitlines() or ["no message"]
    kind = "" if isinstance(error, MeasurementError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:REASON_CHARACTERS]
