"""A snapshot equals the state it was taken of, whatever becomes of that state."""

from __future__ import annotations

from collections import OrderedDict

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.checkpoint.writer import Snapshots

SHAPES = st.lists(st.integers(0, 4), max_size=3)
TENSORS = st.builds(
    lambda shape, seed, dtype: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    ),
    SHAPES,
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
STATES = st.recursive(
    TENSORS | st.integers() | st.text(max_size=3) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=8,
)


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for inner in state.values():
            yield from tensors_in(inner)
    elif isinstance(state, list | tuple):
        for inner in state:
            yield from tensors_in(inner)


def plain(state):
    """Return the state as values that compare by content."""
    if isinstance(state, torch.Tensor):
        return (state.dtype, state.shape, state.double().tolist())
    if isinstance(state, dict):
        return (type(state), [(key, plain(inner)) for key, inner in state.items()])
    if isinstance(state, list | tuple):
        return (type(state), [plain(inner) for inner in state])
    return state


@settings(max_examples=80, deadline=None)
@given(STATES)
def test_a_snapshot_does_not_follow_its_state(state):
    before = plain(state)
    snapshots = Snapshots()
    taken = snapshots.take("state", state)
    for tensor in tensors_in(state):
        tensor.zero_().add_(3)
    assert plain(taken) == before


def test_buffers_are_used_again_and_views_are_copied_alone():
    flat = torch.arange(1000.0)
    state = {"a": flat[10:20], "b": flat.view(10, 100)[:, 3]}
    snapshots = Snapshots()
    first = snapshots.take("rank", state)
    places = [tensor.data_ptr() for tensor in first.values()]
    assert [t.untyped_storage().nbytes() for t in first.values()] == [40, 40]
    flat.mul_(2)
    second = snapshots.take("rank", state)
    assert [tensor.data_ptr() for tensor in second.values()] == places
    assert torch.equal(second["a"], torch.arange(20.0, 40.0, 2))
    assert torch.equal(second["b"], torch.arange(6.0, 2000, 200))
    other = snapshots.take("other", state)
    assert not {t.data_ptr() for t in other.values()} & set(places)
