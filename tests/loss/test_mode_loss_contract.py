"""Hold the op to its contract: zero weights, NaN rows, layouts, upstream gradients, errors."""

from dataclasses import replace

import pytest
import torch

from megatron_mode.kernels.mode_loss import Blocking, Targets, mode_loss


def weighted(case, lm=None, mode=None):
    targets = case.targets
    if lm is not None:
        targets = replace(targets, lm_weight_BT=lm)
    if mode is not None:
        targets = replace(targets, mode_weight_BT=mode)
    return replace(case, targets=targets)


def test_all_weights_zero_keep_the_graph(make_case, run_case, implementation):
    leaves = make_case(9, 4, 10, mask="all").leaves()
    output = run_case(leaves, implementation=implementation)
    assert output.lm_sum.item() == 0
    assert output.mode_sum.item() == 0
    (output.lm_sum + output.mode_sum).backward()
    for value in leaves.parameters:
        assert not value.grad.any()
    for per_token in (output.nll_BT, output.bce_BT, output.mode_logit_BT, output.blocked_BT):
        assert not per_token.any()
        assert not per_token.requires_grad


def test_lm_masked_but_mode_trained_and_the_reverse(make_case, run_case, implementation):
    half = (torch.arange(20) < 10).float()
    case = weighted(make_case(20, 4, 10, mask="none"), lm=half, mode=1 - half).leaves()
    output = run_case(case, implementation=implementation)
    assert (output.nll_BT != 0).tolist() == half.bool().tolist()
    assert (output.bce_BT != 0).tolist() == (1 - half).bool().tolist()
    (gradient_ND,) = torch.autograd.grad(output.lm_sum, case.hidden_ND, retain_graph=True)
    assert gradient_ND.any(1).tolist() == half.bool().tolist()
    (gradient_ND,) = torch.autograd.grad(output.mode_sum, case.hidden_ND)
    assert gradient_ND.any(1).tolist() == (1 - half).bool().tolist()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_row_without_weight_leaves_no_trace(poison, make_case, run_case, implementation):
    weight = torch.ones(12)
    weight[5] = 0
    clean = weighted(make_case(12, 4, 10, mask="none"), lm=weight, mode=weight).leaves()
    dirty = clean.leaves()
    with torch.no_grad():
        dirty.hidden_ND[5] = poison
        dirty.targets.target_BT[5] = -100
    outputs = []
    for case in (clean, dirty):
        output = run_case(case, implementation=implementation)
        (output.lm_sum + output.mode_sum).backward()
        outputs.append(output)
    for name in ("lm_sum", "mode_sum", "nll_BT", "bce_BT", "mode_logit_BT"):
        assert torch.equal(getattr(outputs[0], name), getattr(outputs[1], name)), name
    for expected, value in zip(clean.parameters, dirty.parameters, strict=True):
        assert torch.equal(expected.grad, value.grad)


def test_a_poisoned_row_with_weight_spoils_only_itself(make_case, run_case, implementation):
    clean = make_case(12, 4, 10, mask="none").leaves()
    dirty = clean.leaves()
    with torch.no_grad():
        dirty.hidden_ND[5] = float("nan")
    others = torch.arange(12) != 5
    results = []
    for case in (clean, dirty):
        output = run_case(case, implementation=implementation)
        (output.lm_sum + output.mode_sum).backward()
        results.append((output.nll_BT, output.bce_BT, output.mode_logit_BT, case.hidden_ND.grad))
    for expected, value in zip(*results, strict=True):
        assert torch.equal(expected[others], value[others])
        assert value[5].isnan().all()


