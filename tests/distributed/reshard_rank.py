"""What each rank does in the re-shard tests: train and save, or load another layout's state."""

from __future__ import annotations

from typing import NamedTuple

import equality_rank
import torch

STEPS_BEFORE, STEPS_AFTER = 2, 2
ROWS, MICRO_ROWS = 8, 2
GENERATOR_SEED = 77
KEYS = ("exp_avg", "exp_avg_sq")


class Variant(NamedTuple):
    """Say what a layout is trained with."""

    tied: bool
    precision: str
    schedule: str = "1f1b"


VARIANTS = (Variant(True, "fp32"), Variant(False, "fp32"), Variant(True, "bf16"))

# What DeepSpeed's own converter needs to be told, written out by hand.
PATTERNS = {
    tied: {
        "universal_checkpoint_version": 0.2,
        "tp_replicated_parameter_patterns": [r".*norm\.weight$", r"5\.mode_.*"],
        "parameter_with_row_parallelism_patterns": [r".*\.linear_(proj|fc2)\.weight$"],
        "parameter_with_2_sub_params_cat_dim_0": [r".*\.linear_fc1\.weight$"],
        "pipeline_replicated_parameter_patterns": [r"tied_modules\..*"] if tied else [],
    }
    for tied in (True, False)
}


def make_config(sizes, variant):
    """Return a config of a layout with 4 layers and heads, so that every size of 4 can hold it."""
    tensor, pipeline, data = sizes
    return equality_rank.make_config(
        tensor,
        pipeline,
        1,
        variant.tied,
        data,
        run={"precision": variant.precision},
        model={"layers": 4, "kv_heads": 4},
        parallel={"schedule": variant.schedule},
        batch={"global_rows": ROWS, "micro_rows": MICRO_ROWS},
    )


def build(process, sizes, variant, layout=None):
    """Build the engine of a layout; return (engine, layout)."""
    from megatron_mode.engine.build import build_engine, build_mesh

    config = make_config(sizes, variant)
    layout = layout or build_mesh(config, process.world_size)
    return build_engine(config, layout, equality_rank.VOCAB_TOKENS), layout


def take_steps(engine, begin, count):
    """Take steps of the fixed batches; return the losses."""
    batches = equality_rank.make_batches(ROWS, engine.config.model.seq_len)
    losses = []
    for step in range(begin, begin + count):
        batch = batches[step % len(batches)]
        mine = equality_rank.micro_batches_of(batch, engine.layout, engine.at, MICRO_ROWS)
        result = engine.train_step(step, mine if engine.reads_data else [])
        losses.append(result.loss)
    return losses


def state_of(engine):
    """Return this rank's parameters, {global name: {state: tensor}}, and its place.

    DeepSpeed's own functions gather them over data ranks; tensor parts stay parts.
    """
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
    )

    from megatron_mode.model.sharding import parameter_cuts

    zero = engine.deepspeed.optimizer
    bf16 = hasattr(zero, "bf16_groups")
    groups = zero.bf16_groups if bf16 else zero.bit16_groups
    flats = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    # DeepSpeed links moments to parameters after its first group's first step, and no others.
    for group, flat in zip(groups, flats, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.state)
    states, cuts = {}, {}
    for link, module in engine.deepspeed.module.named_links():
        cuts |= {f"{link}.{name}": cut for name, cut in parameter_cuts(module).items()}
        for name, parameter in module.named_parameters():
            states[f"{link}.{name}"] = {
                "fp32": safe_get_full_fp32_param(parameter).clone(),
                **{key: safe_get_full_optimizer_state(parameter, key).clone() for key in KEYS},
                "weight": parameter.detach().float().clone(),
            }
    counts = sorted({float(state["step"]) for state in zero.state.values()})
    return states, cuts, engine.at, (counts, engine.deepspeed.global_steps)


def train_and_save(process, sizes, folders):
    """For each (variant, folder): train, save, continue; return [(losses after, saved state)]."""
    from megatron_mode.checkpoint.save import random_state
    from megatron_mode.engine.build import join_group

    join_group(process, 1)
    layout, results = None, []
    for variant, folder in folders:
        engine, layout = build(process, sizes, variant, layout)
        take_steps(engine, 0, STEPS_BEFORE)
        engine.deepspeed.module.universal_checkpoint_info = PATTERNS[variant.tied]
        torch.manual_seed(GENERATOR_SEED)
        engine.deepspeed.save_checkpoint(
            str(folder), tag="step-00000002", client_state=random_state(), save_latest=False
        )
        torch.manual_seed(0)
        state = state_of(engine)
        results.append((take_steps(engine, STEPS_BEFORE, STEPS_AFTER), state))
    return results


def load_and_train(process, sizes, cases):
    """For each (variant, universal folder): load it and continue; return losses and states."""
    from megatron_mode.checkpoint.resume import restore
    from megatron_mode.engine.build import join_group

    join_group(process, 1)
    layout, results = None, []
    for variant, folder in cases:
        engine, layout = build(process, sizes, variant, layout)
        restore(engine, folder, universal=True)
        drawn = torch.rand(4)
        assert torch.equal(drawn, torch.rand(4, generator=seeded())), "generators survive"
        state = state_of(engine)
        results.append((take_steps(engine, STEPS_BEFORE, STEPS_AFTER), state))
    return results


def seeded():
    """Return a generator in the state that was saved."""
    return torch.Generator().manual_seed(GENERATOR_SEED)
