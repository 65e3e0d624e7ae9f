"""Put a rank together, in order: process group, mesh, stage, weights, optimizer, DeepSpeed."""

from __future__ import annotations

import contextlib
import importlib
import io
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mode.config import Config, check_world_size
from megatron_mode.engine.accelerators import choose_implementations
from megatron_mode.engine.deepspeed_config import deepspeed_config
from megatron_mode.engine.launch import Process, cpu_threads
from megatron_mode.engine.optimizer import adamw
from megatron_mode.engine.pipeline import ModePipeline
from megatron_mode.engine.step import Engine, StepLoss
from megatron_mode.engine.topology import Coordinates, Layout
from megatron_mode.errors import ConfigError
from megatron_mode.loss.mode_loss import ModeLoss
from megatron_mode.model.init import initialise
from megatron_mode.model.layers import transformer_config
from megatron_mode.model.sharding import mark_parameters

GROUP_TIMEOUT = timedelta(minutes=10)


def choose_dtype(config: Config) -> torch.dtype:
    """Return the dtype of weights and activations; auto is bf16 on a GPU, fp32 on a CPU."""
    if config.run.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if config.run.precision == "bf16" else torch.float32


def join_group(process: Process, threads: int) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs) and take this process's device."""
    torch.set_num_threads(cpu_threads(threads, process.local_world_size))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(process.local_rank)
        backend = "nccl"
    # DeepSpeed's shared-memory collective leaves 64 MB a rank in /dev/shm after every run, and only
    # inference calls it: 300 leftovers filled a machine's memory.
    torch_backend = importlib.import_module("deepspeed.comm.torch")
    vars(torch_backend)["build_shm_op"] = lambda: None
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(
            backend, auto_mpi_discovery=False, verbose=False, timeout=GROUP_TIMEOUT
        )


def build_mesh(config: Config, world_size: int) -> Layout:
    """Create megatron-core's groups and return the layout; refuse a world that does not divide."""
    data = check_world_size(config, world_size)
    layout = Layout(config.parallel.tensor, config.parallel.pipeline, data)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
    )
    return layout


def build_engine(config: Config, layout: Layout, vocab_tokens: int) -> Engine:
    """Build this rank's stage and its engine; `vocab_tokens` is the vocabulary without padding.

    Order matters: weights are drawn before DeepSpeed copies them into its flat fp32 groups, and
    megatron-core's marks are set before DeepSpeed computes gradient norms with them.
    """
    dtype = choose_dtype(config)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = choose_implementations(config, device_type, bf16=dtype == torch.bfloat16)
    mode_loss = ModeLoss(
        config.loss,
        vocab_tokens,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        device_type=device_type,
    )
    core = transformer_config(
        config.model,
        layout.tensor,
        dtype,
        attention_core=chosen.attention,
        norm=chosen.norm,
        recompute_attention=config.parallel.activation_checkpointing == "selective",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        stage = ModePipeline(config.model, core, layout, StepLoss(mode_loss))
    coordinates = layout.coordinates(dist.get_rank())
    for _, module in stage.named_links():
        mark_parameters(module)
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
            optimizer=adamw(config.optimizer, named, chosen.adamw),
            config=deepspeed_config(config, layout.data, bf16=bf16),
        )
    _check_groups(layout, pipeline_engine)
    return Engine(config, layout, pipeline_engine)


def _check_groups(layout: Layout, pipeline_engine: Any) -> None:
    grid = pipeline_engine.grid
    expected = layout.coordinates(dist.get_rank())
    actual = Coordinates(
        grid.get_pipe_parallel_rank(),
        grid.get_data_parallel_rank(),
        grid.get_slice_parallel_rank(),
    )
    megatron = Coordinates(
        expected.pipeline,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if not expected == actual == megatron:
        raise ConfigError(
            f"rank {dist.get_rank()} stands at {expected} by the layout {layout}, at "
            f"{actual} for DeepSpeed and at {megatron} for megatron-core: install versions of "
            "deepspeed and megatron-core that pyproject names"
        )
