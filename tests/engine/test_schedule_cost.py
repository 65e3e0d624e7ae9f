"""The clock agrees with closed forms, a search over dependencies, and a hand-drawn plan."""

from __future__ import annotations

import pytest

from megatron_mode.config import load_config
from megatron_mode.config.presets import find_configs
from megatron_mode.cost.topology import Layout
from megatron_mode.engine.schedule_cost import (
    Message,
    Pass,
    finish_times,
    instructions,
    pipeline_line,
    schedule_cost,
)

SIZES = [(2, 4), (2, 9), (3, 6), (4, 8), (4, 17), (8, 16)]


@pytest.mark.parametrize(("ranks", "micro_batches"), [*SIZES, (1, 3), (4, 2), (8, 1)])
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_1f1b_has_the_bubble_and_memory_of_the_closed_forms(ranks, micro_batches, backward):
    """PipeDream-Flush (Narayanan et al., 2021, section 2.2.1): (p - 1) / m of the ideal time."""
    cost = schedule_cost("1f1b", ranks, micro_batches, 1.0, backward)
    assert cost.bubble_share == pytest.approx((ranks - 1) / (micro_batches + ranks - 1), abs=1e-12)
    assert cost.live_micro_batches == tuple(min(ranks - s, micro_batches) for s in range(ranks))


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_dualpipev_has_the_bubble_and_memory_that_its_authors_state(ranks, micro_batches):
    """DualPipe's table for d devices of two chunks: (d - 1)(F&B + B - 3W), 2d + 1 activations.

    DeepSpeed's engine neither overlaps the passes of F&B, so it takes F + B, nor puts off W, so
    it is 0. Chunks of equal passes leave no other gaps.
    """
    cost = schedule_cost("dualpipev", ranks, micro_batches, 1.0, 1.0)
    chunk = 0.5
    idle = (ranks - 1) * (chunk + 2 * chunk)
    assert cost.bubble_share == pytest.approx(idle / (idle + 2.0 * micro_batches), abs=1e-12)
    assert cost.live_micro_batches == ((2 * ranks + 1) / 2,) * ranks
    plain = schedule_cost("1f1b", ranks, micro_batches, 1.0, 1.0)
    assert cost.bubble_share < plain.bubble_share


def earliest_end(ranks, micro_batches, forward, backward):
    """Return when DualPipeV's passes can end at the earliest, each rank keeping its own order.

    A pass waits for the one before it on its rank and for the same micro-batch in the stage before
    (forward) or after (backward): repeated until nothing moves, without any message.
    """
    orders, last_stage = [], 2 * ranks - 1
    for rank in range(ranks):
        counts = {}
        order = []
        for step in instructions("dualpipev", ranks, micro_batches, rank):
            if step.name in ("ForwardPass", "BackwardPass"):
                stage = rank if step.phase == 0 else last_stage - rank
                key = (step.name[0], stage)
                counts[key] = counts.get(key, -1) + 1
                order.append((*key, counts[key]))
        orders.append(order)
    duration = {"F": forward / 2, "B": backward / 2}
    end = {node: 0.0 for order in orders for node in order}
    moved = True
    while moved:
        moved = False
        for order in orders:
            before = 0.0
            for kind, stage, number in order:
                ready = end.get((kind, stage - 1 if kind == "F" else stage + 1, number), 0.0)
                if kind == "B":
                    ready = max(ready, end["F", stage, number])
                before = max(before, ready) + duration[kind]
                moved |= before > end[kind, stage, number]
                end[kind, stage, number] = before
    return max(end.values())


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_dualpipev_waits_at_least_as_dependencies_ask_and_at_most_as_its_authors_state(
    ranks, micro_batches, backward
):
    cost = schedule_cost("dualpipev", ranks, micro_batches, 1.0, backward)
    work = micro_batches * (1.0 + backward)
    end = work / (1 - cost.bubble_share)
    assert earliest_end(ranks, micro_batches, 1.0, backward) <= end + 1e-9
    assert end <= work + (ranks - 1) * (0.5 + 2 * backward / 2) + 1e-9


def test_an_exchange_ends_when_both_sides_have_come():
    to, back = Message("activation", 0, 1), Message("gradient", 1, 0)
    first = [Pass(3.0, 1), (to,), Pass(1.0, 1), (back,), Pass(2.0, -1)]
    second = [Pass(1.0, 1), (to,), Pass(5.0, -1), (back,)]
    # 0 comes to `to` at 3, then works to 4; 1 works from 3 to 8; 0 continues from 8 to 10.
    assert finish_times([first, second]) == [10.0, 8.0]
    # Launched together, nothing continues before all have arrived.
    assert finish_times([[Pass(1.0, 1), (to, back)], [(to, back), Pass(1.0, 0)]]) == [1.0, 2.0]


def test_a_schedule_that_cannot_end_is_told():
    to, back = Message("activation", 0, 1), Message("gradient", 1, 0)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] wait for each other"):
        finish_times([[(to,), (back,)], [(back,), (to,)]])
    with pytest.raises(RuntimeError, match="rank 1 awaits gradient, 0 sends activation"):
        finish_times([[(to,)], [(Message("gradient", 0, 1),)]])


def test_a_run_says_what_its_pipeline_costs():
    def line(*overrides):
        config = load_config(find_configs() / "run" / "tiny-3d.yaml", list(overrides))
        return pipeline_line(config, Layout(2, 2, 2))

    shape = ("batch.global_rows=32", "batch.micro_rows=4")
    assert line(*shape) == "1f1b, bubble 20.0 %, at most 2 micro-batches in flight"
    # 2 ranks, 4 micro-batches: the pass back takes twice the time, work 12, waiting 2.
    turning = line(*shape, "parallel.schedule=dualpipev")
    assert turning == "dualpipev, bubble 14.3 %, at most 2.5 micro-batches in flight"
    recomputed = line(*shape, "parallel.activation_checkpointing=full")
    assert recomputed == line(*shape), "1F1B's share does not depend on the ratio of the passes"
