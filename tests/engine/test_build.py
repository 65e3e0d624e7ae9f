"""Which GPU a process takes, and how long its groups wait."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_mode.config.fields import HealthConfig
from megatron_mode.engine.build import choose_device, group_timeout, limit_groups
from megatron_mode.errors import ConfigError
from megatron_mode.process.launch import Process

PROCESS = Process(3, 8, 3, 4, "127.0.0.1", 29500, "deepspeed")


def test_a_process_takes_the_gpu_of_its_number():
    assert choose_device(PROCESS, 4) == 3
    assert choose_device(PROCESS, 8) == 3
    # Under `srun --gpus-per-task=1` each sees its own as number 0.
    assert choose_device(dataclasses.replace(PROCESS, launcher="srun"), 1) == 0
    with pytest.raises(ConfigError, match="runs 4 processes but shows them 2 GPUs"):
        choose_device(PROCESS, 2)
    with pytest.raises(ConfigError, match="shows them 1 GPUs"):
        choose_device(PROCESS, 1)


@pytest.mark.parametrize("seconds", [0.0, 1e-3, 600.0, 1e15, 1e300, float("inf")])
def test_a_collective_outlasts_the_watchdog(seconds):
    health = HealthConfig(stall_seconds=seconds)
    limit = group_timeout(health)
    assert limit >= timedelta(minutes=10)
    assert limit.total_seconds() * 1000 < 2**31, "torch counts milliseconds in 32 bits"
    if seconds < 1e6:
        longest = max(health.stall_seconds, health.start_stall_seconds)
        assert limit.total_seconds() > longest + 10 + 60, "an interval and the time of grace"


@pytest.mark.usefixtures("alone")
def test_every_group_of_a_rank_waits_as_long():
    group = dist.new_group([0])
    limit_groups(HealthConfig(stall_seconds=7200))
    limits = [
        found._get_backend(distributed_c10d.torch.device("cpu")).options._timeout
        for found in list(distributed_c10d._world.pg_map)
    ]
    assert len(limits) > 1
    assert set(limits) == {timedelta(seconds=7200 + 600)}
    dist.destroy_process_group(group)
