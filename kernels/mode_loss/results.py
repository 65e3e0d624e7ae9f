"""Hold what the implementations of the LM + mode loss return.

Letters: N tokens, D hidden size, V columns of this shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLosses(NamedTuple):
    """Hold both sums (differentiable) and the losses of each token (detached)."""

    lm_sum: Tensor
    """sum a_i * (nll_i + z_weight * lse_i^2)."""
    mode_sum: Tensor
    """sum c_i * bce_i."""
    z_loss_sum: Tensor
    """sum a_i * z_weight * lse_i^2, the part of lm_sum that is the z-loss; detached."""
    nll_N: Tensor
    bce_N: Tensor
    mode_logit_N: Tensor
    blocked_N: Tensor
    """Tokens that the blocking policy chose, bool."""


class Kept(NamedTuple):
    """Hold what the forward pass keeps for the backward pass; what is not kept is empty."""

    dlogit_N: Tensor
    """Gradient of mode_sum to the mode logit."""
    lm_weight_N: Tensor
    """LM weights after blocking."""
    lse_N: Tensor
    """Log-sum-exp of the logits over all shards (triton)."""
    logits_nV: Tensor
    """Logits of the shard in the dtype of hidden, where they fit the budget (triton)."""
    hidden_gradient_ND: Tensor
    """Gradient of lm_sum (chunked), summed over the shards; this rank's tokens under sequence
    parallelism."""
    lm_weight_gradient_VD: Tensor
    """Gradient of lm_sum (chunked), of the local shard."""
    mode_weight_gradient_D: Tensor
    """Gradient of mode_sum (chunked)."""


class Saved(NamedTuple):
    """Hold the inputs that the backward pass of `triton` reads again."""

    hidden_ND: Tensor
    """This rank's tokens under sequence parallelism."""
    lm_weight_VD: Tensor
    target_N: Tensor
    mode_weight_N: Tensor
    lm_rows_n: Tensor | None
    mode_weight_D: Tensor | None


class Upstream(NamedTuple):
    """Hold the gradients of both sums, scalars; None where a sum was not used."""

    lm: Tensor | None
    mode: Tensor | None


class Gradients(NamedTuple):
    """Hold the gradients of the inputs, before casts to their dtypes; None where not wanted."""

    hidden_ND: Tensor | None = None
    lm_weight_VD: Tensor | None = None
    mode_weight_D: Tensor | None = None
    mode_bias: Tensor | None = None


def accumulation_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums: fp64 for fp64 hidden states, else fp32."""
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
