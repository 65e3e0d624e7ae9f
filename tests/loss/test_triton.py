"""Judge the Triton kernels in the interpreter: fp32 dots, sizes around the tiles, all options.

The interpreter multiplies in fp32 whatever the inputs; tests/gpu repeats this in hardware.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megatron_mode.config.fields import BlockingConfig
from megatron_mode.kernels.mode_loss import VocabShard, mode_loss, tiling
from megatron_mode.kernels.mode_loss.lm_kernels import row_start
from megatron_mode.kernels.mode_loss.triton_loss import SLICE_BYTES, slice_columns
from megatron_mode.loss.blocking import blocking_of

AXES = {
    "vocab_size": (1, 2, 127, 128, 129, 507),
    "hidden_size": (1, 31, 64, 123),
    "tokens": (0, 1, 15, 65),
    "mask": ("none", "some", "all"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "rows": ("given", "all"),
    "z_weight": (0.0, 0.01),
    "keep": (0, 2**30),
    "strided": (False, True),
}
EPSILON = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def pairs_of(case):
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def covering_array():
    """Return cases in which every pair of values of every two axes occurs, greedily chosen."""
    draw = torch.Generator().manual_seed(0)
    names = list(AXES)
    missing = {
        pair
        for one, two in itertools.combinations(sorted(names), 2)
        for pair in itertools.product(
            [(one, value) for value in AXES[one]], [(two, value) for value in AXES[two]]
        )
    }
    cases = []
    while missing:
        best = None
        for seed in sorted(missing, key=str)[:8]:
            case = dict(seed)
            for name in [names[i] for i in torch.randperm(len(names), generator=draw)]:
                if name not in case:
                    case[name] = max(
                        AXES[name],
                        key=lambda value: len(pairs_of({**case, name: value}) & missing),
                    )
            if best is None or len(pairs_of(case) & missing) > len(pairs_of(best) & missing):
                best = case
        cases.append(best)
        missing -= pairs_of(best)
    return cases


CASES = covering_array()


def test_the_array_covers_all_pairs():
    found = set().union(*(pairs_of(case) for case in CASES))
    for one, two in itertools.combinations(sorted(AXES), 2):
        for values in itertools.product(AXES[one], AXES[two]):
            assert tuple(zip((one, two), values, strict=True)) in found
    assert len(CASES) < 60


@pytest.mark.parametrize("index", range(len(CASES)))
def test_sizes_and_options(index, make_case, truth_of, plain_sums, relative_error, run_case):
    options = CASES[index]
    dtype, z_weight = options["dtype"], options["z_weight"]
    case = make_case(
        options["tokens"],
        options["hidden_size"],
        options["vocab_size"],
        padded_size=options["vocab_size"] + 3,
        mask=options["mask"],
        dtype=dtype,
        seed=index,
    )
    if options["rows"] == "given":
        rows_n = case.targets.lm_weight_BT.nonzero().squeeze(1)
        case = replace(case, targets=replace(case.targets, lm_rows_n=rows_n))
    leaves = case.leaves()
    given = leaves
    if options["strided"]:
        # Rows that stand apart, as a slice of a larger tensor has them.
        doubled = torch.cat([leaves.hidden_ND] * 2, dim=1)
        given = replace(leaves, hidden_ND=doubled[:, : options["hidden_size"]])
    output = run_case(
        given, implementation="triton", z_weight=z_weight, keep_logits_bytes=options["keep"]
    )
    (0.5 * output.lm_sum - 3.0 * output.mode_sum).backward()
    truth = truth_of(case, lm_up=0.5, mode_up=-3.0, z_weight=z_weight)
    plain = case.leaves()
    plain_lm_sum, plain_mode_sum = plain_sums(plain)
    (0.5 * plain_lm_sum - 3.0 * plain_mode_sum).backward()
    epsilon = EPSILON[dtype]
    assert output.lm_sum.item() == pytest.approx(truth.lm_sum, rel=epsilon, abs=epsilon)
    assert output.mode_sum.item() == pytest.approx(truth.mode_sum, rel=epsilon, abs=epsilon)
    for value, expected in (
        (output.nll_BT, truth.nll_N),
        (output.bce_BT, truth.bce_N),
        (output.mode_logit_BT, truth.logit_N),
    ):
        assert relative_error(value, expected) <= epsilon
    for value, reference, expected in zip(
        leaves.parameters, plain.parameters, truth.gradients, strict=True
    ):
        bound = epsilon if z_weight else 2 * relative_error(reference.grad, expected) + epsilon
        assert relative_error(value.grad, expected) <= bound


@pytest.mark.parametrize("policy", ["mode", "lm", "both"])
@pytest.mark.parametrize("direction", ["mode1_as_mode2", "mode2_as_mode1", "both"])
@pytest.mark.parametrize("cap", [0.0, 0.2, 1.0])
def test_blocking_equals_the_reference(policy, direction, cap, make_case, run_case):
    config = BlockingConfig(policy=policy, direction=direction, tau=0.6, cap=cap)
    blocking = blocking_of(config, active=True)
    case = make_case(40, 6, 30)
    outputs = {}
    for implementation in ("triton", "chunked", "reference"):
        leaves = case.leaves()
        output = run_case(leaves, implementation=implementation, blocking=blocking)
        (output.lm_sum + output.mode_sum).backward()
        outputs[implementation] = (
            output.blocked_BT,
            output.lm_sum,
            output.mode_sum,
            output.nll_BT,
            output.bce_BT,
            *(value.grad for value in leaves.parameters),
        )
    assert outputs["reference"][0].any() == (cap > 0)
    for implementation in ("triton", "chunked"):
        assert torch.equal(outputs[implementation][0], outputs["reference"][0])
        for value, expected in zip(outputs[implementation], outputs["reference"], strict=True):
            assert torch.allclose(value.float(), expected.float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
def test_rows_without_lm_weight_cost_no_flops(implementation, make_case, run_case):
    """The library products of the backward pass shrink with the active rows."""
    flops = []
    for active in (20, 5):
        case = make_case(20, 8, 30, mask="none")
        case.targets.lm_weight_BT[active:] = 0
        rows_n = torch.arange(active)
        leaves = replace(case, targets=replace(case.targets, lm_rows_n=rows_n)).leaves()
        with FlopCounterMode(display=False) as counter:
            run_case(leaves, implementation=implementation).lm_sum.backward()
        flops.append(counter.get_total_flops())
    products = 2 if implementation == "triton" else 3
    assert flops[0] - flops[1] == products * 2 * 15 * 8 * 30


def test_slices_of_the_vocabulary_add_up(make_case, run_case, monkeypatch):
    from megatron_mode.kernels.mode_loss import triton_loss

    case = make_case(20, 8, 300)
    gradients = []
    for slice_bytes in (2**30, 1):
        monkeypatch.setattr(triton_loss, "SLICE_BYTES", slice_bytes)
        for keep in (0, 2**30):
            leaves = case.leaves()
            output = run_case(leaves, implementation="triton", keep_logits_bytes=keep)
            output.lm_sum.backward()
            gradients.append([leaves.hidden_ND.grad, leaves.lm_weight_VD.grad])
    for found in gradients[1:]:
        for value, expected in zip(found, gradients[0], strict=True):
            assert torch.allclose(value, expected, atol=1e-6)


@given(st.integers(0, 70_000), st.integers(1, 16_384), st.sampled_from((2, 4)))
def test_slices_bound_both_buffers(tokens, hidden_size, element_bytes):
    columns = slice_columns(tokens, hidden_size, element_bytes)
    assert columns % 128 == 0
    assert columns >= 128
    if columns > 128:
        assert (columns - 128) * max(element_bytes * tokens, 4 * hidden_size) <= SLICE_BYTES


def test_kept_logits_sum_to_one(make_case, run_case):
    """Statistics of rounded logits: a certain token keeps a gradient of about nothing."""
    case = make_case(8, 16, 20, mask="none", dtype=torch.bfloat16)
    case.lm_weight_VD[:, 0] = torch.linspace(-30, 30, 20)
    case.hidden_ND[:, 0] = 3.0
    case.targets.target_BT[:] = 19
    leaves = case.leaves()
    output = run_case(leaves, implementation="triton", keep_logits_bytes=2**20)
    output.lm_sum.backward()
    # Logits of 90 are rounded by up to 0.25: against an unrounded sum this would be about 8.
    assert leaves.hidden_ND.grad.float().abs().max() < 0.1


def test_no_mode_head(make_case, run_case, implementation):
    case = make_case(20, 8, 30)
    with_head, without = case.leaves(), case.leaves()
    expected = run_case(with_head, implementation=implementation)
    expected.lm_sum.backward()
    shard = VocabShard(vocab_size=case.vocab_size)
    output = mode_loss(
        *without.parameters[:2],
        None,
        None,
        case.targets,
        shard=shard,
        implementation=implementation,
    )
    (output.lm_sum + output.mode_sum).backward()
    assert output.mode_sum.item() == 0
    assert torch.equal(output.lm_sum, expected.lm_sum)
    for value, other in zip(without.parameters[:2], with_head.parameters[:2], strict=True):
        assert torch.equal(value.grad, other.grad)


@triton.jit
def starts(out_ptr, stride, ROWS: tl.constexpr):
    block = tl.program_id(0)
    tl.store(out_ptr + block, row_start(block, ROWS, stride))


def test_offsets_of_tiles_pass_31_bits():
    """The start of a tile is a 64-bit number: 70,000 tokens of 40,000 elements and beyond."""
    out = torch.zeros(600, dtype=torch.int64)
    starts[(600,)](out, 40_000, ROWS=128)
    assert out.tolist() == [block * 128 * 40_000 for block in range(600)]
    assert out.max() > 2**31


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(50257, 31), (507, 512), (4096, 123)])
def test_larger_shapes(
    vocab_size, hidden_size, make_case, truth_of, relative_error, run_case, monkeypatch
):
    tile = replace(tiling.INTERPRETER, BLOCK_N=128, BLOCK_V=512, BLOCK_D=64)
    monkeypatch.setattr(tiling, "INTERPRETER", tile)
    case = make_case(513, hidden_size, vocab_size)
    leaves = case.leaves()
    output = run_case(leaves, implementation="triton")
    (output.lm_sum + output.mode_sum).backward()
    truth = truth_of(case)
    assert output.lm_sum.item() == pytest.approx(truth.lm_sum, rel=1e-5)
    for value, expected in zip(leaves.parameters, truth.gradients, strict=True):
        assert relative_error(value.grad, expected) <= 4e-6
