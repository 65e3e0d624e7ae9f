"""Steps that were left out are part of a run's past: replayed, and not to be changed."""

from __future__ import annotations

import dataclasses

import pytest
from smallest import MODEL

from megatron_mode.checkpoint.manifest import Manifest
from megatron_mode.checkpoint.order_record import OrderRecord
from megatron_mode.checkpoint.replay import replay
from megatron_mode.checkpoint.resumable import check_resumable
from megatron_mode.config import Config
from megatron_mode.errors import CheckpointError
from megatron_mode.mix.order import Order

GLOBAL_ROWS, STEPS = 4, 12


def config_with(**health):
    return Config.model_validate(
        {
            "run": {"steps": STEPS},
            "model": MODEL,
            "mix": {
                "mode1": {"sources": [{"name": "web"}]},
                "mode2": {"sources": [{"name": "chat"}]},
                "mode2_fraction": {"start": "0.4"},
            },
            "health": health,
        }
    )


@pytest.fixture
def order():
    config = config_with()
    return Order(config.mix, 16, STEPS * GLOBAL_ROWS, 3, {"web": 40, "chat": 30})


def manifests(order, skips, steps):
    """Return what a run that left these steps out says after each of `steps`."""
    record, found = OrderRecord({}), []
    for step in range(max(steps)):
        rows = order.rows(step * GLOBAL_ROWS, (step + 1) * GLOBAL_ROWS)
        record.update(step, rows, left_out=step in skips)
        if step + 1 in steps:
            found.append(
                Manifest(
                    step=step + 1,
                    tokens_seen=0,
                    config=config_with().model_dump(mode="json"),
                    layout={},
                    precision="fp32",
                    order={},
                    order_digest=record.digest.hex,
                    recent_digests=list(record.recent),
                    blocked_shares=(0.0, 0.0),
                    versions={},
                    probe={},
                    skips=list(record.skips),
                )
            )
    return found


def test_a_replay_knows_what_was_left_out(order):
    found = manifests(order, {1, 5, 6}, (3, 6, 10))
    assert [manifest.skips for manifest in found] == [[1], [1, 5], [1, 5, 6]]
    assert replay(order, GLOBAL_ROWS, found, lambda n: None) == found[-1].order_digest
    for wrong in ([1, 5], [1, 6], [1, 5, 6, 7], []):
        forged = [*found[:2], dataclasses.replace(found[2], skips=wrong)]
        with pytest.raises(CheckpointError, match=r"have digest|not of one run"):
            replay(order, GLOBAL_ROWS, forged, lambda n: None)
    other = manifests(order, {1, 4, 6}, (10,))
    with pytest.raises(CheckpointError, match="left out the updates of steps"):
        replay(order, GLOBAL_ROWS, [*found[:2], *other], lambda n: None)


def test_a_record_is_taken_over_with_what_was_left_out(order):
    (manifest,) = manifests(order, {1, 5, 6}, (9,))
    record = OrderRecord({})
    record.restore(manifest, order, GLOBAL_ROWS)
    assert record.skips == [1, 5, 6]
    assert record.digest.hex == manifest.order_digest
    with pytest.raises(CheckpointError, match="rows of step 6 are not those"):
        OrderRecord({}).restore(dataclasses.replace(manifest, skips=[1, 6]), order, GLOBAL_ROWS)


def test_a_step_that_is_taken_cannot_be_left_out_any_more(order):
    (manifest,) = manifests(order, {1}, (6,))
    check_resumable(manifest, config_with(leave_out_steps=[1, 6, 9]), "fp32", {})
    check_resumable(manifest, config_with(non_finite="skip", stall_seconds=5.0), "fp32", {})
    with pytest.raises(CheckpointError, match="leave_out_steps names step 4, whose update is"):
        check_resumable(manifest, config_with(leave_out_steps=[1, 4]), "fp32", {})
