"""Put a rank together, in order: process group, mesh, stage, weights, optimizer, DeepSpeed.

Or rehearse it: `rehearse` builds any rank of any layout in one process, without its peers.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from megatron_mode.config import Config, check_world_size
from megatron_mode.config.fields import HealthConfig
from megatron_mode.cost.topology import Axis, Layout
from megatron_mode.engine.accelerators import Implementations, choose_implementations
from megatron_mode.engine.deepspeed_config import deepspeed_config
from megatron_mode.engine.optimizer import adamw
from megatron_mode.engine.pipeline import PIPELINES, ModePipeline
from megatron_mode.engine.step import Engine, StepLoss
from megatron_mode.errors import ConfigError, MegatronModeError, StallError
from megatron_mode.loss.mode_loss import ModeLoss
from megatron_mode.model.init import initialise
from megatron_mode.model.layers import transformer_config
from megatron_mode.model.sharding import mark_parameters
from megatron_mode.model.size import vocab_size
from megatron_mode.process.launch import Process, cpu_threads

GROUP_TIMEOUT = timedelta(minutes=10)
LONGEST_PATIENCE = timedelta(days=20)  # torch counts milliseconds in 32 bits


def choose_dtype(config: Config) -> torch.dtype:
    """Return the dtype of weights and activations; auto is bf16 on a GPU, fp32 on a CPU.

    Raises ConfigError for auto without ZeRO on a GPU, which `rules` cannot know.
    """
    precision = config.run.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
        if precision == "bf16" and config.parallel.zero_stage == 0:
            raise ConfigError(
                "parallel.zero_stage is 0; accepted: 1 for bf16, which run.precision auto is on "
                "a GPU; use 1, or precision fp32"
            )
    return torch.bfloat16 if precision == "bf16" else torch.float32


def device_type() -> str:
    """Return what a run computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def implementations(config: Config) -> Implementations:
    """Return who computes each part of a run on this machine; the loss chooses for itself."""
    bf16 = choose_dtype(config) == torch.bfloat16
    return choose_implementations(config, device_type(), bf16=bf16)


def join_group(process: Process, threads: int, health: HealthConfig | None = None) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs) and take this process's device.

    Collectives wait longer than `health` lets the run stall, so that the watchdog speaks first.
    Raises ConfigError where the port is taken, StallError where the others do not come.
    """
    torch.set_num_threads(cpu_threads(threads, process.local_world_size))
    backend = "gloo"
    if torch.cuda.is_available():
        device = choose_device(process, torch.cuda.device_count())
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device)  # DeepSpeed takes it for the number of the GPU
        backend = "nccl"
    # DeepSpeed's shared-memory collective, which only inference calls, leaves 64 MB a rank in
    # /dev/shm after every run.
    torch_backend = importlib.import_module("deepspeed.comm.torch")
    vars(torch_backend)["build_shm_op"] = lambda: None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(
                backend,
                auto_mpi_discovery=False,
                verbose=False,
                timeout=group_timeout(health or HealthConfig()),
            )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise meeting_failure(process, error) from error


def choose_device(process: Process, devices: int) -> int:
    """Return the number of this process's GPU; raises ConfigError where there are too few."""
    if devices == 1 and process.launcher == "srun":  # Slurm may show each process its own only
        return 0
    if process.local_rank >= devices:
        raise ConfigError(
            f"this machine runs {process.local_world_size} processes but shows them {devices} "
            "GPUs: use one process a GPU; start fewer, or ask for more GPUs"
        )
    return process.local_rank


def group_timeout(health: HealthConfig) -> timedelta:
    """Return after which time a collective gives up: later than the watchdog speaks."""
    patience_seconds = max(health.stall_seconds, health.start_stall_seconds)
    return GROUP_TIMEOUT + min(timedelta(seconds=min(patience_seconds, 1e9)), LONGEST_PATIENCE)


def limit_groups(health: HealthConfig) -> None:
    """Let all groups of this rank wait as long; DeepSpeed's give up after ten or thirty minutes."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(group_timeout(health), group)


def meeting_failure(process: Process, error: RuntimeError) -> MegatronModeError:
    """Say in a sentence why the processes could not meet."""
    where = f"{process.master_addr}:{process.master_port}"
    if "EADDRINUSE" in str(error):
        return ConfigError(
            f"MASTER_PORT is {process.master_port}: another program on this machine uses it; use "
            "a free port (deepspeed --master_port, torchrun --master-port, MASTER_PORT under srun)"
        )
    first_line = str(error).partition("\n")[0].rstrip(".")
    return StallError(
        f"rank {process.rank} of {process.world_size} processes did not meet all others at {where} "
        f"({first_line}): look for one that ended before, or a MASTER_ADDR that this machine "
        "cannot reach, and start the run again"
    )


def build_mesh(config: Config, world_size: int) -> Layout:
    """Create megatron-core's groups and return the layout; refuse a world that does not divide."""
    data = check_world_size(config, world_size)
    layout = Layout(config.parallel.tensor, config.parallel.pipeline, data)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        create_gloo_process_groups=False,  # a second set of groups, for megatron's own checkpoints
        distributed_timeout_minutes=group_timeout(config.health) // timedelta(minutes=1),
    )
    return layout


