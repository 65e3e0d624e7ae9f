"""Wrap megatron-core's embedding and transformer layer as the links of a chain of layers.

Every link takes and gives (hidden_TBD, *context): T row length, B rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mode.config.fields import ModelConfig
from megatron_mode.model.attention import AttentionContext, DocumentAttention
from megatron_mode.model.attention_cores import CoreName
from megatron_mode.model.elementwise import norm_class, swiglu
from megatron_mode.model.sequence_parallel import (
    GatheringLinear,
    ScatteringEmbedding,
    ScatteringLinear,
)
from megatron_mode.model.size import vocab_size


@dataclass
class DecoderConfig(TransformerConfig):
    """Add to megatron-core's config what our own layers read."""

    attention_core: CoreName = "dense"
    """dense, flex or flash: how `attention_cores` attends."""
    recompute_attention: bool = False
    """Compute the attention core again in the backward pass instead of keeping its insides."""
    norm: str = "torch"
    """torch or transformer_engine: whose RMSNorm runs."""


def transformer_config(
    model: ModelConfig, tensor: int, dtype: torch.dtype, **ours: Any
) -> DecoderConfig:
    """Translate our model config into megatron-core's, with `ours`, fields of DecoderConfig.

    DeepSpeed owns the pipeline, so it is 1. `init.initialise` fills the weights.
    """
    return DecoderConfig(
        **ours,
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.hidden_size // model.attention_heads,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=1,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],  # its default warns on every build
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


class GatedMLP(MLP):
    """Run megatron-core's local MLP with SwiGLU as one operation."""

    def __init__(self, config: TransformerConfig) -> None:
        parts = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.mlp.submodules
        if config.sequence_parallel:
            parts.linear_fc1, parts.linear_fc2 = GatheringLinear, ScatteringLinear
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_TBD: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Return (output [T, B, D], no bias)."""
        gate_up_TBF, _ = self.linear_fc1(hidden_TBD)
        output_TBD, _ = self.linear_fc2(swiglu(gate_up_TBF))
        return output_TBD, None


def layer_spec(config: DecoderConfig) -> ModuleSpec:
    """Take megatron-core's local layer spec; put our attention core, norms and SwiGLU into it."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = spec.submodules
    attention = parts.self_attention.submodules
    attention.core_attention = DocumentAttention
    if config.sequence_parallel:
        attention.linear_qkv, attention.linear_proj = GatheringLinear, ScatteringLinear
    parts.input_layernorm = parts.pre_mlp_layernorm = norm_class(config.norm)
    parts.mlp = GatedMLP
    return spec


class Embedding(nn.Module):
    """Look up token embeddings, sharded along the vocabulary."""

    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.scatters = config.sequence_parallel
        build = ScatteringEmbedding if self.scatters else VocabParallelEmbedding
        self.word = build(
            vocab_size(model), model.hidden_size, init_method=nn.init.zeros_, config=config
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn (input_BT, *context) into (hidden_TBD, *context)."""
        input_BT, *context = inputs
        hidden = self.word(input_BT)
        return (hidden if self.scatters else hidden.transpose(0, 1).contiguous(), *context)


class DecoderLayer(nn.Module):
    """Run one megatron-core transformer layer inside documents."""

    def __init__(self, config: DecoderConfig, number: int) -> None:
        super().__init__()
        self.layer: Any = build_module(layer_spec(config), config=config, layer_number=number)

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Turn (hidden_TBD, *context) into the same with the next hidden states."""
        hidden_TBD, *context = inputs
        hidden_TBD, _ = self.layer(hidden_TBD, attention_mask=AttentionContext(*context))
        return (hidden_TBD, *context)
