"""Say what is wrong with a corpus, or odd about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mode.errors import DataError
from megatron_mode.tokens.documents import bad_line_error
from megatron_mode.tokens.prepare.request import output_name
from megatron_mode.tokens.prepare.units import SHOWN_BAD_LINES, Unit


class BadLines:
    """Count bad lines and stop at the first one too many."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.count = allowed, 0
        self.first: list[str] = []

    def add(self, path: Path | str, found: Iterable[tuple[int, str]]) -> None:
        """Count the bad lines of a batch; raise DataError beyond the allowance."""
        for number, reason in found:
            self.count += 1
            if self.count > self.allowed:
                if self.allowed:
                    reason += f" (bad line {self.count}, --max-bad-lines is {self.allowed})"
                raise bad_line_error(path, number, reason)
            if len(self.first) < SHOWN_BAD_LINES:
                self.first.append(f"{path}:{number}: {reason}")


class Catalogue:
    """Know the sources met so far and refuse names that mean two things."""

    def __init__(self, units: Iterable[Unit] = ()) -> None:
        self.modes: dict[str, int] = {}
        self._owners: dict[str, str] = {}
        for unit in units:
            for source, found in unit.facts["sources"].items():
                self.add(source, found["mode"], found["codes"])

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


def empty_corpus(inputs: Sequence[Path | str]) -> DataError:
    """Say that the input holds nothing."""
    names = ", ".join(map(str, inputs))
    return DataError(
        f"--input {names} holds no documents; give files with lines like "
        '{"text": "..."} or {"messages": [...]}.'
    )


def check_sources(plan: Mapping[str, Any], found: Iterable[str]) -> None:
    """Raise DataError for an empty corpus or a held-out source that is not there."""
    names = sorted(found)
    if not names:
        raise empty_corpus([entry["path"] for entry in plan["inputs"]])
    unknown = sorted(set(plan["valid_sources"]) - set(names))
    if unknown:
        raise DataError(
            f"--valid-sources names {unknown[0]}, which the input does not hold; accepted are "
            f"{', '.join(names)}."
        )


def share_warnings(
    plan: Mapping[str, Any], outputs_by_source: Mapping[str, Iterable[str]]
) -> list[str]:
    """Say which sources the seeded shares left without training or held-out documents."""
    warnings = []
    share = plan["valid_share"]
    for source, outputs in sorted(outputs_by_source.items()):
        if share and not set(outputs) - {source}:
            warnings.append(
                f"No document of {source} was drawn for --valid-share {share:g}; "
                "raise the share or change --seed."
            )
        if source not in outputs and source not in plan["valid_sources"]:
            warnings.append(
                f"All documents of {source} were drawn for --valid-share {share:g}; "
                "lower the share or change --seed."
            )
    return warnings


def silent_warnings(units: Iterable[Unit]) -> list[str]:
    """Say which dialogues would train nothing where only assistant turns carry LM loss."""
    sources = [entry for unit in units for entry in unit.facts["sources"].items()]
    dialogues = {source for source, found in sources if found["mode"] == 2}
    silent = sorted(dialogues - {s for s, found in sources if found["trains_assistant"]})
    return silent and [
        f"No dialogue of {', '.join(silent)} has an assistant turn that is trained, so "
        "mix.mode2_lm_loss=assistant would train no token there; check the roles, `weight` and "
        "`train` of the turns, or train with mix.mode2_lm_loss=all."
    ]