@pytest.mark.parametrize("order", ["TBD", "BTD", "strided"])
def test_three_dimensional_hidden_states_in_any_order(order, make_case, run_case, implementation):
    rows, length = 3, 5
    case = make_case(rows * length, 4, 10)
    flat = case.leaves()
    expected = run_case(flat, implementation=implementation)
    (expected.lm_sum + expected.mode_sum).backward()
    hidden_BTD = case.hidden_ND.view(rows, length, 4).clone()
    if order == "TBD":
        leaf = hidden_BTD.transpose(0, 1).contiguous().requires_grad_()
        hidden_TBD, gradient_of = leaf, lambda: leaf.grad.transpose(0, 1)
    elif order == "BTD":
        leaf = hidden_BTD.requires_grad_()
        hidden_TBD, gradient_of = leaf.transpose(0, 1), lambda: leaf.grad
    else:
        leaf = torch.stack([hidden_BTD, hidden_BTD], dim=-1).requires_grad_()
        hidden_TBD, gradient_of = leaf[..., 0].transpose(0, 1), lambda: leaf.grad[..., 0]
    grid = Targets(
        *(
            getattr(case.targets, name).view(rows, length)
            for name in ("target_BT", "lm_weight_BT", "mode_label_BT", "mode_weight_BT")
        )
    )
    output = mode_loss(
        hidden_TBD, *case.leaves().parameters[1:], grid, implementation=implementation
    )
    (output.lm_sum + output.mode_sum).backward()
    assert torch.allclose(output.nll_BT.reshape(-1), expected.nll_BT, rtol=1e-6, atol=1e-6)
    assert torch.allclose(output.mode_logit_BT.reshape(-1), expected.mode_logit_BT, atol=1e-6)
    gradient_ND = gradient_of().reshape(-1, 4)
    assert torch.allclose(gradient_ND, flat.hidden_ND.grad, rtol=1e-5, atol=1e-6)


def strided(value):
    """Return the value as every second element of a longer tensor."""
    return torch.stack([value, torch.full_like(value, 3)], dim=1).reshape(-1)[::2]


