"""Build any rank of any layout in one process, without its peers and without memory for weights.

Groups are made on torch's fake backend, which talks to nobody, and weights on the meta device; all
else is the code of a real run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mode.config import Config
from megatron_mode.cost.topology import Layout
from megatron_mode.engine.build import build_mesh, build_stage, choose_dtype, join_group
from megatron_mode.engine.pipeline import ModePipeline
from megatron_mode.model.size import vocab_size
from megatron_mode.process.launch import Process


class Rehearsed(NamedTuple):
    """Hold a rank that was built: its stage has shapes, groups and marks, but no values."""

    rank: int
    layout: Layout
    stage: ModePipeline


@contextmanager
def rehearse(config: Config, rank: int, world_size: int) -> Iterator[Rehearsed]:
    """Build one rank of a world, and leave that world afterwards.

    Raises ConfigError as a real run does, and RuntimeError in a process that is in a group already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is a member of a group; rehearse in one of its own")
    os.environ.setdefault("LOCAL_RANK", "0")  # read by DeepSpeed's PipelineModule
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
    try:
        join_group(Process(rank, world_size, 0, 1, "localhost", 0, "rehearsal"), threads=1)
        layout = build_mesh(config, world_size)
        tokens = vocab_size(config.model)
        stage = build_stage(config, layout, tokens, choose_dtype(config), shapes_only=True)
        yield Rehearsed(rank, layout, stage)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
