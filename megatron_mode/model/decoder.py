"""List the links of the decoder's chain, from embedding to heads, and run it on one device.

The chain ends with the final norm and the mode head, then the LM head, tied to the embedding or
not. T row length, B rows, D hidden size, V vocabulary (a local shard keeps the letter).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, empty, nn

from megatron_mode.config.fields import ModelConfig
from megatron_mode.model.attention import AttentionContext, attention_context
from megatron_mode.model.elementwise import norm_class
from megatron_mode.model.layers import DecoderConfig, DecoderLayer, Embedding


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

    def __init__(self, model: ModelConfig, config: DecoderConfig) -> None:
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


class Link(NamedTuple):
    """Describe one link: its global name, how to build it, and whether it re-uses an earlier one.

    `shared_forward(module, inputs)` runs on the module that `shares` names; such a link owns no
    parameters of its own.
    """

    name: str
    build: Callable[..., nn.Module]
    args: tuple[Any, ...]
    shares: str | None = None
    shared_forward: Callable[[Any, Any], Any] | None = None


def decoder_links(model: ModelConfig, config: DecoderConfig) -> list[Link]:
    """Return the chain: embedding, layers.0 ... layers.(L-1), mode_head, lm_head."""
    links = [Link("embedding", Embedding, (model, config))]
    links += [
        Link(f"layers.{index}", DecoderLayer, (config, index + 1)) for index in range(model.layers)
    ]
    links.append(Link("mode_head", ModeHead, (model, config)))
    if model.tied_embeddings:
        tied = Link("lm_head", Embedding, (model, config), "embedding", tied_lm_head)
        return [*links, tied]
    return [*links, Link("lm_head", LMHead, (model, config))]


def context_builder(
    model: ModelConfig, config: DecoderConfig
) -> Callable[[Tensor], AttentionContext]:
    """Return what builds the attention context of a micro-batch from its positions [B, T]."""
    return partial(
        attention_context,
        head_size=model.hidden_size // model.attention_heads,
        rope_base=model.rope_base,
        dtype=config.params_dtype,
        core=config.attention_core,
    )


class Decoder(nn.Module):
    """Run the chain in one process: for scoring, generation and as a test's subject."""

    def __init__(self, model: ModelConfig, config: DecoderConfig) -> None:
        super().__init__()
        self.context = context_builder(model, config)
        self.links = decoder_links(model, config)
        self.owned = nn.ModuleDict(
            {link.name.replace(".", "/"): link.build(*link.args)
             for link in self.links if link.shares is None}
        )  # fmt: skip

    def named_links(self) -> list[tuple[str, nn.Module]]:
        """Return (global name, module) of the links that own parameters."""
        return [(name.replace("/", "."), module) for name, module in self.owned.items()]

    def forward(self, input_BT: Tensor, position_BT: Tensor) -> HeadInputs:
        """Return final hidden states [T, B, D] with the parameters of both heads."""
        state: Any = (input_BT, *self.context(position_BT))
        modules = dict(self.named_links())
        for link in self.links:
            if link.shares is not None and link.shared_forward is not None:
                state = link.shared_forward(modules[link.shares], state)
            else:
                state = modules[link.name](state)
        return HeadInputs(*state)
