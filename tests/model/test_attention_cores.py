"""Every way to attend gives what a loop over tokens gives, and keeps what it says.

torch has no flex kernel for gradients on a CPU: its plain form, which applies the same mask to all
scores, stands for it here, and the blocks that the kernel would skip are held against torch's own
`create_block_mask`. flash-attention is not installed: stand_ins.py restates its function.

T row length, B rows, H query heads, G key/value groups, K head size, N tokens.
"""

from __future__ import annotations

import functools
import sys
from unittest import mock

import pytest
import torch
from attention_by_loops import (
    BASE,
    assert_equals_loops,
    core,
    draw,
    outputs_and_gradients,
    positions_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import FLASH_ATTN, let_flex_train_on_a_cpu
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mode.model.attention import attention_context
from megatron_mode.model.attention_cores import (
    FLEX_BLOCK_TOKENS,
    attend_blocks,
    attention_core,
    block_mask,
    packed_documents,
)

KERNEL = "megatron_mode.model.attention_cores.flex_kernel"
CORES = ("dense", "flex", "flash")


def test_an_unknown_core_does_not_run_as_another():
    with pytest.raises(AssertionError, match=r"unreachable.*'sparse'"):
        attention_core("sparse", torch.zeros(1, 4, dtype=torch.long), torch.float32)


# Starts of documents, row length, query heads, groups: one document, a border inside and at a
# block's edge, many documents, every token its own.
ROWS = {
    "short": ([{1, 4}, set()], 5, 3, 3),
    "one block": ([set(), {127}], 128, 2, 1),
    "odd": ([{3, 128, 129, 200}, {256}], 257, 6, 2),
    "many": ([set(range(0, 300, 7)), set(range(300))], 300, 2, 1),
}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    let_flex_train_on_a_cpu(monkeypatch.setattr)
    monkeypatch.setitem(sys.modules, "flash_attn", FLASH_ATTN)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["flex", "flash"])  # dense: test_attention.py
def test_each_core_equals_a_loop_over_tokens(name, rows):
    starts_B, length, heads, groups = ROWS[rows]
    position_BT = positions_of(starts_B, length)
    inputs = draw(length, len(starts_B), heads, groups, 4, torch.float32)
    context = attention_context(position_BT, 4, BASE, torch.float32, core=name)
    assert_equals_loops(inputs, position_BT, context=context, scale=0.3, bound=1e-4)


@pytest.mark.parametrize("name", CORES)
def test_recomputing_changes_no_bit(name):
    position_BT = positions_of(ROWS["odd"][0], 257)
    inputs = draw(257, 2, 6, 2, 4, torch.float32)
    context = attention_context(position_BT, 4, BASE, torch.float32, core=name)
    kept, again = (
        outputs_and_gradients(core(recomputes=flag)(*inputs, context), inputs)
        for flag in (False, True)
    )
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))


@settings(max_examples=60)
@given(st.data())
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(data):
    length = data.draw(st.integers(1, 5 * FLEX_BLOCK_TOKENS + 1))
    edges = st.sampled_from([1, 127, 128, 129, 255, 256, 384, length - 1])
    starts = st.sets(st.one_of(st.integers(0, length), edges), max_size=9)
    position_BT = positions_of(data.draw(st.lists(starts, min_size=1, max_size=3)), length)
    document_BT = (position_BT == 0).cumsum(1)

    def allowed(b, h, q, k):
        return (document_BT[b, q] == document_BT[b, k]) & (k <= q)

    rows = len(position_BT)
    theirs = flex.create_block_mask(allowed, rows, None, length, length, device="cpu")
    ours = block_mask(document_BT)
    assert ours.shape == theirs.shape
    for kind in ("", "full_"):
        counts = [getattr(mask, f"{kind}kv_num_blocks") for mask in (ours, theirs)]
        assert torch.equal(*counts)
        numbers = [getattr(mask, f"{kind}kv_indices") for mask in (ours, theirs)]
        wanted = torch.arange(numbers[0].shape[-1]) < counts[0].unsqueeze(-1)
        assert torch.equal(*(number[wanted] for number in numbers))
    assert torch.equal(ours.q_num_blocks, theirs.q_num_blocks)


@settings(max_examples=60)
@given(st.data())
def test_packed_documents_begin_where_positions_do(data):
    length = data.draw(st.integers(1, 12))
    starts = st.sets(st.integers(0, length), max_size=6)
    position_BT = positions_of(data.draw(st.lists(starts, min_size=1, max_size=3)), length)
    position_BT[0] += data.draw(st.integers(0, 3))  # a row that begins inside a document
    lengths = []
    for row in position_BT.tolist():
        for t, position in enumerate(row):
            if t == 0 or position == 0:
                lengths.append(0)
            lengths[-1] += 1
    begin_n, longest_tokens = packed_documents(position_BT)
    assert begin_n.dtype == torch.int32
    assert begin_n[0] == 0
    assert begin_n.diff().tolist() == lengths
    assert longest_tokens == max(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("length", [300, 512])
def test_the_compiled_kernel_skips_blocks_and_finds_the_same(length):
    """torch compiles a forward kernel for CPUs that walks the blocks as the one for GPUs does."""
    position_BT = positions_of([{3, 140, 290}, {129}], length)
    query, key, value = (x.detach() for x in draw(length, 2, 4, 2, 16, torch.float32))
    dense, blocks = (
        attention_context(position_BT, 16, BASE, torch.float32, core=name).core
        for name in ("dense", "flex")
    )
    compiled = torch.compile(flex.flex_attention)
    with mock.patch(KERNEL, return_value=compiled):
        found = blocks(query, key, value, None)
    expected = dense(query, key, value, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # The blocks are what it walks: without the last, the last queries find nothing.
    cut = functools.partial(attend_blocks, without_last_block(*blocks.args))
    with mock.patch(KERNEL, return_value=compiled):
        assert not torch.allclose(cut(query, key, value, None), expected, atol=1e-3)


def without_last_block(mask):
    counts = mask.kv_num_blocks.clone()
    counts[..., -1] -= 1
    return flex.BlockMask.from_kv_blocks(
        counts, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices,
        BLOCK_SIZE=FLEX_BLOCK_TOKENS, mask_mod=mask.mask_mod, seq_lengths=mask.seq_lengths,
    )  # fmt: skip


class LargestTensor(TorchDispatchMode):
    """Note the most elements that a result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("name", CORES)
def test_only_the_dense_context_has_a_mask_of_t_squared(name):
    position_BT = positions_of([set(range(0, 4096, 100))], 4096)
    with LargestTensor() as largest:
        attention_context(position_BT, 8, BASE, torch.float32, core=name)
    if name == "dense":
        assert largest.elements == 4096**2
    else:
        assert largest.elements <= 4096 * 8
