"""Build ranks of large worlds in one process and print what they turned out to be, a line each.

Standard input names them: a JSON list of [run preset, overrides, world size, ranks]. Whatever can
be asked of DeepSpeed, megatron-core or the modules is asked of them, not of our arithmetic.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from megatron.core import parallel_state

from megatron_mode.config import load_config
from megatron_mode.engine.build import rehearse
from megatron_mode.engine.deepspeed_config import deepspeed_config


class Recorder:
    """Stand in for DeepSpeed's checkpoint engine: note the paths that are to be written."""

    def __init__(self):
        self.names = []

    def makedirs(self, path, exist_ok=False):
        pass

    def preserves_storage_sharing(self):
        return False

    def save(self, state_dict, path):
        assert state_dict
        self.names.append(Path(path).name)


def files_of(config, stage, layout, bf16):
    """Ask DeepSpeed's methods which files this rank writes; an engine needs values, so a shell."""
    grid, recorder = stage.mpu(), Recorder()
    settings = DeepSpeedConfig(deepspeed_config(config, layout.data, bf16=bf16), mpu=grid)
    stage.checkpoint_parallel_write_pipeline = settings.checkpoint_parallel_write_pipeline
    stage.save_state_dict("tag", recorder)
    shell = object.__new__(PipelineEngine)
    optimizer = SimpleNamespace(dp_process_group=grid.get_data_parallel_group())
    vars(shell).update(
        _config=settings, optimizer=optimizer, checkpoint_mp_rank=grid.get_model_parallel_rank()
    )
    if grid.get_data_parallel_rank() == 0:
        recorder.names.append(Path(shell._get_ckpt_name("", "tag")).name)
    recorder.names.append(Path(shell._get_zero_ckpt_name("", "tag")).name)
    return recorder.names


def facts_of(config, rank, world_size):
    started = time.perf_counter()
    with rehearse(config, rank, world_size) as (layout, stage):
        grid = stage.mpu()
        groups = {
            "tensor": [grid.get_slice_parallel_group(),
                       parallel_state.get_tensor_model_parallel_group()],
            "pipeline": [grid.get_pipe_parallel_group(),
                         parallel_state.get_pipeline_model_parallel_group()],
            "data": [grid.get_data_parallel_group(), parallel_state.get_data_parallel_group()],
        }  # fmt: skip
        chain = [index for index, _ in stage.local_links()]
        parameters = dict(stage.named_parameters())
        assert all(parameter.is_meta for parameter in parameters.values())
        return {
            "layout": list(layout),
            "rank": rank,
            "links": [stage.links[index].name for index in chain],
            "parameters": sum(parameter.numel() for parameter in parameters.values()),
            "parameters_bytes": sum(p.numel() * p.element_size() for p in parameters.values()),
            "cut_parameters": sum(
                p.numel() for p in parameters.values() if getattr(p, "tensor_model_parallel", False)
            ),
            "groups": {
                axis: [dist.get_process_group_ranks(group) for group in pair]
                for axis, pair in groups.items()
            },
            "tied": [
                [list(comm["ranks"]), dist.get_process_group_ranks(comm["group"])]
                for comm in stage.tied_comms.values()
            ],
            "counted_elsewhere": sum(
                p.numel() for p in parameters.values() if p.ds_pipe_replicated
            ),
            "files": {
                str(bf16): files_of(config, stage, layout, bf16=bf16) for bf16 in (False, True)
            },
            "seconds": time.perf_counter() - started,
            "process_seconds": time.process_time(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def main():
    for preset, overrides, world_size, ranks in json.load(sys.stdin):
        config = load_config(f"configs/run/{preset}.yaml", overrides)
        for rank in ranks:
            print(json.dumps(facts_of(config, rank, world_size)), flush=True)


if __name__ == "__main__":
    main()
