"""Hold sources to their plans over time: shares follow weights, onsets, limits and what then."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from megatron_mode.config.mix import MixConfig, SourceConfig
from megatron_mode.errors import DataError
from megatron_mode.mix.apportion import weight_points
from megatron_mode.mix.audit.forecast import milestones, warnings
from megatron_mode.mix.order import Order

T, TOTAL = 8, 6000
SIZES = {"a": 900, "b": 900, "c": 900, "d": 900, "chat": 900}


def order_of(*sources: dict[str, Any], start: str = "0.25") -> Order:
    mix = {
        "mode1": {"sources": list(sources)},
        "mode2": {"sources": [{"name": "chat"}]},
        "mode2_fraction": {"start": Decimal(start)},
    }
    return Order(MixConfig.model_validate(mix), T, TOTAL, 3, SIZES)


def test_shares_follow_the_weights_through_ramps() -> None:
    """Counts in windows of the run equal the integral of weight over weights, to a row each."""
    order = order_of(
        {"name": "a"},
        {"name": "b", "onset_tokens": 8000, "ramp_tokens": 16000, "weight": 6},
        {"name": "c"},
        {"name": "d", "weight_points": [[0, 4], [40000, 0.5]]},
    )
    rows = order.rows(0, TOTAL)

    def weights(tokens: float) -> np.ndarray:
        b = 6 * min(max((tokens - 8000) / 16000, 0), 1)
        d = 4 - 3.5 * min(tokens / 40000, 1)
        return np.array([1, b, 1, d])

    shares = np.array([weights((i + 0.5) * T) / weights((i + 0.5) * T).sum() for i in range(TOTAL)])
    plan = 0.75 * np.cumsum(shares, axis=0)
    taken = np.stack([np.cumsum(rows.source == s) for s in range(4)], axis=1)
    # A row for the mode, one for each level, and 32 pieces of each ramp: shares err by thousandths.
    assert np.abs(plan - taken).max() < 5
    assert abs(int(taken[-1, 0]) - int(taken[-1, 2])) <= 1  # equal weights, equal rows
    for row in (0, 2000, 5999):
        middle = weights((row + 0.5) * T) / weights((row + 0.5) * T).sum()
        np.testing.assert_allclose(order.planned_shares(row)[:4], middle, atol=0.01)


def test_a_source_begins_at_its_onset() -> None:
    order = order_of({"name": "a"}, {"name": "b", "onset_tokens": 12_345})
    rows = order.rows(0, TOTAL)
    first = int(rows.row[rows.source == 1][0])
    assert 12_345 / T <= first <= 12_345 / T + 4
    (onset,) = milestones(order)[:1]
    assert (onset.source, onset.row, onset.what) == (1, first, "onset")


def test_what_happens_when_a_source_runs_dry() -> None:
    """400 rows within epochs_max, some 2,250 wanted: shared, repeated, refused."""
    limited = {"name": "a", "epochs_max": 0.5}
    shared = order_of(limited, {"name": "b"})
    assert shared.rows_of_source(0) == 450
    assert any("runs dry after epochs_max 0.5" in text for text in warnings(shared))
    repeated = order_of({**limited, "when_dry": "repeat"}, {"name": "b"})
    assert repeated.rows_of_source(0) == 2250
    rows = repeated.rows(0, TOTAL)
    over = next(m for m in milestones(repeated) if m.what == "over")
    assert over.row == int(rows.row[rows.source == 0][450])
    assert "repeats, as its when_dry says" in over.sentence
    with pytest.raises(DataError, match=r"'a' in mix\.mode1\.sources runs dry.*when_dry is error"):
        order_of({**limited, "when_dry": "error"}, {"name": "b"})
    order_of({"name": "a", "epochs_max": 2.5, "when_dry": "error"}, {"name": "b"})


def test_points_of_a_ramp() -> None:
    plan = SourceConfig.model_validate({"name": "a", "onset_tokens": 64, "ramp_tokens": 640})
    points = weight_points(plan)
    assert points[0] == (64, 0)
    assert points[-1] == (704, 1)
    assert len(points) == 33
    assert all(weight * 640 == at - 64 for at, weight in points)
    jump = SourceConfig.model_validate({"name": "a", "onset_tokens": 64})
    assert weight_points(jump) == [(64, 0), (64, 1)]


@pytest.mark.parametrize(("weight", "most"), [(1, 0.0003), (10, 0.017)])
def test_how_far_a_ramp_is_from_weight_over_weights(weight: int, most: float) -> None:
    plan = {"name": "a", "ramp_tokens": 1_000_000, "weight": weight}
    points = weight_points(SourceConfig.model_validate(plan))
    at = np.linspace(0, 1_000_000, 100_001)
    knots = np.array([tokens for tokens, _ in points])
    weights = np.array([float(value) for _, value in points])
    share = np.interp(at, knots, weights / (weights + 1))
    exact = weight * at / 1e6 / (weight * at / 1e6 + 1)
    assert 0.5 * most < np.abs(share - exact).max() <= most
