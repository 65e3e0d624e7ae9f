"""`loss.blocking.renormalise` follows the steps that were applied, logged or not."""

from __future__ import annotations

import blocking_rank
import gloo_world
import pytest


@pytest.mark.distributed
def test_shares_come_from_the_step_and_not_from_its_log():
    """Two data ranks, two micro-batches each; the second of three steps is left out."""
    ranks = gloo_world.run_world(2, blocking_rank.train_unlogged, (1, 1, 2), (1,))
    shares = [(0.0, 0.0)]
    for step in range(3):
        lm, lm_blocked, mode, mode_blocked = sum(rank[step][0] for rank in ranks)
        expected = (lm_blocked / lm, mode_blocked / mode)
        shares.append(shares[-1] if step == 1 else expected)
        assert all(0.02 < share < 0.98 for share in expected), "blocking takes some tokens"
        before = shares[step]
        for rank in ranks:
            _, found, scales = rank[step]
            assert (found.lm, found.mode) == shares[-1]
            assert scales.lm == pytest.approx(4 / (lm * (1 - before[0])), rel=1e-12)
            assert scales.mode == pytest.approx(0.3 * 4 / (mode * (1 - before[1])), rel=1e-12)
    assert shares[1] != shares[3]
