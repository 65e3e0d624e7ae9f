"""End the chain: final norm and mode head, then the LM head, tied to the embedding or not.

T row length, B rows, D hidden size, V vocabulary (a local shard keeps the letter).
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, empty, nn

from megatron_mode.config.fields import ModelConfig
from megatron_mode.model.elementwise import norm_class
from megatron_mode.model.layers import DecoderConfig, Embedding


class HeadInputs(NamedTuple):
    """Hand the loss what it fuses: hidden states and the parameters of both heads, in its order."""

    hidden_TBD: Tensor
    local_lm_weight_VD: Tensor
    mode_weight_D: Tensor
    mode_bias: Tensor


class ModeHead(nn.Module):
    """Normalise the last hidden states and hold the mode head (one logit a token)."""

    def __init__(self, model: ModelConfig, config: DecoderConfig) -> None:
        super().__init__()
        dtype = config.params_dtype
        self.norm = norm_class(config.norm)(config, model.hidden_size, eps=model.norm_epsilon)
        self.mode_weight = nn.Parameter(empty(model.hidden_size, dtype=dtype))
        self.mode_bias = nn.Parameter(empty(1, dtype=dtype))

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Turn (hidden_TBD, *context) into (normed hidden_TBD, mode_weight_D, mode_bias)."""
        return self.norm(inputs[0]), self.mode_weight, self.mode_bias


class LMHead(nn.Module):
    """Hold an untied LM head, sharded along the vocabulary; the loss multiplies, not the head."""

    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(
            model.hidden_size,
            model.vocab_size,
            config=config,
            init_method=nn.init.zeros_,
            bias=False,
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> HeadInputs:
        """Add the local weight shard to the mode head's outputs."""
        return HeadInputs(inputs[0], self.linear.weight, *inputs[1:])


def tied_lm_head(embedding: Embedding, inputs: tuple[Tensor, ...]) -> HeadInputs:
    """Do what LMHead does with the embedding's weight."""
    return HeadInputs(inputs[0], embedding.word.weight, *inputs[1:])
