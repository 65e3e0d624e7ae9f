"""Parameters and FLOPs by arithmetic equal those of the model that is built and run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mode.config.fields import LossConfig, ModelConfig
from megatron_mode.config.presets import find_configs, read_mapping
from megatron_mode.kernels.mode_loss import Targets
from megatron_mode.loss.mode_loss import ModeLoss
from megatron_mode.model.size import (
    Parameters,
    TokenFlops,
    parameters,
    training_flops,
)

PRESETS = sorted(path.stem for path in (find_configs() / "model").glob("*.yaml"))
ROWS = 2
# Which component a module's matrix products belong to.
COMPONENTS = {
    "linear_qkv": "attention_matrices",
    "linear_proj": "attention_matrices",
    "core_attention": "attention_scores",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}


def preset(name: str) -> ModelConfig:
    fields = read_mapping(find_configs() / "model" / f"{name}.yaml")
    return ModelConfig.model_validate({"vocab_size": 8192} | fields)


def component_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    if "mode_weight" in name or "mode_bias" in name:
        return "mode_head"
    if name.startswith("lm_head"):
        return "lm_head"
    if name.startswith("embedding"):
        return "embedding"
    return "attention" if "self_attention" in name else "mlp"


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_a_preset_equal_those_of_its_decoder(name, build_decoder):
    model = preset(name)
    with torch.device("meta"):
        decoder = build_decoder(model, seed=None)
    counts: Counter[str] = Counter()
    for link, module in decoder.named_links():
        for parameter_name, parameter in module.named_parameters():
            counts[component_of(f"{link}.{parameter_name}")] += parameter.numel()
    assert parameters(model) == Parameters(*(counts[field] for field in Parameters._fields))
    assert parameters(model).total == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize(("name", "billions"), [("7b", 6.74), ("13b", 13.02), ("70b", 70.55)])
def test_parameters_are_those_that_the_papers_state(name, billions):
    """Llama 2 7B and 13B and Llama 3 70B, as their checkpoints count; ours add the mode head."""
    model = preset(name)
    assert round((parameters(model).total - parameters(model).mode_head) / 1e9, 2) == billions


class Training(nn.Module):
    """Hold decoder and loss, so that the counter sees both by name."""

    def __init__(self, decoder: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.loss = ModeLoss(LossConfig(), vocab_size)

    def forward(self, input_BT, position_BT):
        heads = self.decoder(input_BT, position_BT)
        ones_BT = torch.ones(input_BT.shape)
        targets = Targets(input_BT, ones_BT, ones_BT, ones_BT)
        return self.loss(*heads, targets)


def matrix_vector_flops(matrix, vector, *_, **__):
    return 2 * matrix[0] * matrix[1]


def outer_flops(matrix, left, right, *_, **__):
    return 2 * left[0] * right[0]


def count_flops(decoder, model):
    """Return FLOPs a token by component, as the operations that ran have them.

    FlopCounterMode knows products of two matrices only. The mode head is a matrix-vector product
    forward and, backward, an outer product (dH += dz w^T) and a matrix-vector product
    (dw = H^T dz): they are counted here by formulas of our own. RMSNorm's backward takes one
    matrix-vector product too, which like all element-wise work is left out. With these nothing
    that ran is missing.
    """
    formulas = {torch.ops.aten.mv: matrix_vector_flops, torch.ops.aten.addr_: outer_flops}
    training = Training(decoder, model.vocab_size)
    input_BT = torch.randint(0, model.vocab_size, (ROWS, model.seq_len))
    position_BT = torch.arange(model.seq_len).expand(ROWS, -1)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        output = training(input_BT, position_BT)
        (output.lm_sum + output.mode_sum).backward()
    flops: Counter[str] = Counter()
    whole = counter.get_flop_counts()["Global"]
    for name, operations in counter.get_flop_counts().items():
        component = COMPONENTS.get(name.rsplit(".", 1)[-1])
        if component:
            flops[component] += sum(operations.values())
    loss = counter.get_flop_counts()["Training.loss"]
    # The loss multiplies matrices for the LM head only; what is left there is the mode head. The
    # counter does not ascribe the outer product, of the backward pass, to a module.
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    flops["lm_head"] = sum(loss.pop(product, 0) for product in products)
    flops["mode_head"] = sum(loss.values()) + whole.get(torch.ops.aten.addr_, 0)
    tokens = ROWS * model.seq_len
    norms = 2 * model.hidden_size * (2 * model.layers + 1) * tokens
    assert sum(flops.values()) + norms == sum(whole.values())
    return TokenFlops(*(flops[field] / tokens for field in TokenFlops._fields))


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_training_flops_equal_those_that_run(tied, kv_heads, model_config, build_decoder):
    model = model_config(tied_embeddings=tied, kv_heads=kv_heads)
    assert count_flops(build_decoder(model), model) == training_flops(model)


def test_flops_follow_the_rule_of_six_times_the_parameters():
    """6 * (parameters without lookups and norms) + 12 * L * D * T (PaLM, appendix B)."""
    model = preset("7b")
    count = parameters(model)
    matrices = count.attention + count.mlp + count.lm_head + model.hidden_size
    scores = 12 * model.layers * model.hidden_size * model.seq_len
    assert training_flops(model).total == 6 * matrices + scores


def test_a_vocabulary_that_is_not_resolved_is_refused(model_config):
    with pytest.raises(ValueError, match="vocab_size is unset"):
        parameters(model_config(vocab_size=None))