def test_targets_of_any_stride(make_case, run_case, implementation):
    case = make_case(15, 4, 10, mask="none")
    one = torch.ones(())
    targets = replace(case.targets, mode_weight_BT=torch.ones(15))
    apart = Targets(
        strided(targets.target_BT),
        strided(targets.lm_weight_BT),
        strided(targets.mode_label_BT),
        one.expand(15),
    )
    results = []
    for given in (targets, apart):
        leaves = replace(case, targets=given).leaves()
        output = run_case(leaves, implementation=implementation)
        (output.lm_sum + output.mode_sum).backward()
        results.append([output.lm_sum, output.mode_sum, *(v.grad for v in leaves.parameters)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("lm_up", "mode_up"), [(-2.0, 3.0), (0.0, 0.0), (1e30, -1e30), (1e-30, 1.0)]
)
def test_upstream_gradients_scale_each_sum(
    lm_up, mode_up, make_case, run_case, truth_of, relative_error, implementation
):
    case = make_case(30, 8, 20)
    leaves = case.leaves()
    output = run_case(leaves, implementation=implementation)
    torch.autograd.backward(
        (output.lm_sum, output.mode_sum), (torch.tensor(lm_up), torch.tensor(mode_up))
    )
    for value, expected in zip(
        leaves.parameters, truth_of(case, lm_up, mode_up).gradients, strict=True
    ):
        assert relative_error(value.grad, expected) <= 2e-6


def test_an_upstream_gradient_that_is_a_view(make_case, run_case, implementation):
    case = make_case(30, 8, 20)
    plain, viewed = case.leaves(), case.leaves()
    output = run_case(plain, implementation=implementation)
    (2 * output.lm_sum - 3 * output.mode_sum).backward()
    output = run_case(viewed, implementation=implementation)
    # Their gradients are strided elements of one tensor.
    weight = torch.tensor([[2.0, 5.0], [-3.0, 5.0]])[:, 0]
    (torch.stack([output.lm_sum, output.mode_sum]) * weight).sum().backward()
    for value, expected in zip(viewed.parameters, plain.parameters, strict=True):
        assert torch.equal(value.grad, expected.grad)


def test_a_mode_logit_equal_to_the_threshold_is_not_blocked(implementation):
    threshold = torch.tensor(1.25)
    above = torch.nextafter(threshold, torch.tensor(9.0))
    hidden_ND = torch.stack([threshold, above, -threshold, -above])[:, None]
    one_N = torch.ones(4)
    targets = Targets(one_N.long(), one_N, torch.tensor([0.0, 0.0, 1.0, 1.0]), one_N)
    for lm, mode in ((True, False), (False, True), (True, True)):
        blocking = Blocking(1.25, watch_mode1=True, watch_mode2=True, cap=(1, 1), lm=lm, mode=mode)
        output = mode_loss(
            hidden_ND,
            torch.ones(2, 1),
            torch.ones(1),
            torch.zeros(1),
            targets,
            blocking=blocking,
            implementation=implementation,
        )
        assert output.blocked_BT.tolist() == [False, True, False, True]
        assert (output.nll_BT == 0).tolist() == [False, lm, False, lm]
        assert (output.bce_BT == 0).tolist() == [False, mode, False, mode]


def test_only_one_of_the_sums_is_used(
    make_case, run_case, truth_of, relative_error, implementation
):
    case = make_case(30, 8, 20)
    for used, ups in (("lm_sum", (1.0, 0.0)), ("mode_sum", (0.0, 1.0))):
        leaves = case.leaves()
        getattr(run_case(leaves, implementation=implementation), used).backward()
        for value, expected in zip(leaves.parameters, truth_of(case, *ups).gradients, strict=True):
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            assert relative_error(gradient, expected) <= 2e-6


def test_second_backward_gives_the_same_and_accumulates(make_case, run_case, implementation):
    leaves = make_case(30, 8, 20).leaves()
    output = run_case(leaves, implementation=implementation)
    loss = 0.5 * output.lm_sum + output.mode_sum
    first = torch.autograd.grad(loss, leaves.parameters, retain_graph=True)
    second = torch.autograd.grad(loss, leaves.parameters, retain_graph=True)
    loss.backward()
    for value, one, two in zip(leaves.parameters, first, second, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, value.grad)


@pytest.mark.parametrize("frozen", range(16))
def test_frozen_inputs_get_no_gradient_and_change_no_other(
    frozen, make_case, run_case, implementation
):
    needs = tuple(bool(frozen >> bit & 1) for bit in range(4))
    case = make_case(30, 8, 20)
    whole, part = case.leaves(), case.leaves(needs)
    output = run_case(whole, implementation=implementation)
    (output.lm_sum + output.mode_sum).backward()
    partial = run_case(part, implementation=implementation)
    assert torch.equal(output.lm_sum, partial.lm_sum)
    if any(needs):
        (partial.lm_sum + partial.mode_sum).backward()
    for need, expected, value in zip(needs, whole.parameters, part.parameters, strict=True):
        assert torch.equal(value.grad, expected.grad) if need else value.grad is None


def test_without_grad_mode_only_values_are_computed(make_case, run_case, implementation):
    leaves = make_case(30, 8, 20).leaves()
    expected = run_case(leaves, implementation=implementation)
    with torch.no_grad():
        output = run_case(leaves, implementation=implementation)
    assert torch.equal(output.lm_sum, expected.lm_sum)
    assert not output.lm_sum.requires_grad
    assert torch.equal(output.nll_BT, expected.nll_BT)


def test_inputs_are_not_mutated_and_runs_repeat_bitwise(
    make_case, run_case, small_pieces, implementation
):
    case = make_case(100, 8, 20)
    gradients = []
    for _ in range(2):
        leaves = case.leaves()
        with small_pieces(4 * 20 * 30):
            output = run_case(leaves, implementation=implementation)
        (output.lm_sum + output.mode_sum).backward()
        gradients.append([value.grad for value in leaves.parameters])
        for value, given in zip(leaves.parameters, case.parameters, strict=True):
            assert torch.equal(value, given)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_int32_targets_and_autocast(make_case, run_case, implementation):
    case = make_case(30, 8, 20)
    short = replace(case.targets, target_BT=case.targets.target_BT.int())
    expected = run_case(case, implementation=implementation)
    given = run_case(replace(case, targets=short), implementation=implementation)
    assert torch.equal(given.lm_sum, expected.lm_sum)
    leaves = case.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run_case(leaves, implementation=implementation)
    output.lm_sum.backward()
    assert leaves.lm_weight_VD.grad.dtype == torch.float32
    assert output.lm_sum.item() == pytest.approx(expected.lm_sum.item(), rel=1e-2)
