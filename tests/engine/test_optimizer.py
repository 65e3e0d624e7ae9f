"""The learning rate follows its closed forms; weight decay takes matrices only."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_mode.config.fields import ModelConfig, OptimizerConfig
from megatron_mode.engine.optimizer import adamw, decays, learning_rate, parameter_groups

ULPS = 1e-14


def config_of(schedule: str, peak: float, low: float, warmup: int, decay: int = 0):
    return OptimizerConfig(
        schedule=schedule,
        learning_rate=peak,
        min_learning_rate=low,
        warmup_steps=warmup,
        decay_steps=decay,
    )


def closed_form(config: OptimizerConfig, step: int, steps: int) -> float:
    """Restate the schedules with exact fractions, one case after the other."""
    peak = Fraction(config.learning_rate)
    low = min(Fraction(config.min_learning_rate), peak)
    warmup, decay = config.warmup_steps, config.decay_steps
    if step + 1 <= warmup:
        return float(peak * Fraction(step + 1, warmup))
    if config.schedule == "constant":
        return float(peak)
    if config.schedule == "wsd":
        decay = min(decay, max(steps - warmup, 0))
        left = Fraction(steps - step, decay) if decay else Fraction(1)
        return float(low + (peak - low) * min(left, Fraction(1)))
    left = Fraction(steps - step, steps - warmup)
    if config.schedule == "linear":
        return float(low + (peak - low) * left)
    # (1 + cos(pi (1 - x))) / 2 = sin(pi x / 2)^2
    return float(low) + float(peak - low) * math.sin(math.pi * float(left) / 2) ** 2


SCHEDULES = st.sampled_from(["constant", "cosine", "linear", "wsd"])
RATES = st.floats(1e-8, 10.0)


@st.composite
def runs(draw):
    steps = draw(st.integers(1, 10_000))
    config = config_of(
        draw(SCHEDULES),
        draw(RATES),
        draw(st.one_of(st.just(0.0), RATES)),
        draw(st.integers(0, steps - 1)),
        draw(st.integers(0, steps + 5)),
    )
    return config, steps


@given(runs(), st.data())
def test_rates_equal_their_closed_forms(run, data):
    config, steps = run
    step = data.draw(st.integers(0, steps - 1))
    rate = learning_rate(config, step, steps)
    assert rate == pytest.approx(closed_form(config, step, steps), rel=1e-11, abs=1e-300)


@given(runs(), st.data())
def test_rates_never_exceed_the_peak_and_move_one_way(run, data):
    """Up in the warm-up, never up after it, and never below the minimum."""
    config, steps = run
    peak = config.learning_rate
    begin = data.draw(st.integers(0, steps - 1))
    rates = [learning_rate(config, step, steps) for step in range(begin, min(begin + 50, steps))]
    assert max(rates) <= peak * (1 + ULPS)
    for step, (one, other) in enumerate(pairwise(rates), start=begin):
        if step + 1 < config.warmup_steps:
            assert one < other
        else:
            assert other <= one * (1 + ULPS)
    low = min(config.min_learning_rate, peak)
    if begin >= config.warmup_steps:
        assert min(rates) >= low * (1 - ULPS)


@given(runs())
def test_warm_up_reaches_the_peak_and_decays_end_at_the_minimum(run):
    config, steps = run
    peak, low = config.learning_rate, min(config.min_learning_rate, config.learning_rate)
    if config.warmup_steps:
        assert learning_rate(config, config.warmup_steps - 1, steps) == pytest.approx(peak)
    end = learning_rate(config, steps, steps)
    is_flat = config.schedule == "constant" or (config.schedule == "wsd" and not config.decay_steps)
    assert end == pytest.approx(peak if is_flat else low, rel=1e-12, abs=1e-300)


def test_rates_of_a_short_run_by_hand():
    """Peak 8, minimum 0, two steps of warm-up, ten steps."""
    expected = {
        "constant": [4, 8, 8, 8, 8, 8, 8, 8, 8, 8],
        "linear": [4, 8, 8, 7, 6, 5, 4, 3, 2, 1],
        "wsd": [4, 8, 8, 8, 8, 8, 8, 6, 4, 2],
    }
    for schedule, rates in expected.items():
        config = config_of(schedule, 8.0, 0.0, 2, decay=4)
        assert [learning_rate(config, step, 10) for step in range(10)] == rates
    config = config_of("cosine", 8.0, 0.0, 2)
    assert learning_rate(config, 6, 10) == pytest.approx(4)
    assert learning_rate(config, 4, 10) == pytest.approx(4 + 4 / math.sqrt(2))


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_takes_matrices_and_the_mode_weight(tied, alone):
    from megatron_mode.model.decoder import Decoder
    from megatron_mode.model.layers import transformer_config

    model = ModelConfig(
        name="test",
        layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        attention_heads=2,
        kv_heads=1,
        seq_len=8,
        vocab_size=128,
        tied_embeddings=tied,
    )
    decoder = Decoder(model, transformer_config(model, 1, torch.float32))
    named = [
        (f"{link}.{n}", p) for link, m in decoder.named_links() for n, p in m.named_parameters()
    ]
    layers = [f"layers.{index}.layer" for index in range(2)]
    plain = {
        f"{layer}.{norm}_layernorm.weight" for layer in layers for norm in ("input", "pre_mlp")
    }
    plain |= {"mode_head.norm.weight", "mode_head.mode_bias"}
    assert {name for name, parameter in named if not decays(name, parameter)} == plain
    groups = parameter_groups(named, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(parameter): name for name, parameter in named}
    found = [{names[id(parameter)] for parameter in group["params"]} for group in groups]
    assert found == [{name for name, _ in named} - plain, plain]
    assert sum(len(group["params"]) for group in groups) == len(list(decoder.parameters()))


def test_no_group_is_empty():
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    assert [g["weight_decay"] for g in parameter_groups([("a", matrix)], 0.3)] == [0.3]
    assert [g["weight_decay"] for g in parameter_groups([("b", bias)], 0.3)] == [0.0]


def test_an_update_is_that_of_the_paper():
    """Loshchilov and Hutter, algorithm 2, restated in fp64 for three steps."""
    config = OptimizerConfig(learning_rate=0.05, beta1=0.8, beta2=0.9, epsilon=1e-3)
    start = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    parameter = torch.nn.Parameter(start.clone())
    optimizer = adamw(config, [("matrix", parameter)])
    weight = start.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        grad = torch.full_like(start, 0.3 * step) * torch.tensor([[1.0, -1.0], [2.0, 0.1]])
        parameter.grad = grad
        optimizer.step()
        first = 0.8 * first + 0.2 * grad.double()
        second = 0.9 * second + 0.1 * grad.double() ** 2
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
        weight = weight * (1 - 0.05 * config.weight_decay) - 0.05 * update
    torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-6, atol=1e-7)


def test_apex_gets_the_same_settings(monkeypatch):
    """FusedAdam decays weights apart from the gradient only in the mode that is asked for."""
    given = {}

    def fused_adam(groups, **settings):
        given.update(settings, groups=groups)
        return torch.optim.SGD(groups, lr=settings["lr"])

    fake = SimpleNamespace(FusedAdam=fused_adam)
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(optimizers=fake))
    monkeypatch.setitem(sys.modules, "apex.optimizers", fake)
    config = OptimizerConfig(
        learning_rate=0.5, beta1=0.8, beta2=0.9, epsilon=1e-7, weight_decay=0.2
    )
    named = [
        ("a.weight", nn.Parameter(torch.ones(2, 2))),
        ("norm.weight", nn.Parameter(torch.ones(2))),
    ]
    adamw(config, named, "apex")
    groups = given.pop("groups")
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert given == {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-7, "adam_w_mode": True}
