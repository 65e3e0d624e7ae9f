"""One tensor carries hidden states and positions from stage to stage, exactly.

T row length, B rows, D hidden size.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.engine.pipeline import DIGIT_BASE, POSITION_DIGITS, pack, unpack

POSITIONS = st.one_of(
    st.integers(0, 2**24 - 1),
    st.sampled_from([0, 1, 255, 256, 257, 65535, 65536, 2**24 - 1]),
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@given(st.data())
def test_unpack_undoes_pack(dtype, data):
    T, B, D = (data.draw(st.integers(1, 5)) for _ in range(3))
    row = st.lists(POSITIONS, min_size=T, max_size=T)
    position_BT = torch.tensor(data.draw(st.lists(row, min_size=B, max_size=B)))
    # Hidden states of any size, which must not reach the digits.
    hidden_TBD = (torch.randn(T, B, D) * 10.0 ** data.draw(st.integers(-30, 30))).to(dtype)
    packed = pack(hidden_TBD, position_BT)
    assert packed.dtype == dtype
    assert packed.shape == (T, B, D + POSITION_DIGITS)
    hidden, position = unpack(packed)
    assert torch.equal(hidden, hidden_TBD)
    assert torch.equal(position, position_BT)
    assert position.dtype == torch.int64


@DTYPES
@given(st.data())
def test_each_part_of_a_row_carries_the_whole_rows_positions(dtype, data):
    parts, own, B, D = (data.draw(st.integers(1, 4)) for _ in range(4))
    row = st.lists(POSITIONS, min_size=parts * own, max_size=parts * own)
    position_BT = torch.tensor(data.draw(st.lists(row, min_size=B, max_size=B)))
    hidden_TBD = torch.randn(own, B, D).to(dtype)
    packed = pack(hidden_TBD, position_BT)
    assert packed.shape == (own, B, D + POSITION_DIGITS * parts)
    hidden, position = unpack(packed, parts)
    assert torch.equal(hidden, hidden_TBD)
    assert torch.equal(position, position_BT)


@DTYPES
def test_every_digit_is_exact(dtype):
    digits = torch.arange(DIGIT_BASE)
    for scale in (1, DIGIT_BASE, DIGIT_BASE**2):
        position_BT = (digits * scale).unsqueeze(0)
        _, position = unpack(pack(torch.zeros(DIGIT_BASE, 1, 2, dtype=dtype), position_BT))
        assert torch.equal(position, position_BT)


@DTYPES
def test_gradients_pass_to_hidden_states_only(dtype):
    hidden_TBD = torch.randn(4, 2, 3, dtype=dtype, requires_grad=True)
    position_BT = torch.randint(0, 2**24, (2, 4))
    upstream = torch.randn(4, 2, 3, dtype=dtype)
    packed = pack(hidden_TBD, position_BT)
    packed.retain_grad()
    hidden, position = unpack(packed)
    assert not position.requires_grad
    hidden.backward(upstream)
    assert torch.equal(hidden_TBD.grad, upstream)
    assert torch.equal(packed.grad[..., :3], upstream)
    assert not packed.grad[..., 3:].any()
