"""RMSNorm and SwiGLU with written-out gradients: fewer passes over memory than autograd's graph.

On a CPU torch composes both from five to eight element-wise operations, forward and backward; a
step of the tiny preset spends a tenth of its time there. D hidden size, F feed-forward size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Scale the last dimension to unit root mean square (Zhang and Sennrich, 2019, eq. 4).

    megatron-core builds it as `RMSNorm(config, hidden_size, eps)`; under sequence parallelism the
    weight carries megatron-core's mark, which says that its gradient is a part of the sum.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel

    def forward(self, hidden_D: Tensor) -> Tensor:
        """Normalise [..., D]; torch's fused kernel where there is one (GPUs)."""
        if hidden_D.is_cuda:
            return functional.rms_norm(hidden_D, self.weight.shape, self.weight, self.eps)
        return cast(Callable[..., Tensor], NormRows.apply)(hidden_D, self.weight, self.eps)


def norm_class(name: str) -> Callable[..., nn.Module]:
    """Return the RMSNorm of that name: ours, or TransformerEngine's through megatron-core.

    A class, not a function: megatron-core's specs build classes only.
    """
    if name == "torch":
        return RMSNorm
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    return cast(Callable[..., nn.Module], extension.TENorm)


class NormRows(torch.autograd.Function):
    """Compute y = w * x / sqrt(mean(x^2) + eps) in fp32; save x and one scale a row."""

    @staticmethod
    def forward(ctx: Any, hidden_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalise rows [..., D]; the sum of squares is taken in fp32 for bf16 input."""
        wide_D = hidden_D.float() if hidden_D.dtype == torch.bfloat16 else hidden_D
        square: Tensor = torch.linalg.vector_norm(wide_D, dim=-1, keepdim=True).square_()
        scale = square.div_(hidden_D.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_D, weight_D, scale)
        return (wide_D * scale).mul_(weight_D).to(hidden_D.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale: dw = sum(g * n), dx = scale * (g*w - n * mean(g*w*n))."""
        hidden_D, weight_D, scale = ctx.saved_tensors
        grad_D = grads[0].to(scale.dtype)
        normed_D = hidden_D * scale
        product_D = grad_D * normed_D
        grad_weight_D = product_D.flatten(0, -2).sum(0)
        mean = (product_D @ weight_D.to(scale.dtype)).unsqueeze_(-1).div_(hidden_D.shape[-1])
        torch.mul(grad_D, weight_D, out=product_D)
        product_D.addcmul_(normed_D, mean, value=-1).mul_(scale)
        return product_D.to(hidden_D.dtype), grad_weight_D.to(weight_D.dtype), None


class SwiGLU(torch.autograd.Function):
    """Compute silu(gate) * up for [..., 2F] that holds gate then up (Shazeer, 2020, eq. 6).

    Only the input is saved. The gradient is written into one [..., 2F] tensor, which saves the
    concatenation that autograd would do after splitting.
    """

    @staticmethod
    def forward(ctx: Any, gate_up_F: Tensor) -> Tensor:
        """Gate [..., 2F] into [..., F]."""
        ctx.save_for_backward(gate_up_F)
        gate_F, up_F = gate_up_F.chunk(2, dim=-1)
        return functional.silu(gate_F).mul_(up_F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """With s = silu(gate): d up = g * s, d gate = g * up * s'."""
        (gate_up_F,) = ctx.saved_tensors
        gate_F, up_F = gate_up_F.chunk(2, dim=-1)
        out_F = torch.empty_like(gate_up_F)
        grad_gate_F, grad_up_F = out_F.chunk(2, dim=-1)
        torch.mul(grads[0], functional.silu(gate_F), out=grad_up_F)
        torch.mul(grads[0], up_F, out=grad_gate_F)
        torch.ops.aten.silu_backward(grad_gate_F, gate_F, grad_input=grad_gate_F)
        return out_F


swiglu = cast(Callable[[Tensor], Tensor], SwiGLU.apply)
