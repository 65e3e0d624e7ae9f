"""Make the batch that every implementation gets, and its truth in fp64.

    dlogit_iv = softmax(logit_i)_v - [v = target_i]        dz_i = sigmoid(z_i) - m_i
    dH = dlogit W + dz w^T,   dW = dlogit^T H,   dw = H^T dz

Logits and mode logits have a standard deviation near 1, as at the start of training. The softmax
is then flat: an implementation that skips small gradients skips nearly all of them here, which
the error of the gradients shows.

Letters: N tokens, R tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# 64 MiB of fp64 logits at V = 32768, 251 MiB at V = 128256.
TRUTH_ROWS = 256
# Rows of a gradient that are widened to fp64 at a time.
ERROR_ROWS = 4096


class Case(NamedTuple):
    """Name one table of the benchmark."""

    shape: tuple[int, int, int]
    """Tokens, hidden size, vocabulary."""
    dtype: str
    """Of hidden states and weights: fp32 or bf16."""
    device: str
    threads: int


class MeasurementError(RuntimeError):
    """Report that a measurement gave no usable number; the message is the reason."""


@dataclass(frozen=True)
class Inputs:
    """Hold leaves that want a gradient, and the targets; every token has weight 1."""

    hidden_ND: Tensor
    lm_weight_VD: Tensor
    mode_weight_D: Tensor
    mode_bias: Tensor
    target_N: Tensor
    mode_label_N: Tensor
    weight_N: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Tensors that get a gradient, by name."""
        return {
            "hidden": self.hidden_ND,
            "lm_weight": self.lm_weight_VD,
            "mode_weight": self.mode_weight_D,
            "mode_bias": self.mode_bias,
        }

    def clear_gradients(self) -> None:
        """Free the gradients of the last call."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def first(self, tokens: int) -> Inputs:
        """Return the same problem for the first tokens only."""
        return replace(
            self,
            hidden_ND=self.hidden_ND.detach()[:tokens].requires_grad_(),
            target_N=self.target_N[:tokens],
            mode_label_N=self.mode_label_N[:tokens],
            weight_N=self.weight_N[:tokens],
        )


def make_inputs(case: Case) -> Inputs:
    """Draw the inputs with seed 0 on the device of the case."""
    tokens, hidden_size, vocab_size = case.shape
    generator = torch.Generator(case.device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=generator, device=case.device).mul_(scale)
        return value.to(DTYPES[case.dtype]).requires_grad_()

    def integers(below: int) -> Tensor:
        return torch.randint(0, below, (tokens,), generator=generator, device=case.device)

    return Inputs(
        hidden_ND=draw(tokens, hidden_size),
        lm_weight_VD=draw(vocab_size, hidden_size, scale=hidden_size**-0.5),
        mode_weight_D=draw(hidden_size, scale=hidden_size**-0.5),
        mode_bias=draw(1, scale=0.1),
        target_N=integers(vocab_size),
        mode_label_N=integers(2).float(),
        weight_N=torch.ones(tokens, device=case.device),
    )


class Truth(NamedTuple):
    """Hold the exact loss and gradients of one batch."""

    loss: float
    gradients: dict[str, Tensor]
    """By the names of Inputs.leaves; without the mode bias, whose gradient is one number."""


def exact(inputs: Inputs) -> tuple[Truth, Truth]:
    """Return the truth with the mode head, and that of the LM loss alone."""
    hidden_ND, lm_weight_VD, mode_weight_D, bias = (
        leaf.detach().double() for leaf in inputs.leaves.values()
    )
    hidden_grad_ND, weight_grad_VD = torch.empty_like(hidden_ND), torch.zeros_like(lm_weight_VD)
    lm_sum = hidden_ND.new_zeros(())
    for begin in range(0, len(hidden_ND), TRUTH_ROWS):
        rows = slice(begin, begin + TRUTH_ROWS)
        target_R1 = inputs.target_N[rows, None]
        dlogit_RV = hidden_ND[rows] @ lm_weight_VD.T
        lse_R1 = dlogit_RV.logsumexp(1, keepdim=True)
        lm_sum += (lse_R1 - dlogit_RV.gather(1, target_R1)).sum()
        dlogit_RV.sub_(lse_R1).exp_()
        dlogit_RV.scatter_add_(1, target_R1, -torch.ones_like(lse_R1))
        hidden_grad_ND[rows] = dlogit_RV @ lm_weight_VD
        weight_grad_VD.addmm_(dlogit_RV.T, hidden_ND[rows])

    mode_logit_N, label_N = hidden_ND @ mode_weight_D + bias, inputs.mode_label_N.double()
    mode_sum = binary_cross_entropy_with_logits(mode_logit_N, label_N, reduction="sum")
    dmode_N = mode_logit_N.sigmoid() - label_N
    lm_alone = {"hidden": hidden_grad_ND, "lm_weight": weight_grad_VD}
    with_head = {
        "hidden": hidden_grad_ND + torch.outer(dmode_N, mode_weight_D),
        "lm_weight": weight_grad_VD,
        "mode_weight": hidden_ND.T @ dmode_N,
    }
    return Truth(float(lm_sum + mode_sum), with_head), Truth(float(lm_sum), lm_alone)


def errors(loss: Tensor, inputs: Inputs, truth: Truth) -> tuple[float, float]:
    """Return the relative error of the loss, and the largest relative L2 error of a gradient.

    Raises MeasurementError where the backward pass left no gradient.
    """
    worst = 0.0
    for name, exact_gradient in truth.gradients.items():
        gradient = inputs.leaves[name].grad
        if gradient is None:
            raise MeasurementError(f"the backward pass left no gradient on {name}")
        worst = max(worst, relative_error(gradient, exact_gradient))
    return abs(float(loss.detach().double()) - truth.loss) / abs(truth.loss), worst


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return |value - truth| / |truth| in the L2 norm, widened to fp64 piece by piece."""
    square = truth.new_zeros(())
    for begin in range(0, len(truth), ERROR_ROWS):
        rows = slice(begin, begin + ERROR_ROWS)
        square += (value[rows].double() - truth[rows]).square().sum()
    return float(square.sqrt() / truth.norm())
