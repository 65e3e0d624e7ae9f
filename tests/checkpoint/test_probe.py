"""A probe has to agree to the last bit under the same conditions, closely under others."""

from __future__ import annotations

import math

import pytest

from megatron_mode.checkpoint.probe import check_probe
from megatron_mode.errors import CheckpointError

HERE = {"layout": {"tensor": 2, "pipeline": 1, "data": 1}, "threads": 1}


def probe(lm_loss, mode_loss=0.7, conditions=HERE):
    return {"lm_loss": lm_loss, "mode_loss": mode_loss, "conditions": conditions}


def test_the_same_machine_has_to_give_the_same_bits():
    check_probe(probe(5.0), probe(5.0), "fp32", "step-3", exact=True)
    with pytest.raises(CheckpointError, match=r"step-3 is loaded, .*lm_loss 5\.0000000000000"):
        check_probe(probe(5.0), probe(math.nextafter(5.0, 6)), "fp32", "step-3", exact=True)
    with pytest.raises(CheckpointError, match="mode_loss"):
        check_probe(probe(5.0), probe(5.0, 0.7000001), "fp32", "step-3", exact=True)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_another_layout_may_differ_by_the_stated_share(precision, bound):
    near = probe(5.0 * (1 + 0.9 * bound))
    far = probe(5.0 * (1 + 1.1 * bound))
    check_probe(probe(5.0), near, precision, "step-3", exact=False)
    with pytest.raises(CheckpointError, match=f"they must agree to {bound:g} of it"):
        check_probe(probe(5.0), far, precision, "step-3", exact=False)


def test_nan_agrees_only_with_a_model_that_was_saved_so():
    for exact in (True, False):
        with pytest.raises(CheckpointError, match="lm_loss nan"):
            check_probe(probe(5.0), probe(math.nan), "fp32", "step-3", exact=exact)
    check_probe(probe(math.nan), probe(math.nan), "fp32", "step-3", exact=True)
