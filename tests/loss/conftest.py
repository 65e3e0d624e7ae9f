"""Give the loss tests an independent truth: formulas in fp64, gradients written out by hand.

Letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from megatron_mode.kernels.mode_loss import LossOutput, Targets, lm_pass, mode_loss


@dataclass(frozen=True)
class Case:
    """Hold one input of the op, hidden states flat."""

    hidden_ND: Tensor
    lm_weight_VD: Tensor
    mode_weight_D: Tensor
    mode_bias: Tensor
    targets: Targets
    vocab_size: int

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden_ND, self.lm_weight_VD, self.mode_weight_D, self.mode_bias

    def leaves(self, needs: tuple[bool, ...] = (True,) * 4) -> Case:
        """Return the case with fresh leaves."""
        fresh = [
            value.detach().clone().requires_grad_(need)
            for value, need in zip(self.parameters, needs, strict=True)
        ]
        return replace(
            self,
            hidden_ND=fresh[0],
            lm_weight_VD=fresh[1],
            mode_weight_D=fresh[2],
            mode_bias=fresh[3],
        )


@dataclass(frozen=True)
class Truth:
    """Hold the sums, the token losses and the gradients of lm_up * lm_sum + mode_up * mode_sum."""

    lm_sum: float
    mode_sum: float
    nll_N: np.ndarray
    bce_N: np.ndarray
    logit_N: np.ndarray
    gradients: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def truth_of(case: Case, lm_up: float = 1.0, mode_up: float = 1.0, z_weight: float = 0.0) -> Truth:
    """Evaluate the formulas of the loss in fp64."""
    hidden, weight, head, bias = (value.detach().double().numpy() for value in case.parameters)
    target, a, label, c = (
        getattr(case.targets, name).detach().numpy()
        for name in ("target_BT", "lm_weight_BT", "mode_label_BT", "mode_weight_BT")
    )
    a, label, c = a.astype(np.float64), label.astype(np.float64), c.astype(np.float64)
    logit_NV = hidden @ weight[: case.vocab_size].T
    lse_N = np.array([np.logaddexp.reduce(row) for row in logit_NV]).reshape(len(hidden))
    rows = np.arange(len(hidden))
    safe = np.where(a != 0, target, 0)
    nll_N = np.where(a != 0, lse_N - logit_NV[rows, safe], 0)
    z_N = hidden @ head + bias.reshape(())
    bce_N = np.where(c != 0, np.logaddexp(0, z_N) - label * z_N, 0)

    dlogit_NV = np.exp(logit_NV - lse_N[:, None]) * (1 + 2 * z_weight * lse_N)[:, None]
    dlogit_NV[rows, safe] -= 1
    dlogit_NV *= lm_up * a[:, None]
    dz_N = mode_up * c * (np.exp(-np.logaddexp(0, -z_N)) - label)
    d_weight = np.zeros_like(weight)
    d_weight[: case.vocab_size] = dlogit_NV.T @ hidden
    return Truth(
        lm_sum=float((a * (nll_N + z_weight * lse_N**2)).sum()),
        mode_sum=float((c * bce_N).sum()),
        nll_N=nll_N,
        bce_N=bce_N,
        logit_N=np.where(c != 0, z_N, 0),
        gradients=(
            dlogit_NV @ weight[: case.vocab_size] + np.outer(dz_N, head),
            d_weight,
            dz_N @ hidden,
            dz_N.sum().reshape(bias.shape),
        ),
    )


def make_case(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    padded_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    mask: str = "some",
    seed: int = 0,
) -> Case:
    """Draw a case; `mask` is the share of tokens without loss: none, some (independent), all."""
    draw = torch.Generator().manual_seed(seed)
    share = {"none": 0.0, "some": 0.4, "all": 1.0}[mask]

    def weights() -> Tensor:
        kept = torch.rand(tokens, generator=draw) >= share
        return (torch.rand(tokens, generator=draw) + 0.5) * kept

    rows = padded_size or vocab_size
    scale = 2 / hidden_size**0.5
    return Case(
        hidden_ND=torch.randn(tokens, hidden_size, generator=draw).to(dtype),
        lm_weight_VD=(torch.randn(rows, hidden_size, generator=draw) * scale).to(dtype),
        mode_weight_D=torch.randn(hidden_size, generator=draw).to(dtype),
        mode_bias=torch.randn(1, generator=draw).to(dtype),
        targets=Targets(
            torch.randint(0, vocab_size, (tokens,), generator=draw),
            weights(),
            torch.rand(tokens, generator=draw).round(),
            weights(),
        ),
        vocab_size=vocab_size,
    )


def plain_sums(case: Case) -> tuple[Tensor, Tensor]:
    """Return both sums as plain torch has them, in the dtype of the inputs."""
    targets = case.targets
    rows = targets.lm_weight_BT.nonzero().squeeze(1)
    logit_nV = case.hidden_ND[rows] @ case.lm_weight_VD[: case.vocab_size].T
    nll_n = cross_entropy(logit_nV.float(), targets.target_BT[rows], reduction="none")
    z_N = case.hidden_ND @ case.mode_weight_D + case.mode_bias
    mode_sum = binary_cross_entropy_with_logits(
        z_N.float(), targets.mode_label_BT, weight=targets.mode_weight_BT, reduction="sum"
    )
    return (targets.lm_weight_BT[rows] * nll_n).sum(), mode_sum


def relative_error(value: Tensor | np.ndarray, truth: np.ndarray) -> float:
    """Return the L2 distance relative to the truth, absolute where the truth is below 1.

    A loss or gradient that is small because probabilities cancel (p - 1 at p = 0.999999) carries
    the rounding of its terms, which are of size 1.
    """
    array = value.detach().double().numpy() if isinstance(value, Tensor) else value
    return float(np.linalg.norm(array - truth)) / max(float(np.linalg.norm(truth)), 1.0)


def run_case(case: Case, **options: object) -> LossOutput:
    """Run the op on the case."""
    from megatron_mode.kernels.mode_loss import VocabShard

    shard = VocabShard(vocab_size=case.vocab_size)
    return mode_loss(*case.parameters, case.targets, shard=shard, **options)


@pytest.fixture(name="make_case")
def _make_case() -> Callable[..., Case]:
    return make_case


@pytest.fixture(name="truth_of")
def _truth_of() -> Callable[..., Truth]:
    return truth_of


@pytest.fixture(name="plain_sums")
def _plain_sums() -> Callable[[Case], tuple[Tensor, Tensor]]:
    return plain_sums


@pytest.fixture(name="relative_error")
def _relative_error() -> Callable[..., float]:
    return relative_error


@pytest.fixture(name="run_case")
def _run_case() -> Callable[..., LossOutput]:
    return run_case


@pytest.fixture
def small_pieces() -> Callable[[int], AbstractContextManager[None]]:
    """Give `chunked` a small buffer of logits, so that small cases take several pieces."""

    @contextmanager
    def limited(logits_bytes: int) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("CPU_LOGITS_BYTES", "CPU_COLUMNS_BYTES"):
                patch.setattr(lm_pass, name, logits_bytes)
            for name in ("ROWS_MIN", "COLUMNS_MIN"):
                patch.setattr(lm_pass, name, 1)
            yield

    return limited


@pytest.fixture(params=["triton", "chunked", "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)
