"""Every layout's loss and gradients equal a single-process fp64 oracle, step by step."""

from __future__ import annotations

import functools
import itertools

import equality_rank
import gloo_world
import oracle_fp64
import pytest
import torch

LAYOUTS = list(itertools.product((1, 2), repeat=3))
RECOMPUTED = {"parallel": {"activation_checkpointing": "full"}}
SELECTIVE = {"parallel": {"activation_checkpointing": "selective"}}
FLEX, FLASH = ({"accelerators": {"attention": name}} for name in ("flex", "flash"))
REFERENCE = {"loss": {"implementation": "reference"}}
VARIANTS = [
    *((accumulation, tied, {}) for accumulation in (1, 4) for tied in (True, False)),
    (4, True, RECOMPUTED),
    (4, False, SELECTIVE),
    (1, True, {**FLEX, **RECOMPUTED}),
    (1, False, {**FLASH, **SELECTIVE}),
    (1, True, REFERENCE),
]
# The interpreter is slow: whole on one rank, sharded on two.
TRITON = {"loss": {"implementation": "triton"}}
TRITON_LAYOUTS = ((1, 1, 1), (2, 1, 1))
TOLERANCE = 1e-5


def variants_of(layout):
    return [*VARIANTS, (1, False, TRITON)] if layout in TRITON_LAYOUTS else VARIANTS


@functools.cache
def oracle_history(accumulation, tied, data):
    """Train the oracle on the rows that a layout with `data` data ranks takes."""
    from megatron_mode.model.init import draw

    config = equality_rank.make_config(1, 1, accumulation, tied, data)
    model = config.model
    D, F, V = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    K = D // model.attention_heads
    shapes = {"embedding.word.weight": (V, D)}
    for layer in range(model.layers):
        prefix = f"layers.{layer}.layer"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (D,),
            f"{prefix}.self_attention.linear_qkv.weight": (
                (model.attention_heads + 2 * model.kv_heads) * K,
                D,
            ),
            f"{prefix}.self_attention.linear_proj.weight": (D, D),
            f"{prefix}.pre_mlp_layernorm.weight": (D,),
            f"{prefix}.mlp.linear_fc1.weight": (2 * F, D),
            f"{prefix}.mlp.linear_fc2.weight": (D, F),
        }
    shapes |= {"mode_head.norm.weight": (D,), "mode_head.mode_weight": (D,)}
    shapes |= {"mode_head.mode_bias": (1,)}
    if not tied:
        shapes["lm_head.linear.weight"] = (V, D)
    weights = {
        name: draw(name, shape, model, config.run.seed).double() for name, shape in shapes.items()
    }
    batches = equality_rank.make_batches(config.batch.global_rows, model.seq_len)
    return oracle_fp64.train(weights, config, equality_rank.VOCAB_TOKENS, batches)


def join(results, variant, step):
    """Put the ranks' gradients of one step together: {global name: full gradient}."""
    from megatron_mode.model.sharding import join_parts

    found: dict[str, dict[tuple, torch.Tensor]] = {}
    cuts = {}
    for rank in results:
        _, _, store, rank_cuts, at = rank[variant]
        cuts |= rank_cuts
        for name, grad in store[step].items():
            found.setdefault(name, {})[at] = grad
    full = {}
    for name, parts in found.items():
        for _, group in itertools.groupby(sorted(parts.items()), key=lambda item: item[0][:2]):
            shards = [grad for _, grad in group]
            if name in cuts:
                whole = join_parts(shards, cuts[name])
            else:
                whole = shards[0]
                assert all(torch.equal(shard, whole) for shard in shards), name
            # Tied weights stand on two stages, every data rank has all: all must agree.
            assert torch.allclose(full.setdefault(name, whole), whole, rtol=0, atol=0), name
    return full


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "tp{}-pp{}-dp{}".format(*sizes))
def test_loss_and_gradients_equal_the_fp64_oracle(layout):
    world_size = layout[0] * layout[1] * layout[2]
    variants = variants_of(layout)
    results = gloo_world.run_world(world_size, equality_rank.three_steps, layout, variants)
    for index, variant in enumerate(variants):
        history = oracle_history(variant[0], variant[1], layout[2])
        for step in range(equality_rank.STEPS):
            loss, norm, grads = history[step]
            for rank in results:
                assert rank[index][0][step] == pytest.approx(loss, rel=1e-6), (variant, step)
                assert rank[index][1][step] == pytest.approx(norm, rel=1e-5), (variant, step)
            ours = join(results, index, step)
            assert ours.keys() == grads.keys()
            for name, expected in grads.items():
                error = float((ours[name] - expected).norm() / expected.norm())
                assert error <= TOLERANCE, (variant, step, name, error)
