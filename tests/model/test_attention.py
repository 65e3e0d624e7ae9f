"""Attention equals a loop over tokens in fp64, and sees neither other documents nor the future.

T row length, B rows, H query heads, G key/value groups, K head size.
"""

from __future__ import annotations

import cmath
import functools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from attention_by_loops import BASE, assert_equals_loops, core, draw, positions_of, turn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mode.model import attention_cores
from megatron_mode.model.attention import AttentionContext, Rotate, attention_context, rotate


def exact_context(position_BT: Tensor, K: int) -> AttentionContext:
    """Return the context in fp64 with tables by cmath; those of attention_context are of fp32."""
    half = K // 2
    table = np.array(
        [
            [[cmath.exp(1j * p * BASE ** (-i / half)) for i in range(half)] for p in row]
            for row in position_BT.t().tolist()
        ]
    )
    cos, sin = torch.from_numpy(table.real.copy()), torch.from_numpy(table.imag.copy())
    dense = attention_context(position_BT, K, BASE, torch.float64).core
    return AttentionContext(
        torch.cat((cos, cos), -1).unsqueeze(2), torch.cat((-sin, sin), -1).unsqueeze(2), dense
    )


@st.composite
def cases(draw_):
    length = draw_(st.integers(1, 24))
    starts = st.sets(st.integers(1, length), max_size=6)
    return SimpleNamespace(
        position_BT=positions_of(draw_(st.lists(starts, min_size=1, max_size=3)), length),
        length=length,
        groups=draw_(st.sampled_from([1, 2, 3])),
        heads_a_group=draw_(st.integers(1, 3)),
        head_size=draw_(st.sampled_from([2, 4, 6])),
        block=draw_(st.integers(1, 30)),
        dtype=draw_(st.sampled_from([torch.float32, torch.float64])),
        scale=draw_(st.sampled_from([None, 0.3])),
        seed=draw_(st.integers(0, 2**20)),
    )


@settings(max_examples=40)
@given(cases())
def test_attention_equals_a_loop_over_tokens(case):
    """For any documents, head ratios and query blocks."""
    B, K = len(case.position_BT), case.head_size
    heads = case.groups * case.heads_a_group
    inputs = draw(case.length, B, heads, case.groups, K, case.dtype, case.seed)
    context, bound = attention_context(case.position_BT, K, BASE, case.dtype), 2e-5
    if case.dtype == torch.float64:
        context, bound = exact_context(case.position_BT, K), 1e-12
    with mock.patch.object(attention_cores, "CPU_BLOCK_TOKENS", case.block):
        assert_equals_loops(
            inputs, case.position_BT, context=context, scale=case.scale, bound=bound
        )


@pytest.mark.parametrize("length", [255, 256, 257, 530])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_equal_a_loop_over_tokens(length, dtype):
    """Around the length at which a CPU cuts the queries into blocks; one document crosses it."""
    position_BT = positions_of([{3, 200, length - 1}], length)
    inputs = draw(length, 1, 2, 1, 4, dtype)
    context, bound = attention_context(position_BT, 4, BASE, dtype), 1e-4
    if dtype == torch.float64:
        context, bound = exact_context(position_BT, 4), 1e-12
    assert_equals_loops(inputs, position_BT, context=context, bound=bound)


@settings(max_examples=40)
@given(cases())
def test_a_token_sees_its_own_document_up_to_itself(case):
    """The gradient of a token's output is zero, to the bit, at every other token."""
    K = case.head_size
    inputs = draw(case.length, len(case.position_BT), case.groups, case.groups, K, torch.float32)
    context = attention_context(case.position_BT, K, BASE, torch.float32)
    with mock.patch.object(attention_cores, "CPU_BLOCK_TOKENS", case.block):
        output_TBX = core()(*inputs, context)
    t = case.seed % case.length
    for b in range(len(case.position_BT)):
        gradients = torch.autograd.grad(output_TBX[t, b].sum(), inputs, retain_graph=True)
        start = t - int(case.position_BT[b, t])
        seen = torch.zeros(case.length, len(case.position_BT), dtype=torch.bool)
        seen[start : t + 1, b] = True
        for gradient in gradients:
            assert not gradient[~seen].any()
        assert gradients[2][seen].any(dim=(1, 2)).all()