def build_stage(
    config: Config, layout: Layout, vocab_tokens: int, *, shapes_only: bool = False
) -> ModePipeline:
    """Build this rank's stage with marked parameters; `initialise` fills their values.

    With `shapes_only` they are on the meta device and take no memory.
    """
    mode_loss = ModeLoss(
        config.loss,
        vocab_tokens,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        device_type=device_type(),
        sequence_parallel=config.parallel.sequence_parallel,
    )
    chosen = implementations(config)
    core = transformer_config(
        config.model,
        layout.tensor,
        choose_dtype(config),
        sequence_parallel=config.parallel.sequence_parallel,
        attention_core=chosen.attention,
        norm=chosen.norm,
        recompute_attention=config.parallel.activation_checkpointing == "selective",
    )
    core.use_cpu_initialization |= shapes_only  # else megatron-core names the GPU itself
    place = torch.device("meta") if shapes_only else contextlib.nullcontext()
    pipeline = PIPELINES[config.parallel.schedule]
    with place, contextlib.redirect_stdout(io.StringIO()):
        stage = pipeline(config.model, core, layout, StepLoss(mode_loss))
    for _, module in stage.named_links():
        mark_parameters(module)
    check_groups(layout, stage.mpu())
    return stage


def build_engine(config: Config, layout: Layout, vocab_tokens: int) -> Engine:
    """Build this rank's stage and its engine; `vocab_tokens` is the vocabulary without padding.

    Order matters: weights are drawn before DeepSpeed copies them into its flat fp32 groups, and
    megatron-core's marks are set before DeepSpeed computes gradient norms with them.
    """
    stage = build_stage(config, layout, vocab_tokens)
    limit_groups(config.health)
    links, part = stage.named_links(), layout.coordinates(dist.get_rank()).tensor
    initialise(links, config.model, config.run.seed, part=part, parts=layout.tensor)
    named = [(f"{link}.{n}", p) for link, m in links for n, p in m.named_parameters()]
    bf16 = choose_dtype(config) == torch.bfloat16
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline_engine, *_ = deepspeed.initialize(
            model=stage,
            optimizer=adamw(config.optimizer, named, implementations(config).adamw),
            config=deepspeed_config(config, layout.data, bf16=bf16),
        )
    limit_groups(config.health)
    return Engine(config, layout, pipeline_engine)


def check_groups(layout: Layout, grid: Any) -> None:
    """Compare the groups of DeepSpeed's grid and of megatron-core with the layout's formula.

    Raises ConfigError where one of them puts this rank beside other ranks.
    """
    rank = dist.get_rank()
    pairs: dict[Axis, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {
        "tensor": (
            grid.get_slice_parallel_group(), parallel_state.get_tensor_model_parallel_group(),
        ),
        "pipeline": (
            grid.get_pipe_parallel_group(), parallel_state.get_pipeline_model_parallel_group(),
        ),
        "data": (grid.get_data_parallel_group(), parallel_state.get_data_parallel_group()),
    }  # fmt: skip
    for axis, groups in pairs.items():
        expected = layout.ranks_along(axis, rank)
        deepspeeds, megatrons = (dist.get_process_group_ranks(group) for group in groups)
        if not expected == deepspeeds == megatrons:
            raise ConfigError(
                f"rank {rank} shares the {axis} axis with {expected} by the layout {layout}, with "
                f"{deepspeeds} for DeepSpeed and with {megatrons} for megatron-core: install "
                "versions of deepspeed and megatron-core that pyproject names"
            )


@contextlib.contextmanager
def rehearse(config: Config, rank: int, world_size: int) -> Iterator[tuple[Layout, ModePipeline]]:
    """Build one rank of a world, and leave that world afterwards.

    Groups are on torch's fake backend, which talks to nobody, and weights on the meta device.
    Raises ConfigError as a real run does, and RuntimeError in a process that is in a group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process is a member of a group; rehearse in one of its own")
    os.environ.setdefault("LOCAL_RANK", "0")  # read by DeepSpeed's PipelineModule
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
    try:
        join_group(Process(rank, world_size, 0, 1, "localhost", 0, "rehearsal"), threads=1)
        layout = build_mesh(config, world_size)
        yield layout, build_stage(config, layout, vocab_size(config.model), shapes_only=True)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
