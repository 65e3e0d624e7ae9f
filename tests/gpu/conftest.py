"""Collect the figures of `make gpu-check` and print them as one table at the end."""

from __future__ import annotations

import pytest

FIGURES: list[tuple[str, str]] = []


@pytest.fixture
def figure():
    """Return a function that notes (what, figure) for the table."""

    def note(what: str, value: object) -> None:
        FIGURES.append((what, f"{value:.4g}" if isinstance(value, float) else str(value)))

    return note


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        width = max(len(what) for what, _ in FIGURES)
        for what, value in FIGURES:
            terminalreporter.write_line(f"{what:<{width}}  {value}")
