"""Judge the blocking policy against a loop over tokens that follows the specification's words."""

import itertools
import math
from dataclasses import replace
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.config.fields import BlockingConfig, LossConfig
from megatron_mode.kernels.mode_loss.mode_terms import blocked_tokens
from megatron_mode.kernels.mode_loss.tokens import TokenGrid, TokenTargets
from megatron_mode.loss.blocking import blocking_of
from megatron_mode.loss.mode_loss import ModeLoss

POLICIES = ("none", "mode", "lm", "both")
DIRECTIONS = ("mode1_as_mode2", "mode2_as_mode1", "both")


def expected_row(logits, labels, weights, config):
    """Block one row, a token at a time."""
    threshold = torch.tensor(math.log(config.tau / (1 - config.tau))).item()
    candidates = []
    for position, (logit, label, weight) in enumerate(zip(logits, labels, weights, strict=True)):
        mode2 = label >= 0.5
        asked = config.direction in ("both", "mode2_as_mode1" if mode2 else "mode1_as_mode2")
        wrong = -logit if mode2 else logit
        if weight > 0 and asked and wrong > threshold:
            candidates.append((-(wrong - threshold), position))
    valid = sum(weight > 0 for weight in weights)
    allowed = int(Decimal(str(config.cap)) * valid)
    chosen = {position for _, position in sorted(candidates)[:allowed]}
    return [position in chosen for position in range(len(logits))]


def mask_in_rows(logit_BT, label_BT, weight_BT, rule):
    grid = TokenGrid(tuple(logit_BT.shape), rows_first=True)
    label_N, weight_N = label_BT.reshape(-1), weight_BT.reshape(-1)
    targets = TokenTargets(torch.zeros_like(label_N).long(), weight_N, label_N, weight_N, None)
    return grid.unflatten(blocked_tokens(logit_BT.reshape(-1), targets, rule, grid))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 3).flatmap(
        lambda length: st.lists(
            st.lists(
                st.tuples(
                    st.sampled_from((-9.0, -3.0, -2.0, 0.0, 2.0, 2.5, 3.0, 9.0)),
                    st.sampled_from((0.0, 0.25, 0.5, 1.0)),
                    st.sampled_from((0.0, 0.5, 1.0)),
                ),
                min_size=4 * length,
                max_size=4 * length,
            ),
            min_size=1,
            max_size=3,
        )
    ),
    direction=st.sampled_from(DIRECTIONS),
    tau=st.sampled_from((0.6, 0.9, 0.95)),
    cap=st.sampled_from((0.0, 0.1, 0.25, 0.5, 1.0)),
)
def test_mask_is_what_the_words_say(rows, direction, tau, cap):
    config = BlockingConfig(policy="both", direction=direction, tau=tau, cap=cap)
    mask_BT = mask_in_rows(*torch.tensor(rows).unbind(-1), blocking_of(config, active=True))
    expected = [expected_row(*zip(*row, strict=True), config) for row in rows]
    assert mask_BT.tolist() == expected


def mask_of(logits, labels, weights=None, **options):
    weights = [1.0] * len(logits) if weights is None else weights
    rule = blocking_of(BlockingConfig(policy="both", **options), active=True)
    return mask_in_rows(*map(torch.tensor, (logits, labels, weights)), rule).tolist()


def test_a_logit_equal_to_the_threshold_is_not_blocked():
    threshold = torch.tensor(math.log(0.9) - math.log1p(-0.9))
    above = torch.nextafter(threshold, torch.tensor(9.0))
    logits = [threshold.item(), above.item(), -threshold.item(), -above.item()]
    mask = mask_of(logits, [0.0, 0.0, 1.0, 1.0], direction="both", tau=0.9, cap=1.0)
    assert mask == [False, True, False, True]


def test_the_cap_keeps_the_largest_excess_and_the_lower_position():
    mask = mask_of([5.0, 7.0, 5.0, 5.0, 6.0, 0.0], [0.0] * 6, cap=0.5)
    assert mask == [True, True, False, False, True, False]


def test_the_cap_counts_valid_tokens_exactly():
    # 0.29 * 100 is 28.999999999999996 in floats.
    assert sum(mask_of([9.0] * 100, [0.0] * 100, cap=0.29)) == 29
    assert sum(mask_of([9.0] * 100, [0.0] * 100, [1.0] * 10 + [0.0] * 90, cap=0.29)) == 2
    assert mask_of([9.0] * 3, [0.0] * 3, cap=1.0) == [True] * 3
    assert mask_of([9.0] * 3, [0.0] * 3, cap=0.0) == [False] * 3


def test_nan_logits_and_an_empty_row_block_nothing():
    assert mask_of([math.nan, 9.0], [0.0, 0.0], cap=1.0) == [False, True]
    assert mask_of([], [], cap=1.0) == []


@pytest.mark.parametrize(("policy", "direction"), list(itertools.product(POLICIES, DIRECTIONS)))
def test_a_blocked_token_loses_the_loss_that_the_policy_names(
    policy, direction, make_case, truth_of, relative_error, implementation
):
    case = make_case(40, 8, 30, padded_size=32)
    blocking = BlockingConfig(policy=policy, direction=direction, tau=0.7, cap=0.5)
    config = LossConfig(implementation=implementation, blocking=blocking)
    leaves = case.leaves()
    output = ModeLoss(config, 30)(*leaves.parameters, leaves.targets)
    (output.lm_sum + output.mode_sum).backward()

    targets = case.targets
    mask = torch.tensor(
        expected_row(
            truth_of(case).logit_N.tolist(),
            targets.mode_label_BT.tolist(),
            targets.mode_weight_BT.tolist(),
            blocking,
        )
    )
    assert mask.any()
    mask &= policy != "none"
    effective = replace(
        targets,
        lm_weight_BT=targets.lm_weight_BT * ~(mask & (policy in ("lm", "both"))),
        mode_weight_BT=targets.mode_weight_BT * ~(mask & (policy in ("mode", "both"))),
    )
    truth = truth_of(replace(case, targets=effective))
    assert torch.equal(output.blocked_BT, mask)
    assert relative_error(output.nll_BT, truth.nll_N) < 2e-6
    assert relative_error(output.bce_BT, truth.bce_N) < 2e-6
    assert relative_error(output.mode_logit_BT, truth_of(case).logit_N) < 2e-6
    for value, expected in zip(leaves.parameters, truth.gradients, strict=True):
        assert relative_error(value.grad, expected) < 4e-6


def test_all_tokens_blocked_leave_zero_and_the_graph(make_case, implementation):
    case = make_case(20, 8, 30, mask="none")
    targets = replace(case.targets, mode_label_BT=torch.zeros(20))
    leaves = case.leaves()
    with torch.no_grad():
        leaves.mode_bias.fill_(100.0)
    blocking = BlockingConfig(policy="both", cap=1.0)
    loss = ModeLoss(LossConfig(implementation=implementation, blocking=blocking), 30)
    output = loss(*leaves.parameters, targets)
    (output.lm_sum + output.mode_sum).backward()
    assert output.blocked_BT.all()
    assert output.lm_sum == 0
    assert output.mode_sum == 0
    assert all(not value.grad.any() for value in leaves.parameters)
    warming_up = loss(*leaves.parameters, targets, blocking_active=False)
    assert not warming_up.blocked_BT.any()
    assert warming_up.lm_sum > 0


def test_no_policy_and_warm_up_cost_nothing():
    assert blocking_of(BlockingConfig(), active=True) is None
    assert blocking_of(BlockingConfig(policy="lm"), active=False) is None
