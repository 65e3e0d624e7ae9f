"""Count parameters and FLOPs a token by component, from the config alone (no torch).

A matrix multiplication of [m, k] by [k, n] is 2*m*k*n FLOPs; the backward pass of a matrix costs
twice its forward pass. Element-wise work, norms and softmax are left out, as is usual (PaLM,
appendix B). D hidden, F feed-forward, H heads, G key/value groups, K head size, T row length,
V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_mode.config.fields import ModelConfig

TRAINING_FACTOR = 3


class Parameters(NamedTuple):
    """Count parameters by component; a tied LM head counts 0."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    lm_head: int
    mode_head: int

    @property
    def total(self) -> int:
        """Return all parameters."""
        return sum(self)


class LinkParameters(NamedTuple):
    """Count the parameters of one part of a link, with and without weight decay."""

    decayed: int
    plain: int


class TokenFlops(NamedTuple):
    """Count FLOPs a token by component; attention_scores is what depends on row length."""

    attention_matrices: float
    attention_scores: float
    mlp: float
    lm_head: float
    mode_head: float

    @property
    def total(self) -> float:
        """Return all FLOPs a token."""
        return sum(self)


def vocab_size(model: ModelConfig) -> int:
    """Return the padded vocabulary; ValueError when it is not resolved yet."""
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is unset; resolve it from the data first")
    return model.vocab_size


def parameters(model: ModelConfig) -> Parameters:
    """Count the parameters of a model."""
    D, F, L = model.hidden_size, model.ffn_hidden_size, model.layers
    return Parameters(
        embedding=vocab_size(model) * D,
        attention=L * _attention_matrices(model),
        mlp=L * 3 * D * F,
        norms=(2 * L + 1) * D,
        lm_head=0 if model.tied_embeddings else vocab_size(model) * D,
        mode_head=D + 1,
    )


def link_parameters(model: ModelConfig, tensor: int) -> dict[str, LinkParameters]:
    """Count what one of `tensor` equal parts of each link of the chain holds, in the chain's order.

    Matrices are cut; every part holds all norms and the mode head. A tied LM head counts like an
    embedding: on a stage of its own it is a copy.
    """
    D, F = model.hidden_size, model.ffn_hidden_size
    matrices = (_attention_matrices(model) + 3 * D * F) // tensor
    vocabulary = LinkParameters(decayed=vocab_size(model) * D // tensor, plain=0)
    layers = {f"layers.{i}": LinkParameters(matrices, 2 * D) for i in range(model.layers)}
    mode_head = LinkParameters(decayed=D, plain=D + 1)
    return {"embedding": vocabulary, **layers, "mode_head": mode_head, "lm_head": vocabulary}


def training_flops(model: ModelConfig) -> TokenFlops:
    """Count the FLOPs of one token in training, without recomputation.

    Attention is counted dense over the row and the LM head with all V columns, padding included:
    6 * (parameters without embedding lookup) + 12 * L * D * T.
    """
    D, F, L = model.hidden_size, model.ffn_hidden_size, model.layers
    forward = TokenFlops(
        attention_matrices=2.0 * L * _attention_matrices(model),
        attention_scores=4.0 * L * D * model.seq_len,
        mlp=2.0 * L * 3 * D * F,
        lm_head=2.0 * vocab_size(model) * D,
        mode_head=2.0 * D,
    )
    return TokenFlops(*(TRAINING_FACTOR * part for part in forward))


def _attention_matrices(model: ModelConfig) -> int:
    D, K = model.hidden_size, model.hidden_size // model.attention_heads
    return D * K * (model.attention_heads + 2 * model.kv_heads) + D * model.attention_heads * K
