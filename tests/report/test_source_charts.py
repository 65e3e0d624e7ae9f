"""The charts by source show what was taken beside the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mode.report.charts import WINDOWS, charts, in_windows
from megatron_mode.report.run_folder import read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write 100 steps of 8 rows of which `web` takes 6 in the first half, then 2."""
    lines = []
    for step in range(1, 101):
        web = 6 if step <= 50 else 2
        lines.append(
            {
                "step": step,
                "tokens_seen": step * 800,
                "loss": 1.0,
                "rows_by_source": {"web": web, "chat": 8 - web},
                "planned_rows_by_source": {"web": web + 0.1, "chat": 7.9 - web},
                "lm_loss_by_source": {"web": 5 - step / 50, "chat": None if step == 1 else 4.0},
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def test_shares_are_counts_over_windows(run: Path) -> None:
    folder = read_run(run, "run")
    points = in_windows(folder, "rows_by_source/web")
    assert len(points) == WINDOWS
    assert [share for _, share in points[:11]] == [0.75] * 11
    assert [share for _, share in points[-11:]] == [0.25] * 11
    planned = in_windows(folder, "planned_rows_by_source/web")
    assert planned[0][1] == pytest.approx(6.1 / 8)


def test_two_charts_without_held_out_losses(run: Path) -> None:
    figures = charts([read_run(run, "run")])
    assert [figure.title for figure in figures] == [
        "Share of rows by source",
        "Training LM loss by source",
    ]
    for figure in figures:  # the legend names a source once, also beside its plan
        assert [entry.label for entry in figure.legend] == ["web", "chat"]
    assert len(figures[0].lines) == 4
