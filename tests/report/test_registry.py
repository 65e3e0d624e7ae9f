from __future__ import annotations

from pathlib import Path

from megatron_mode.config.describe import renew_table
from megatron_mode.report.registry import CHARTS, METRICS, metrics_table

PAGE = Path(__file__).resolve().parents[2] / "docs/look-at-a-model.md"


def test_the_table_of_metrics_is_up_to_date():
    text = PAGE.read_text("utf-8")
    assert renew_table(text, "metrics", metrics_table()) == text, "run `make docs`"
    assert all(f"\n| `{key}` |" in text for key in METRICS)


def test_every_chart_has_a_curve_and_every_curve_a_label():
    drawn = [metric for metric in METRICS.values() if metric.chart]
    assert {metric.chart for metric in drawn} == set(CHARTS)
    assert all(metric.label for metric in drawn)
    labels = [(metric.chart, metric.label) for metric in drawn]
    assert len(labels) == len(set(labels))
