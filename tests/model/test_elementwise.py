"""RMSNorm and SwiGLU, whose gradients are written out, equal plain torch in fp64.

D hidden size, F feed-forward size.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn.functional import rms_norm, silu

from megatron_mode.model.elementwise import NormRows, RMSNorm, SwiGLU, swiglu

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 40))
SEEDS = st.integers(0, 2**20)
SCALES = st.sampled_from([1e-4, 1.0, 1e3])


def plain_norm(hidden_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich, eq. 4, in whatever dtype comes in."""
    return hidden_D * torch.rsqrt(hidden_D.square().mean(-1, keepdim=True) + eps) * weight_D


def plain_swiglu(gate_up_F: Tensor) -> Tensor:
    gate_F, up_F = gate_up_F.chunk(2, dim=-1)
    return silu(gate_F) * up_F


def our_norm(hidden_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    config = SimpleNamespace(params_dtype=weight_D.dtype, sequence_parallel=False)
    norm = RMSNorm(config, len(weight_D), eps)
    return functional_call(norm, {"weight": weight_D}, hidden_D)


def draw(shape, seed: int, dtype=torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def upstream_of(output: Tensor) -> Tensor:
    """Draw a gradient that bf16 holds exactly, so that all dtypes get the same."""
    return draw(output.shape, 7, torch.bfloat16).to(output.dtype)


def run(function, inputs) -> list[Tensor]:
    """Return the output and the gradients of all inputs, in fp64."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream_of(output))
    return [value.detach().double() for value in (output, *gradients)]


def assert_close(
    found: list[Tensor], truth: list[Tensor], bound: float, terms: float = 1e-30
) -> None:
    """Compare norms; `terms` is the size of terms that may cancel in the truth."""
    for one, other in zip(found, truth, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= bound * (other.norm() + terms)


@given(SHAPES, SEEDS, SCALES, st.sampled_from([1e-5, 1e-12, 0.5]))
def test_rms_norm_equals_plain_torch(shape, seed, scale, eps):
    inputs = draw(shape, seed, scale=scale), draw(shape[-1:], seed + 1)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        narrow = [value.to(dtype) for value in inputs]
        found = run(lambda x, w: our_norm(x, w, eps), narrow)
        hidden_D, weight_D = (value.double() for value in narrow)
        truth = run(lambda x, w: plain_norm(x, w, eps), (hidden_D, weight_D))
        # In a gradient the part along the row cancels: g*w/rms - n*mean(g*w*n)/rms.
        rms = (hidden_D.square().mean(-1, keepdim=True) + eps).sqrt()
        assert_close(found, truth, bound, float((upstream_of(rms) * weight_D / rms).norm()))


@given(SHAPES, SEEDS, SCALES)
def test_swiglu_equals_plain_torch(shape, seed, scale):
    inputs = (draw((*shape[:-1], 2 * shape[-1]), seed, scale=scale),)
    assert_close(run(swiglu, inputs), run(plain_swiglu, inputs), 1e-12)
    narrow = (inputs[0].float(),)
    truth = run(plain_swiglu, (narrow[0].double(),))
    assert_close(run(swiglu, narrow), truth, 1e-5)


def test_written_out_gradients_pass_gradcheck():
    hidden_D = draw((3, 2, 5), 0).requires_grad_()
    weight_D = draw((5,), 1).requires_grad_()
    assert gradcheck(lambda x, w: NormRows.apply(x, w, 1e-5), (hidden_D, weight_D))
    assert gradcheck(SwiGLU.apply, draw((3, 2, 8), 2).requires_grad_())


def test_gradients_flow_through_views_that_are_not_contiguous():
    inputs = draw((4, 3, 6), 0), draw((6,), 1)

    def check(ours, plain, count):
        turned = [lambda x, *w, f=f: f(x.transpose(0, 1), *w) for f in (ours, plain)]
        assert_close(*(run(function, inputs[:count]) for function in turned), 1e-12)

    check(swiglu, plain_swiglu, 1)
    check(lambda x, w: our_norm(x, w, 1e-5), lambda x, w: plain_norm(x, w, 1e-5), 2)


def test_a_row_of_zeros_has_a_finite_gradient():
    output, grad_D, _ = run(lambda x, w: our_norm(x, w, 1e-5), (torch.zeros(2, 4), torch.ones(4)))
    assert not output.any()
    torch.testing.assert_close(grad_D, upstream_of(output) / 1e-5**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_bf16_errs_no_more_than_twice_plain_torch(seed, scale):
    """The truth is fp64 on the same bf16 numbers; torch's own fused norm is the measure."""
    hidden_D = draw((16, 4, 256), seed, torch.bfloat16, scale)
    weight_D = (1 + 0.2 * draw((256,), seed + 1)).bfloat16()

    def check(ours, plain, exact, inputs):
        truth = run(exact, [value.double() for value in inputs])
        for one, other, right in zip(run(ours, inputs), run(plain, inputs), truth, strict=True):
            assert (one - right).norm() <= 2 * (other - right).norm() + 1e-6 * right.norm()

    check(swiglu, plain_swiglu, plain_swiglu, [hidden_D])
    check(
        lambda x, w: our_norm(x, w, 1e-5),
        lambda x, w: rms_norm(x, w.shape, w, 1e-5),
        lambda x, w: plain_norm(x, w, 1e-5),
        [hidden_D, weight_D],
    )
