"""Put a rank together, in order: process group, mesh, stage, weights, optimizer, DeepSpeed."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from megatron_mode.config import Config, check_world_size
from megatron_mode.config.fields import HealthConfig
from megatron_mode.cost.topology import Layout
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
from megatron_mode.process.launch import Process, cpu_threads

GROUP_TIMEOUT = timedelta(minutes=10)
LONGEST_PATIENCE = timedelta(days=20)  # torch counts milliseconds in 32 bits


def choose_dtype(config: Config) -> torch.dtype:
    """Return the dtype of weights and activations; auto is bf16 on a GPU, fp32 on a CPU.

    Raises ConfigError for what `rules` cannot tell without the device: auto without ZeRO on a GPU.
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
    # DeepSpeed's shared-memory collective leaves 64 MB a rank in /dev/shm after every run, and only
    # inference calls it: 300 leftovers filled a machine's memory.
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
    """Return the number of this process's GPU among those that it sees.

    Slurm may show each process its own one only. Raises ConfigError where there are too few.
    """
    if devices == 1 and process.launcher == "srun":
        return 0
    if process.local_rank >= devices:
        raise ConfigError(
            f"this machine runs {process.local_world_size} processes but shows them {devices} "
            "GPUs: accepted is one process a GPU; start fewer, or ask for more GPUs"
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
            f"MASTER_PORT is {process.master_port}: another program on this machine uses it, "
            "accepted is a free port; start with another (deepspeed --master_port, torchrun "
            "--master-port, MASTER_PORT under srun)"
        )
    first_line = str(error).partition("\n")[0].rstrip(".")
    return StallError(
        f"rank {process.rank} of {process.world_size} processes did not meet all others at {where} "
        f"({first_line}): look for one that ended before, or a MASTER_ADDR that cannot be reached "
        "from here, and start the run again"
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
    config: Config,
    layout: Layout,
    vocab_tokens: int,
    dtype: torch.dtype,
    *,
    shapes_only: bool = False,
) -> ModePipeline:
    """Build this rank's stage with marked parameters; `initialise` fills their values.

    With `shapes_only` they lie on the meta device and take no memory.
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
        dtype,
        sequence_parallel=config.parallel.sequence_parallel,
        attention_core=chosen.attention,
        norm=chosen.norm,
        recompute_attention=config.parallel.activation_checkpointing == "selective",
    )
    core.use_cpu_initialization |= shapes_only  # else megatron-core names the GPU itself
    place = torch.device("meta") if shapes_only else contextlib.nullcontext()
    with place, contextlib.redirect_stdout(io.StringIO()):
        pipeline = PIPELINES[config.parallel.schedule]
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
    dtype = choose_dtype(config)
    stage = build_stage(config, layout, vocab_tokens, dtype)
    limit_groups(config.health)
    coordinates = layout.coordinates(dist.get_rank())
    initialise(
        stage.named_links(),
        config.model,
        config.run.seed,
        part=coordinates.tensor,
        parts=layout.tensor,
    )
    named = [(f"{link}.{n}", p) for link, m in stage.named_links() for n, p in m.named_parameters()]
    bf16 = dtype == torch.bfloat16
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

    Raises ConfigError when a rank stands elsewhere for one of them, or in other company.
    """
    rank = dist.get_rank()
    found = {
        "tensor": (
            layout.tensor_ranks(rank),
            grid.get_slice_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
        ),
        "pipeline": (
            layout.pipeline_ranks(rank),
            grid.get_pipe_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        ),
        "data": (
            layout.data_ranks(rank),
            grid.get_data_parallel_group(),
            parallel_state.get_data_parallel_group(),
        ),
    }
    for axis, (expected, *groups) in found.items():
        deepspeeds, megatrons = (dist.get_process_group_ranks(group) for group in groups)
        if not expected == deepspeeds == megatrons:
            raise ConfigError(
                f"rank {rank} shares the {axis} axis with {expected} by the layout {layout}, with "
                f"{deepspeeds} for DeepSpeed and with {megatrons} for megatron-core: install "
                "versions of deepspeed and megatron-core that pyproject names"
            )
