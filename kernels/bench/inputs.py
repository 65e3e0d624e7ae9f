"""Make the batch that every implementation gets.

Logits and mode logits have a standard deviation near 1, as at the start of training. The softmax
is then flat: an implementation that skips small gradients skips nearly all of them here, which
`grad_error` shows.

Letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mode.kernels.bench.case import DTYPES, Case


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
    dtype: torch.dtype = getattr(torch, DTYPES[case.dtype])

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=generator, device=case.device).mul_(scale)
        return value.to(dtype).requires_grad_()

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
