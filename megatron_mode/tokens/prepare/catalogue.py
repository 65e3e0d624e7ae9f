"""Know the sources met so far and refuse names that mean two things."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.encoded import output_name


class Catalogue:
    """Hold the mode of each source and what it is prepared to."""

    def __init__(self) -> None:
        self.modes: dict[str, int] = {}
        self._owners: dict[str, str] = {}

    def add(self, source: str, mode: int, codes: Iterable[int]) -> None:
        """Enter a source with its outputs; raise DataError when a name is taken."""
        if self.modes.setdefault(source, mode) != mode:
            raise DataError(
                f"Source {source} has lines of Mode 1 (text) and of Mode 2 (messages); a "
                "source has one mode, so give the lines of one mode another source name."
            )
        for name in {output_name(source, mode, code) for code in codes}:
            owner = self._owners.setdefault(name, source)
            if owner != source:
                held_out = owner if name == source else source
                raise DataError(
                    f"Source {name} and the held-out part of {held_out} would both be named "
                    f"{name}; rename one source."
                )
