"""The judge against rules written out plainly, on sequences that hypothesis draws."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smallest import MODEL

from megatron_mode.config import Config
from megatron_mode.config.fields import HealthConfig
from megatron_mode.config.rules import find_broken_rules
from megatron_mode.engine.health import APPLY, LEAST_SPREAD, HealthJudge, spike_limit

LOSSES = st.floats(0.0, 50.0)
BAD = st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(LOSSES, min_size=1, max_size=30), st.floats(0.5, 30.0))
def test_the_limit_is_median_and_deviation_by_sorting(losses: list[float], factor: float) -> None:
    def middle(values: list[float]) -> float:
        ordered = sorted(values)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    at = middle(losses)
    spread = middle([abs(loss - at) for loss in losses])
    expected = at + factor * max(spread, LEAST_SPREAD * at)
    assert spike_limit(losses, factor) == pytest.approx(expected, rel=1e-12)


@given(st.lists(LOSSES, min_size=3, max_size=30), st.floats(1.0, 20.0))
def test_the_limit_stays_when_fewer_than_half_of_the_losses_run_away(
    losses: list[float], factor: float
) -> None:
    """One bad step in the window must not hide the next: a mean would move without bound."""
    broken = [*losses, *losses, 1e30]
    assert spike_limit(broken, factor) < 1e4


@given(
    st.lists(st.one_of(LOSSES, BAD), min_size=1, max_size=60),
    st.sampled_from(["skip", "rollback", "stop"]),
    st.sampled_from(["report", "skip", "rollback", "stop"]),
    st.integers(1, 8),
    st.integers(0, 4),
)
@settings(max_examples=300)
def test_verdicts_follow_the_rule(
    losses: list[float], non_finite: str, spike: str, window: int, max_skips: int
) -> None:
    config = HealthConfig.model_validate(
        {
            "non_finite": non_finite,
            "spike": spike,
            "spike_window_steps": window,
            "spike_factor": 3.0,
            "max_skips": max_skips,
            "max_skips_window_steps": 10,
        }
    )
    judge = HealthJudge(config)
    kept: list[float] = []
    skipped: list[int] = []
    for step, loss in enumerate(losses):
        verdict = judge.decide(step, loss, 1.0)
        recent = kept[-window:]
        if not math.isfinite(loss):
            policy = non_finite
            assert verdict.kind == "non_finite_loss"
        elif len(recent) == window and loss > spike_limit(recent, 3.0):
            policy = spike
            assert verdict.kind == "loss_spike"
        else:
            assert verdict == APPLY
            kept.append(loss)
            continue
        if policy == "report":
            assert verdict.action == "apply"
            kept.append(loss)
            continue
        if policy != "stop" and len([s for s in skipped if s > step - 10]) < max_skips:
            assert (verdict.action, verdict.first_left_out) == (policy, step)
            skipped.append(step)
            assert judge.is_left_out(step)
            continue
        assert verdict.action == "stop"
        break
    assert list(judge.losses) == kept[-window:]
    assert judge.chosen == set(skipped)


@given(st.lists(st.one_of(LOSSES, BAD), min_size=2, max_size=40), st.data())
def test_a_restored_judge_resumes_alike(losses: list[float], data: st.DataObject) -> None:
    """What the judge says after a resume, or when its choices are planned, does not change."""
    settings = {"non_finite": "skip", "spike": "skip", "spike_window_steps": 4, "max_skips": 50}
    config = HealthConfig.model_validate(settings)
    judge = HealthJudge(config)
    at = data.draw(st.integers(1, len(losses) - 1))
    for step in range(at):
        judge.decide(step, losses[step], 1.0)
    resumed = HealthJudge(config)
    resumed.restore(list(judge.losses), sorted(judge.chosen))
    rest = [judge.decide(step, losses[step], 1.0) for step in range(at, len(losses))]
    assert rest == [resumed.decide(step, losses[step], 1.0) for step in range(at, len(losses))]
    plan = tuple(sorted(judge.chosen))
    planned = HealthJudge(HealthConfig.model_validate({**settings, "leave_out_steps": plan}))
    actions = [planned.decide(step, loss, 1.0).action for step, loss in enumerate(losses)]
    assert actions == ["skip" if step in plan else "apply" for step in range(len(losses))]
    assert list(planned.losses) == list(judge.losses)
    assert planned.chosen == set(), "a plan does not count against max_skips"


@pytest.mark.parametrize("square", [math.nan, math.inf, 3.5e38])
def test_a_gradient_whose_norm_fp32_cannot_hold_is_not_finite(square: float) -> None:
    judge = HealthJudge(HealthConfig(non_finite="skip"))
    assert judge.decide(0, 2.0, square).kind == "non_finite_gradient"
    assert judge.decide(1, 2.0, 3.4e38) == APPLY


def test_a_rollback_leaves_the_steps_before_out_too() -> None:
    judge = HealthJudge(HealthConfig(non_finite="rollback", rollback_steps=3, max_skips=4))
    verdict = judge.decide(7, math.nan, 1.0)
    assert (verdict.action, verdict.first_left_out) == ("rollback", 5)
    assert judge.chosen == {5, 6, 7}
    assert judge.decide(6, math.nan, math.nan).action == "skip"
    stopped = judge.decide(8, math.nan, 1.0)  # 6, 7, 8 makes four with 5
    assert stopped.action == "rollback"
    assert judge.decide(9, math.nan, 1.0).action == "stop"
    assert "4 updates within 1000 steps" in judge.decide(9, math.nan, 1.0).reason


def test_losses_that_hardly_differ_do_not_make_every_step_a_spike() -> None:
    flat = [2.0] * 8
    assert spike_limit(flat, 12.0) == pytest.approx(2.0 * (1 + 12 * LEAST_SPREAD))
    assert statistics.pstdev(flat) == 0


def test_settings_that_contradict_each_other_are_refused() -> None:
    def broken(**health: object) -> str:
        fields = {
            "run": {"steps": 10},
            "model": MODEL,
            "mix": {"mode2_fraction": {"start": "0"}},
            "health": health,
        }
        config = Config.model_validate(fields)
        found = find_broken_rules(config, lambda key: False)
        return " ".join(sentence for sentence in found if sentence.startswith("health"))

    assert broken(leave_out_steps=[3, 9]) == ""
    for steps in ([10], [4, 3], [3, 3]):
        assert f"health.leave_out_steps is {steps}" in broken(leave_out_steps=steps)
    sentence = broken(spike="rollback", rollback_steps=9, max_skips=8)
    assert "health.rollback_steps is 9; accepted: at most health.max_skips = 8" in sentence
    assert broken(rollback_steps=9, max_skips=8) == ""