@pytest.mark.parametrize("length", [40, 300])
def test_a_decoder_sees_its_own_document_up_to_itself(length, model_config, build_decoder):
    """The same through all layers: each token has an embedding row of its own.

    The gradient is taken along a drawn direction: the square sum of a normalised vector is
    constant, and rounding alone decides whether its gradient is zero.
    """
    model = model_config(seq_len=length, vocab_size=384, init_std=0.3)
    generator = torch.Generator().manual_seed(length)
    direction_D = torch.randn(model.hidden_size, generator=generator)
    decoder = build_decoder(model)
    position_BT = positions_of([{11, 17, 260}], length)
    input_BT = torch.randperm(384, generator=generator)[:length].unsqueeze(0)
    hidden_TD = decoder(input_BT, position_BT).hidden_TBD[:, 0]
    (embedding,) = [m for name, m in decoder.named_links() if name == "embedding"]
    for t in (0, 10, 11, 16, 17, 30, length - 1):
        (grad_VD,) = torch.autograd.grad(
            hidden_TD[t] @ direction_D, embedding.word.weight, retain_graph=True
        )
        start = t - int(position_BT[0, t])
        seen = set(grad_VD.any(dim=1).nonzero()[:, 0].tolist())
        assert seen == set(input_BT[0, start : t + 1].tolist())


def test_a_document_does_not_notice_what_stands_around_it(model_config, build_decoder):
    """Its hidden states are those that it has in a row of its own."""
    decoder = build_decoder(model_config(init_std=0.3)).double()
    decoder.context = functools.partial(decoder.context, dtype=torch.float64)
    input_BT = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))
    position_BT = positions_of([{9, 22}], 32)
    packed_TD = decoder(input_BT, position_BT).hidden_TBD[:, 0]
    for begin, end in ((0, 9), (9, 22), (22, 32)):
        alone_TD = decoder(input_BT[:, begin:end], position_BT[:, begin:end]).hidden_TBD[:, 0]
        torch.testing.assert_close(packed_TD[begin:end], alone_TD, rtol=1e-12, atol=1e-12)


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 131_071), min_size=1, max_size=6),
    st.sampled_from([2, 8, 64]),
    st.sampled_from([10_000.0, 500_000.0]),
)
def test_rotary_is_a_product_of_complex_numbers(position, head_size, base):
    """Angles are of fp32, so they are off by 2e-7 of themselves, as everywhere in the field."""
    position_BT = torch.tensor([position])
    generator = torch.Generator().manual_seed(0)
    shape = (len(position), 1, 3, head_size)
    x_TBHK = torch.randn(shape, generator=generator, dtype=torch.float64)
    context = attention_context(position_BT, head_size, base, torch.float64)
    found = rotate(x_TBHK, context.cos_TB1K, context.sin_TB1K)
    bound = 2e-7 * (1 + max(position)) * 2 * float(x_TBHK.abs().max())
    assert (found - turn(x_TBHK, position_BT, base)).abs().max() <= bound
    torch.testing.assert_close(found.norm(dim=-1), x_TBHK.norm(dim=-1), rtol=3e-7, atol=0)


def test_scores_depend_on_distance_only():
    """Turned queries and keys of equal distance have equal products (RoFormer, eq. 16)."""
    query, key = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).double()

    def product(m: int, n: int) -> float:
        turned = []
        for x, p in ((query, m), (key, n)):
            context = exact_context(torch.tensor([[p]]), 64)
            turned.append(rotate(x, context.cos_TB1K, context.sin_TB1K))
        return float((turned[0] * turned[1]).sum())

    assert product(17, 5) == pytest.approx(product(1012, 1000), abs=1e-10)
    assert product(17, 5) != pytest.approx(product(17, 6), abs=1e-3)


def test_rotation_passes_gradcheck():
    context = exact_context(torch.tensor([[0, 1, 5]]), 4)
    x_TBHK = torch.randn(3, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: Rotate.apply(x, context.cos_TB1K, context.sin_TB1K), x_TBHK
    )


def test_rotation_in_bf16_errs_no_more_than_twice_plain_torch():
    position_BT = torch.arange(512).unsqueeze(0)
    context = attention_context(position_BT, 64, BASE, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x_TBHK = torch.randn(512, 1, 2, 64, generator=generator).bfloat16()
    cos, sin = context.cos_TB1K, context.sin_TB1K
    swapped = x_TBHK.roll(32, dims=-1)
    truth = turn(x_TBHK.double(), position_BT, BASE)
    plain = (x_TBHK * cos + swapped * sin).double() - truth
    ours = rotate(x_TBHK, cos, sin).double() - truth
    assert ours.norm() <= 2 * plain.norm()
    assert plain.norm() <= 0.01 * truth.norm()
