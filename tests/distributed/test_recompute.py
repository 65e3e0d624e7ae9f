"""What activation checkpointing saves, counted in bytes that are alive after a forward pass.

That gradients stay what they are: test_equality.py.
"""

from __future__ import annotations

import equality_rank
import gloo_world
import pytest
import recompute_rank


@pytest.mark.distributed
def test_less_is_kept_the_more_is_computed_again(record_property):
    choices = ("none", "selective", "full")
    (kept,) = gloo_world.run_world(1, recompute_rank.kept_bytes, choices)
    record_property("kept_bytes", kept)
    none, selective, full = (kept[choice] for choice in choices)
    assert none[0] > selective[0] > full[0]
    # Where attention writes its T x T scores out, only `none` keeps them, one for each head.
    model = equality_rank.make_config(1, 1, 1, True, 1, model={"layers": 4}).model
    scores = recompute_rank.SEQ_LEN**2 * 4 * recompute_rank.ROWS * model.attention_heads
    assert none[1] - none[0] >= 0.9 * scores * model.layers
    assert selective[1] == selective[0]
    assert full[1] == full[0]
