"""Renew the tables of configuration keys and of metrics: `python docs/tables.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_mode.config.describe import describe_accepted, walk_fields
from megatron_mode.config.yaml_text import write_value
from megatron_mode.report.registry import METRICS

ROOT = Path(__file__).resolve().parents[1]


def key_rows() -> Iterator[tuple[str, ...]]:
    """Yield key, what is accepted, default and meaning of every configuration key."""
    yield "key", "accepted", "default", "meaning"
    for key, field in walk_fields():
        default = "required" if field.is_required() else write_value(field.default)
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield (
            f"`{key}`",
            describe_accepted(field.annotation, field.metadata),
            f"`{default}`",
            meaning,
        )


def metric_rows() -> Iterator[tuple[str, ...]]:
    """Yield key, unit, meaning and chart of every metric."""
    yield "key", "unit", "meaning", "chart"
    for metric in METRICS.values():
        chart = metric.chart.title if metric.chart else ""
        yield f"`{metric.key}`", metric.unit, metric.meaning.replace("|", "\\|"), chart


TABLES = {
    "keys": ("configs/README.md", key_rows),
    "metrics": ("docs/look-at-a-model.md", metric_rows),
}


def renewed(name: str) -> tuple[Path, str]:
    """Return the page of a table and its text with the table as it should be."""
    path, rows = TABLES[name]
    page = ROOT / path
    head, *body = rows()
    rule = "|---" * len(head) + "|"
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
    table = "\n".join([lines[0], rule, *lines[1:]])
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text("utf-8").partition(begin)
    return page, f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    for name in TABLES:
        page, text = renewed(name)
        page.write_text(text, "utf-8")
