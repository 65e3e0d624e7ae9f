"""Ranks stand where DeepSpeed's topology puts them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.cost.topology import Coordinates, Layout

SIZES = st.integers(1, 5)


@settings(max_examples=50)
@given(SIZES, SIZES, SIZES)
def test_coordinates_are_those_of_deepspeed(tensor, pipeline, data):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    layout = Layout(tensor, pipeline, data)
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    assert layout.world_size == topology.world_size()
    for rank in range(layout.world_size):
        at, theirs = layout.coordinates(rank), topology.get_coord(rank)
        assert at == Coordinates(theirs.pipe, theirs.data, theirs.model)
        assert layout.rank(at) == rank == topology.get_rank(**theirs._asdict())


@given(SIZES, SIZES, SIZES)
def test_every_place_is_taken_once(tensor, pipeline, data):
    layout = Layout(tensor, pipeline, data)
    places = {layout.coordinates(rank) for rank in range(layout.world_size)}
    assert places == {
        Coordinates(p, d, t) for p in range(pipeline) for d in range(data) for t in range(tensor)
    }


def test_a_layout_reads_as_words():
    assert str(Layout(2, 3, 4)) == "tensor 2 x pipeline 3 x data 4"
