"""Offer types for argparse that say which numbers an option accepts."""

from __future__ import annotations

import argparse
from collections.abc import Callable

LARGEST, MOST_WORKERS = 2**63 - 1, 1024


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """Return the type of an option that takes whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            is_open = most == LARGEST and value < least
            accepted = f"{least} or more" if is_open else f"{least} to {most}"
            raise argparse.ArgumentTypeError(
                f"the value is {text[:40]!r}, accepted is a whole number of {accepted}"
            )
        return value

    return parse


def real(least: float) -> Callable[[str], float]:
    """Return the type of an option that takes finite numbers from `least`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(
                f"the value is {text[:40]!r}, accepted is a number of {least:g} or more"
            )
        return value

    return parse
