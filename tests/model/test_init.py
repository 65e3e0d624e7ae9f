"""Initial weights follow one table, whatever the number of parts and the order of drawing."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.model.init import TABLE, draw, full_shape, initialise, rule_of
from megatron_mode.model.sharding import (
    Cut,
    join_parts,
    mark_parameters,
    parameter_cuts,
    take_part,
)

RULES = {
    "embedding.word.weight": "normal",
    "layers.0.layer.input_layernorm.weight": "ones",
    "layers.0.layer.self_attention.linear_proj.weight": "residual",
    "layers.0.layer.self_attention.linear_qkv.weight": "normal",
    "layers.0.layer.pre_mlp_layernorm.weight": "ones",
    "layers.0.layer.mlp.linear_fc1.weight": "normal",
    "layers.0.layer.mlp.linear_fc2.weight": "residual",
    "mode_head.norm.weight": "ones",
    "mode_head.mode_weight": "normal",
    "mode_head.mode_bias": "zeros",
    "lm_head.linear.weight": "normal",
}
# Dimension and blocks of every weight that is cut: Megatron-LM, section 3.
CUTS = {
    "embedding.word.weight": Cut(0),
    "layers.0.layer.self_attention.linear_qkv.weight": Cut(0),
    "layers.0.layer.self_attention.linear_proj.weight": Cut(1),
    "layers.0.layer.mlp.linear_fc1.weight": Cut(0, blocks=2),
    "layers.0.layer.mlp.linear_fc2.weight": Cut(1),
    "lm_head.linear.weight": Cut(0),
}


def named_parameters(decoder):
    return {f"{link}.{n}": p for link, m in decoder.named_links() for n, p in m.named_parameters()}


def named_cuts(decoder):
    return {
        f"{link}.{n}": c for link, m in decoder.named_links() for n, c in parameter_cuts(m).items()
    }


def weights_of(decoder):
    return {
        name: parameter.detach().clone() for name, parameter in named_parameters(decoder).items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_matches_one_meaning(tied, model_config, build_decoder):
    """No name falls through the table, and no order of its rows would change a rule."""
    decoder = build_decoder(model_config(layers=1, tied_embeddings=tied))
    names = set(named_parameters(decoder))
    assert names == set(RULES) - ({"lm_head.linear.weight"} if tied else set())
    for name in names:
        assert {rule for pattern, rule in TABLE if re.search(pattern, name)} == {RULES[name]}
        assert rule_of(name) == RULES[name]


def test_an_unknown_parameter_is_refused():
    with pytest.raises(KeyError, match=r"layers\.0\.mystery"):
        rule_of("layers.0.mystery")


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_weights_have_the_spread_of_their_rule(layers, model_config, build_decoder):
    model = model_config(layers=layers, hidden_size=96, ffn_hidden_size=128, init_std=0.05)
    for name, weight in weights_of(build_decoder(model)).items():
        rule = RULES[re.sub(r"layers\.\d+", "layers.0", name)]
        if rule in ("ones", "zeros"):
            assert torch.equal(weight, torch.full_like(weight, float(rule == "ones")))
            continue
        std = 0.05 / math.sqrt(2 * layers) if rule == "residual" else 0.05
        # Of n normal numbers the mean is off by std / sqrt(n), the spread by std / sqrt(2 n).
        count = weight.numel()
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(count), name
        assert abs(float(weight.std()) - std) < 5 * std / math.sqrt(2 * count), name


def test_residual_additions_sum_to_the_variance_of_one(model_config):
    """2 * layers additions of variance init_std^2 / (2 * layers) each (GPT-2, section 2.3)."""
    model = model_config(layers=8)
    names = [f"layers.{i}.layer.{m}.weight" for i in range(8)
             for m in ("self_attention.linear_proj", "mlp.linear_fc2")]  # fmt: skip
    variance = sum(float(draw(name, (64, 64), model, 0).var()) for name in names)
    assert variance == pytest.approx(model.init_std**2, rel=0.02)


def test_each_weight_is_drawn_for_its_name_and_seed(model_config):
    """Nothing depends on what was drawn before; equal shapes under other names differ."""
    model = model_config()
    names = [f"layers.{i}.layer.mlp.linear_fc1.weight" for i in range(4)]
    weights = [draw(name, (8, 8), model, seed) for name in names for seed in (0, 1)]
    for index, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[index + 1 :])
    torch.manual_seed(99)
    assert torch.equal(draw(names[0], (8, 8), model, 0), weights[0])
    assert draw(names[0], (8, 8), model, 0).dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_links_may_be_filled_in_any_order_and_alone(tied, model_config, build_decoder):
    """So every pipeline stage draws what the whole model has at its place."""
    model = model_config(tied_embeddings=tied)
    whole, other = weights_of(build_decoder(model, seed=5)), build_decoder(model, seed=None)
    for link in reversed(other.named_links()):
        initialise([link], model, 5)
    for name, weight in weights_of(other).items():
        assert torch.equal(weight, whole[name]), name


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_weights_join_to_the_whole(parts, model_config, build_decoder):
    """Each part is drawn on its own, into parameters of the size of a part."""
    model = model_config(attention_heads=8, kv_heads=4)
    whole = weights_of(build_decoder(model, seed=3))
    shards = []
    for part in range(parts):
        decoder = build_decoder(model, seed=None)
        cuts = named_cuts(decoder)
        for name, parameter in named_parameters(decoder).items():
            if name in cuts:
                dim = cuts[name].dim
                parameter.data = parameter.data.narrow(dim, 0, parameter.shape[dim] // parts)
            assert full_shape(parameter, cuts.get(name), parts) == tuple(whole[name].shape)
        initialise(decoder.named_links(), model, 3, part=part, parts=parts)
        shards.append(weights_of(decoder))
    for name, weight in whole.items():
        mine = [shard[name] for shard in shards]
        if name in cuts:
            assert all(not torch.equal(a, b) for a, b in pairwise(mine)), name
            mine = [join_parts(mine, cuts[name])]
        assert all(torch.equal(part, weight) for part in mine), name


@given(st.data())
def test_join_undoes_take(data):
    dims = data.draw(st.integers(1, 3))
    cut = Cut(data.draw(st.integers(0, dims - 1)), data.draw(st.integers(1, 3)))
    parts = data.draw(st.integers(1, 5))
    shape = [data.draw(st.integers(1, 4)) for _ in range(dims)]
    shape[cut.dim] *= cut.blocks * parts
    full = torch.arange(math.prod(shape)).view(shape)
    shards = [take_part(full, cut, part, parts) for part in range(parts)]
    assert all(shard.numel() == full.numel() // parts for shard in shards)
    assert torch.equal(join_parts(shards, cut), full)


def test_a_part_of_the_fused_mlp_has_gate_and_up():
    """Rows g0 g1 g2 g3 u0 u1 u2 u3: the second of two parts is g2 g3 u2 u3."""
    rows = torch.arange(8)
    assert take_part(rows, Cut(0, blocks=2), 1, 2).tolist() == [2, 3, 6, 7]
    assert take_part(rows, Cut(0), 1, 2).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("tied", [True, False])
def test_cuts_are_those_of_megatron(tied, model_config, build_decoder):
    decoder = build_decoder(model_config(layers=1, tied_embeddings=tied))
    assert named_cuts(decoder) == {n: c for n, c in CUTS.items() if not (tied and "lm_head" in n)}


def test_marks_are_those_that_megatron_sets_itself(model_config, alone):
    """Let megatron-core draw the weights once: it then marks its parameters."""
    from megatron_mode.model.decoder import Decoder
    from megatron_mode.model.layers import transformer_config

    def marks(decoder):
        return {
            name: tuple(
                getattr(parameter, mark, None)
                for mark in ("tensor_model_parallel", "partition_dim", "partition_stride")
            )
            for name, parameter in named_parameters(decoder).items()
        }

    model = model_config()
    config = transformer_config(model, 1, torch.float32)
    ours = Decoder(model, config)
    for _, module in ours.named_links():
        mark_parameters(module)
    config.perform_initialization = True
    theirs = marks(Decoder(model, config))
    sharded = [name for name, mark in theirs.items() if mark[0]]
    assert len(sharded) == 2 + 4 * model.layers
    for name, mark in marks(ours).items():
        assert mark == (theirs[name] if name in sharded else (None, None, None)), name
