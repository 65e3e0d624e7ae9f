"""Render the pages from templates/, which escape every value that they show."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_mode.report.heatmap import LEVELS, Theme, rgb


def render(template: str, **values: object) -> str:
    """Return the page of a template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["levels"] = {"light": _levels("light"), "dark": _levels("dark")}
    return environment.get_template(template).render(values)


def _levels(theme: Theme) -> list[str]:
    """Return the heat map's colours by level, as CSS writes them."""
    return [f"rgb{rgb(level / (LEVELS - 1), theme)}" for level in range(LEVELS)]
