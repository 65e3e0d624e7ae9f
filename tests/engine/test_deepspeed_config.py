"""DeepSpeed reads from the derived dict what our config says."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.config import Config, load_config
from megatron_mode.config.presets import find_configs
from megatron_mode.cost.topology import accumulation_steps
from megatron_mode.engine.deepspeed_config import deepspeed_config
from megatron_mode.errors import ConfigError


@functools.cache
def tiny(*overrides: str) -> Config:
    return load_config(find_configs() / "run" / "tiny.yaml", list(overrides))


def parse(derived, data):
    """Let DeepSpeed check and read the dict as one of `data` data-parallel ranks."""
    from deepspeed.runtime import config

    ranks = SimpleNamespace(get_data_parallel_world_size=lambda: data)
    # Without a rank DeepSpeed takes itself for alone and does not ask for the size.
    with mock.patch.object(config.dist, "get_rank", return_value=0):
        return config.DeepSpeedConfig(derived, mpu=ranks)


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_batches_fill_the_global_batch(micro_rows, accumulation, data, bf16):
    rows = micro_rows * accumulation * data
    config = tiny(f"batch.global_rows={rows}", f"batch.micro_rows={micro_rows}")
    assert accumulation_steps(config, data) == accumulation
    parsed = parse(deepspeed_config(config, data, bf16=bf16), data)
    assert parsed.train_batch_size == rows
    assert parsed.train_micro_batch_size_per_gpu == micro_rows
    assert parsed.gradient_accumulation_steps == accumulation


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_options_arrive(stage, clip, recompute):
    config = tiny(
        f"parallel.zero_stage={stage}",
        f"optimizer.clip_grad_norm={clip}",
        f"parallel.activation_checkpointing={recompute}",
    )
    parsed = parse(deepspeed_config(config, 1, bf16=False), 1)
    assert parsed.zero_optimization_stage == stage
    assert parsed.gradient_clipping == clip
    assert parsed.pipeline["activation_checkpoint_interval"] == (1 if recompute == "full" else 0)
    assert parsed.pipeline["use_reentrant"] is False
    assert parsed.optimizer_name is None
    assert parsed.scheduler_name is None


@pytest.mark.parametrize(
    ("changes", "cut"),
    [
        ((), True),
        (("parallel.sequence_parallel=true", "parallel.tensor=2"), False),
        (("parallel.schedule=dualpipev", "parallel.pipeline=2", "batch.micro_rows=1"), False),
    ],
)
def test_stages_exchange_parts_only_of_what_all_tensor_ranks_hold(changes, cut):
    parsed = parse(deepspeed_config(tiny(*changes), 1, bf16=False), 1)
    assert parsed.pipeline["pipe_partitioned"] is parsed.pipeline["grad_partitioned"] is cut


def test_bf16_accumulates_in_fp32():
    """Without `grad_accum_dtype` DeepSpeed would add gradients up in bf16."""
    parsed = parse(deepspeed_config(tiny(), 1, bf16=True), 1)
    assert parsed.bfloat16_config.enabled
    assert parsed.grad_accum_dtype == "fp32"
    assert parsed.communication_data_type == torch.float32
    assert parsed.bfloat16_config.immediate_grad_update
    parsed = parse(deepspeed_config(tiny(), 1, bf16=False), 1)
    assert not parsed.bfloat16_config.enabled
    assert not parsed.float16_config.enabled


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("auto", torch.bfloat16 if torch.cuda.is_available() else torch.float32),
    ],
)
def test_precision_chooses_the_dtype(precision, dtype):
    from megatron_mode.engine.build import choose_dtype

    assert choose_dtype(tiny(f"run.precision={precision}")) == dtype


def test_auto_on_a_gpu_needs_zero(monkeypatch):
    """DeepSpeed cannot sum bf16 gradients in fp32 without ZeRO: it raises NotImplementedError."""
    from megatron_mode.engine.build import choose_dtype

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_dtype(tiny()) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"parallel.zero_stage is 0; accepted: 1 for bf16"):
        choose_dtype(tiny("parallel.zero_stage=0"))
