from __future__ import annotations

from megatron_mode.report.metrics import token_metrics, token_sums
from megatron_mode.report.registry import CHARTS, METRICS


def test_the_table_of_metrics_is_up_to_date(tables):
    page, text = tables.renewed("metrics")
    assert page.read_text("utf-8") == text, "run `make docs`"
    assert all(f"\n| `{key}` |" in text for key in METRICS)


def test_every_chart_has_a_curve_and_every_curve_a_label():
    drawn = [metric for metric in METRICS.values() if metric.chart]
    assert {metric.chart for metric in drawn} == set(CHARTS)
    assert all(metric.label for metric in drawn)
    labels = [(metric.chart, metric.label) for metric in drawn]
    assert len(labels) == len(set(labels))


def test_every_figure_of_tokens_has_an_entry():
    assert token_metrics(token_sums([])).keys() <= METRICS.keys()
