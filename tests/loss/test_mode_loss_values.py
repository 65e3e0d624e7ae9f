"""Judge values and gradients of the op against fp64 formulas and plain torch's own error."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mode.kernels.mode_loss import chunked, lm_pass
from megatron_mode.kernels.mode_loss.lm_pass import by_columns

VOCABULARIES = (1, 2, 127, 128, 129, 507)
LARGE_VOCABULARY = 50257
HIDDEN_SIZES = (1, 31, 64, 123, 512)
TOKENS = (0, 1, 15, 513)
MASKS = ("none", "some", "all")
EPSILON = {torch.float32: 4e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}
# Triton's interpreter cuts fp32 off where a GPU rounds to bf16; a GPU judges bf16 (tests/gpu).
INTERPRETER_EPSILON = {torch.bfloat16: 2e-2}


def judge(case, implementation, tools, **options):
    """Compare the op to the truth; its error may be twice that of plain torch plus epsilon."""
    run_case, truth_of, plain_sums, relative_error = tools
    epsilon = EPSILON[case.hidden_ND.dtype]
    if implementation == "triton":
        epsilon = INTERPRETER_EPSILON.get(case.hidden_ND.dtype, epsilon)
    truth = truth_of(case, lm_up=0.5, mode_up=-3.0)
    ours, plain = case.leaves(), case.leaves()
    output = run_case(ours, implementation=implementation, **options)
    (0.5 * output.lm_sum - 3.0 * output.mode_sum).backward()
    plain_lm_sum, plain_mode_sum = plain_sums(plain)
    (0.5 * plain_lm_sum - 3.0 * plain_mode_sum).backward()

    for value, reference, expected in (
        (output.lm_sum, plain_lm_sum, truth.lm_sum),
        (output.mode_sum, plain_mode_sum, truth.mode_sum),
    ):
        bound = 2 * relative_error(reference, np.array(expected)) + epsilon
        assert relative_error(value, np.array(expected)) <= bound
    for value, expected in (
        (output.nll_BT, truth.nll_N),
        (output.bce_BT, truth.bce_N),
        (output.mode_logit_BT, truth.logit_N),
    ):
        assert relative_error(value, expected) <= (epsilon if epsilon < 1e-4 else 2e-2)
    for value, reference, expected in zip(
        ours.parameters, plain.parameters, truth.gradients, strict=True
    ):
        assert value.grad.dtype == value.dtype
        bound = 2 * relative_error(reference.grad, expected) + epsilon
        assert relative_error(value.grad, expected) <= bound


@pytest.fixture
def tools(run_case, truth_of, plain_sums, relative_error):
    return run_case, truth_of, plain_sums, relative_error


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_matches_the_formulas_at_every_size(vocab_size, make_case, tools, small_pieces):
    masks = itertools.cycle(MASKS)
    for hidden_size, tokens in itertools.product(HIDDEN_SIZES, TOKENS):
        for mask in MASKS if vocab_size <= 129 or tokens <= 15 else (next(masks),):
            case = make_case(tokens, hidden_size, vocab_size, mask=mask)
            judge(case, "chunked", tools)
            # About five pieces, the last one ragged.
            with small_pieces(4 * vocab_size * max(tokens // 5, 1)):
                judge(case, "chunked", tools)


def large_cases(tokens):
    for hidden_size, count, mask in itertools.product(HIDDEN_SIZES, tokens, MASKS):
        yield count, hidden_size, LARGE_VOCABULARY, mask


def test_matches_the_formulas_at_a_real_vocabulary(make_case, tools):
    for count, hidden_size, vocab_size, mask in large_cases((0, 1)):
        judge(make_case(count, hidden_size, vocab_size, mask=mask), "chunked", tools)
    for hidden_size in (1, 31):
        judge(make_case(15, hidden_size, LARGE_VOCABULARY), "chunked", tools)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_formulas_at_a_real_vocabulary_whole(dtype, make_case, tools):
    for count, hidden_size, vocab_size, mask in large_cases((15, 513)):
        case = make_case(count, hidden_size, vocab_size, mask=mask, dtype=dtype)
        judge(case, "chunked", tools)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_the_walk_over_columns_matches_the_formulas_in_fp32(
    vocab_size, make_case, tools, small_pieces, monkeypatch
):
    """Half precision takes it; fp32 shows that nothing but rounding sets it apart."""
    monkeypatch.setattr(chunked, "lm_pass", by_columns)
    for hidden_size, tokens, mask in itertools.product((1, 64), TOKENS, MASKS):
        case = make_case(tokens, hidden_size, vocab_size, mask=mask)
        judge(case, "chunked", tools)
        with small_pieces(4 * max(tokens, 1) * max(vocab_size // 5, 1)):
            judge(case, "chunked", tools)


@pytest.mark.parametrize("vocab_size", [2, 129, 507])
def test_reference_matches_the_formulas(vocab_size, make_case, tools):
    for hidden_size, tokens, mask in itertools.product((1, 64), TOKENS, MASKS):
        judge(make_case(tokens, hidden_size, vocab_size, mask=mask), "reference", tools)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [2, 129, 507])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_half_precision_is_accumulated_in_fp32(vocab_size, dtype, make_case, tools, implementation):
    for hidden_size, tokens, mask in itertools.product((31, 64), (0, 1, 15, 130), MASKS):
        case = make_case(tokens, hidden_size, vocab_size, mask=mask, dtype=dtype)
        judge(case, implementation, tools)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_half_products_match_the_formulas(dtype, make_case, tools, monkeypatch):
    """A CPU with bf16 instructions, and a GPU, multiply half precision as it is."""
    monkeypatch.setattr(lm_pass, "native_half", lambda matrix: True)
    for tokens, mask in itertools.product((1, 15, 130), MASKS):
        judge(make_case(tokens, 64, 129, mask=mask, dtype=dtype), "chunked", tools)


def test_padded_columns_stay_out_of_the_softmax(make_case, tools, run_case, implementation):
    case = make_case(33, 16, 100, padded_size=128)
    case.lm_weight_VD[100:] = 1e4
    judge(case, implementation, tools)
    leaves = case.leaves()
    run_case(leaves, implementation=implementation).lm_sum.backward()
    assert not leaves.lm_weight_VD.grad[100:].any()


@pytest.mark.parametrize("z_weight", [0.0, 1e-3, 0.3])
def test_z_loss(z_weight, make_case, truth_of, relative_error, run_case, implementation):
    case = make_case(40, 16, 77)
    leaves = case.leaves()
    output = run_case(leaves, implementation=implementation, z_weight=z_weight)
    (2 * output.lm_sum).backward()
    truth = truth_of(case, lm_up=2, mode_up=0, z_weight=z_weight)
    without = truth_of(case).lm_sum
    assert output.lm_sum.item() == pytest.approx(truth.lm_sum, rel=1e-5)
    assert output.z_loss_sum.item() == pytest.approx(truth.lm_sum - without, rel=1e-4, abs=1e-5)
    assert not output.z_loss_sum.requires_grad
    assert relative_error(output.nll_BT, truth.nll_N) <= 2e-6
    for value, expected in zip(
        (leaves.hidden_ND, leaves.lm_weight_VD), truth.gradients, strict=False
    ):
        assert relative_error(value.grad, expected) <= 3e-6


def test_fractional_labels(make_case, tools, implementation):
    case = make_case(50, 8, 20)
    label = torch.rand(50, generator=torch.Generator().manual_seed(1))
    judge(replace(case, targets=replace(case.targets, mode_label_BT=label)), implementation, tools)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(
    scale, make_case, truth_of, relative_error, run_case, implementation
):
    case = make_case(30, 4, 50)
    case.hidden_ND[:, 0] = scale
    case.lm_weight_VD[:, 0] = torch.linspace(-1, 1, 50)
    case.mode_weight_D[0] = 1.0
    leaves = case.leaves()
    output = run_case(leaves, implementation=implementation)
    (output.lm_sum + output.mode_sum).backward()
    truth = truth_of(case)
    assert output.lm_sum.item() == pytest.approx(truth.lm_sum, rel=1e-5)
    assert output.mode_sum.item() == pytest.approx(truth.mode_sum, rel=1e-5)
    for value, expected in zip(leaves.parameters, truth.gradients, strict=True):
        assert torch.isfinite(value.grad).all()
        # A logit of 1e4 carries 1e-3 of rounding, and with it every probability.
        assert relative_error(value.grad, expected) <= 5e-3


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_gradients_agree_with_finite_differences(make_case, run_case, small_pieces, implementation):
    case = make_case(7, 3, 11, padded_size=13, dtype=torch.float64).leaves()

    def sums(*parameters):
        names = ("hidden_ND", "lm_weight_VD", "mode_weight_D", "mode_bias")
        output = run_case(
            replace(case, **dict(zip(names, parameters, strict=True))),
            implementation=implementation,
            z_weight=0.1,
        )
        return output.lm_sum, output.mode_sum

    with small_pieces(8 * 11 * 3):
        assert torch.autograd.gradcheck(sums, case.parameters)
