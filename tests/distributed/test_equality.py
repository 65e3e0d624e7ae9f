"""Every layout's loss and gradients equal a single-process fp64 oracle, step by step."""

from __future__ import annotations

import functools
import itertools
import math

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
    (1, False, {**FLASH, **SELECTIVE}),
    (1, True, REFERENCE),
]
SEQUENCE = {"parallel": {"sequence_parallel": True}}
SEQUENCE_VARIANTS = [
    (4, True, SEQUENCE),
    (1, False, SEQUENCE),
    (4, False, {"parallel": {**SEQUENCE["parallel"], **RECOMPUTED["parallel"]}}),
    (1, True, {**SEQUENCE, **REFERENCE}),
]
# DualPipeV cuts the model into two stages a rank.
TURNING = {"parallel": {"schedule": "dualpipev"}}
# The interpreter is slow: whole on one rank, sharded on two.
TRITON = {"loss": {"implementation": "triton"}}
TRITON_LAYOUTS = ((1, 1, 1), (2, 1, 1))
# So is flex attention where there is no kernel.
FLEX_LAYOUT = (2, 2, 1)
TOLERANCE = 1e-5
# The mode bias has one number, whose terms may cancel to 1e-6 of the whole gradient.
CANCELLED = 1e-3
# bf16 keeps 8 bits: gradients of a two-layer model are off by up to 3 %, a lost one by 100 %.
BF16_RATIO = 5e3


def variants_of(layout):
    """Return what a layout is tried with.

    Every variant meets one process, each axis alone, and all three axes. Two axes meet with the
    plain ones here, and with the others within all three, or in the slow test.
    """
    triton = [(1, False, TRITON)] if layout in TRITON_LAYOUTS else []
    flex = [(1, True, {**FLEX, **RECOMPUTED})] if layout == FLEX_LAYOUT else []
    if math.prod(layout) == 4:
        return [*VARIANTS[:4], *(SEQUENCE_VARIANTS[:1] if layout[0] > 1 else []), *flex]
    return [*VARIANTS, *(SEQUENCE_VARIANTS if layout[0] > 1 else []), *triton]


@functools.cache
def oracle_history(accumulation, tied, data, model=()):
    """Train the oracle on the rows that a layout with `data` data ranks takes.

    `model` holds (key, value) pairs of the model that differ from the default.
    """
    from megatron_mode.model.init import draw

    config = equality_rank.make_config(1, 1, accumulation, tied, data, model=dict(model))
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
        store, rank_cuts, at = rank[variant][2:5]
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


def check_against_the_oracle(layout, variants):
    results = gloo_world.run_world(math.prod(layout), equality_rank.three_steps, layout, variants)
    for index, (accumulation, tied, changes) in enumerate(variants):
        cut = changes.get("parallel", {}).get("sequence_parallel", False)
        seen = {length for rank in results for length in rank[index][5]}
        assert seen == {24 // layout[0] if cut else 24}
        bf16 = changes.get("run", {}).get("precision") == "bf16"
        coarse = BF16_RATIO if bf16 else 1.0
        model = tuple(changes.get("model", {}).items())
        history = oracle_history(accumulation, tied, layout[2], model)
        for step in range(equality_rank.STEPS):
            case = (variants[index], step)
            loss, norm, grads = history[step]
            for rank in results:
                assert rank[index][0][step] == pytest.approx(loss, rel=1e-6 * coarse), case
                assert rank[index][1][step] == pytest.approx(norm, rel=1e-5 * coarse), case
            ours = join(results, index, step)
            assert ours.keys() == grads.keys()
            for name, expected in grads.items():
                size = max(float(expected.norm()), CANCELLED * norm)
                error = float((ours[name] - expected).norm()) / size
                assert error <= TOLERANCE * coarse, (*case, name, error)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: "tp{}-pp{}-dp{}".format(*sizes))
def test_loss_and_gradients_equal_the_fp64_oracle(layout):
    check_against_the_oracle(layout, variants_of(layout))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if math.prod(layout) == 4])
def test_two_axes_equal_the_oracle_with_the_other_variants(layout):
    sequence = SEQUENCE_VARIANTS[1:] if layout[0] > 1 else []
    check_against_the_oracle(layout, [*VARIANTS[4:], *sequence])


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1)])
def test_every_gradient_arrives_in_fp32_beside_bf16_weights(layout):
    """DeepSpeed's BF16_Optimizer lost those of both heads once, and nothing crashed."""
    bf16 = {"run": {"precision": "bf16"}}
    variants = [(4, True, bf16), (4, False, bf16)]
    if layout[0] > 1:
        variants.append((4, True, {**SEQUENCE, **bf16}))
    check_against_the_oracle(layout, variants)


@pytest.mark.distributed
def test_four_tensor_ranks_share_a_row():
    check_against_the_oracle((4, 1, 1), [(1, True, {**SEQUENCE, "model": {"kv_heads": 4}})])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [
        ((2, 2, 1), 4),
        pytest.param((1, 2, 2), 6, marks=pytest.mark.slow),
        pytest.param((1, 4, 1), 8, marks=pytest.mark.slow),
    ],
)
def test_dualpipev_equals_the_fp64_oracle(layout, accumulation):
    deep = {**TURNING, "model": {"layers": 2 * layout[1]}}
    recomputed = {**deep, "parallel": {**TURNING["parallel"], **RECOMPUTED["parallel"]}}
    variants = [(accumulation, True, deep), (accumulation, False, recomputed)]
    if layout[0] > 1:
        cut = {**deep, "parallel": {**TURNING["parallel"], **SEQUENCE["parallel"]}}
        variants.append((accumulation, True, cut))
    check_against_the_oracle(layout, variants)
