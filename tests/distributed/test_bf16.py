"""bf16 weights with fp32 gradients and master weights, through the engine on gloo.

The truth is a plain loop over micro-batches in one process: each one's bf16 gradients, added up in
fp64. Where no sum is split over tensor ranks the engine must give the same to fp32 precision;
elsewhere it may err as much as the plain loop does, judged by the fp64 oracle.
"""

from __future__ import annotations

import functools
import math

import bf16_rank
import equality_rank
import gloo_world
import oracle_fp64
import pytest
import test_equality
import torch

BF16 = {"run": {"precision": "bf16"}}
# bf16 sums of 16 micro-batches are off by half a percent; the oracle is slow, and takes 4.
VARIANTS = [(4, True, BF16), (4, False, BF16), (16, False, BF16)]
*FEW, MANY = range(len(VARIANTS))
PLAIN_SUMS, ALL_AXES = (1, 2, 2), (2, 2, 2)


def plain_gradients(accumulation, tied, data, sum_dtype):
    """Return {name: gradient of the first step}, micro-batches added up in `sum_dtype`."""
    from megatron_mode.kernels.mode_loss import Targets
    from megatron_mode.loss.mode_loss import ModeLoss
    from megatron_mode.model.decoder import Decoder
    from megatron_mode.model.init import initialise
    from megatron_mode.model.layers import transformer_config

    config = equality_rank.make_config(1, 1, accumulation, tied, data, **BF16)
    model = config.model
    decoder = Decoder(model, transformer_config(model, 1, torch.bfloat16))
    initialise(decoder.named_links(), model, config.run.seed)
    mode_loss = ModeLoss(config.loss, equality_rank.VOCAB_TOKENS)
    rows = equality_rank.make_batches(config.batch.global_rows, model.seq_len)[0]
    total_a, total_c = (sum(float(row[column].sum()) for row in rows) for column in (2, 4))
    named = {f"{link}.{n}": p for link, m in decoder.named_links() for n, p in m.named_parameters()}
    sums = {name: torch.zeros_like(p, dtype=sum_dtype) for name, p in named.items()}
    for begin in range(0, len(rows), 2):
        columns = [torch.stack(column) for column in zip(*rows[begin : begin + 2], strict=True)]
        ids, target, lm_weight, label, mode_weight, position = columns
        heads = decoder(ids, position)
        targets = Targets(target, lm_weight.float(), label.float(), mode_weight.float())
        sums_of = mode_loss(*heads, targets)
        scale = config.loss.mode_weight / total_c
        loss = sums_of.lm_sum / total_a + scale * sums_of.mode_sum
        for name, gradient in zip(
            named, torch.autograd.grad(loss, list(named.values())), strict=True
        ):
            sums[name] += gradient.to(sum_dtype)
    return {name: total.double() for name, total in sums.items()}


@functools.cache
def truths(accumulation, tied, data):
    """Return the plain gradients with sums in fp64 and in bf16."""
    dtypes = (torch.float64, torch.bfloat16)
    return [plain_gradients(accumulation, tied, data, dtype) for dtype in dtypes]


def distance(value, truth):
    return float((value - truth).norm() / truth.norm())


@functools.cache
def results_of(layout):
    """Run the variants in one world; the oracle judges all axes, and takes few micro-batches."""
    variants = VARIANTS if layout == PLAIN_SUMS else VARIANTS[:MANY]
    return gloo_world.run_world(math.prod(layout), bf16_rank.three_steps, layout, variants)


@pytest.mark.distributed
@pytest.mark.parametrize("variant", [*FEW, MANY])
def test_gradients_are_fp32_sums_of_bf16_gradients(variant, alone):
    accumulation, tied, _ = VARIANTS[variant]
    exact, rounded = truths(accumulation, tied, PLAIN_SUMS[2])
    ours = test_equality.join(results_of(PLAIN_SUMS), variant, 0)
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        if tied and name == "embedding.word.weight":
            # One process adds the embedding's and the head's gradient in bf16, two stages do not.
            assert distance(ours[name], truth) <= 4e-3
            continue
        assert distance(ours[name], truth) <= 1e-5, name
        if variant == MANY:  # what bf16 sums would give is far outside
            assert distance(rounded[name], truth) >= 5e-4, name


@pytest.mark.distributed
@pytest.mark.parametrize("variant", FEW)
def test_tensor_ranks_err_no_more_than_one_process(variant, alone):
    accumulation, tied, _ = VARIANTS[variant]
    exact, _ = truths(accumulation, tied, ALL_AXES[2])
    oracle = test_equality.oracle_history(accumulation, tied, ALL_AXES[2])[0][2]
    ours = test_equality.join(results_of(ALL_AXES), variant, 0)
    assert ours.keys() == oracle.keys()
    for name, truth in oracle.items():
        bound = 2 * distance(exact[name], truth) + 4e-3
        assert distance(ours[name], truth) <= bound, name


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [PLAIN_SUMS, ALL_AXES])
def test_losses_follow_the_fp64_oracle(layout):
    for index in FEW:
        accumulation, tied, _ = VARIANTS[index]
        history = test_equality.oracle_history(accumulation, tied, layout[2])
        for rank in results_of(layout):
            for step, loss in enumerate(rank[index][0]):
                assert loss == pytest.approx(history[step][0], rel=2e-3)


@pytest.mark.distributed
@pytest.mark.parametrize("variant", [*FEW, MANY])
def test_master_weights_take_steps_that_bf16_cannot_tell_apart(variant):
    """The first step of AdamW is learning_rate * g / (|g| + epsilon) beside the decay."""
    from megatron_mode.model.init import draw

    config = equality_rank.make_config(1, 1, 1, VARIANTS[variant][1], 1)
    optimizer, results = config.optimizer, results_of(PLAIN_SUMS)
    gradients = test_equality.join(results, variant, 0)
    for rank in results:
        scale = optimizer.clip_grad_norm / rank[variant][1][0]
        for name, master in rank[variant][-1].items():
            start = draw(name, tuple(master.shape), config.model, config.run.seed)
            start = start.bfloat16().double()
            gradient = gradients[name] * scale
            decay = optimizer.weight_decay if oracle_fp64.decays(name) else 0.0
            moved = -optimizer.learning_rate * (
                gradient / (gradient.abs() + optimizer.epsilon) + decay * start
            )
            assert (master - start - moved).norm() <= 1e-2 * moved.norm(), name
            unchanged = (start + moved).bfloat16().double() == start
            if not name.endswith(("norm.weight", "mode_bias")):
                assert unchanged.float().mean() > 0.5, name
