"""Hold what an implementation of the LM + mode loss returns. Letters: N tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLosses:
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


def accumulation_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums: fp64 for fp64 hidden states, else fp32."""
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
