"""Judge the ways to attend on a GPU against fp64. Never run on a GPU so far: `make gpu-check`.

T row length, B rows, H query heads, G key/value groups, K head size.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from megatron_mode.model.attention import DocumentAttention, attention_context

pytestmark = pytest.mark.gpu

EPSILON = {torch.float32: 4e-6, torch.bfloat16: 4e-3}
HAS_FLASH = importlib.util.find_spec("flash_attn") is not None


def positions(rows, length, mean_tokens, seed=0):
    """Return positions [B, T] of rows of random documents."""
    generator = torch.Generator().manual_seed(seed)
    starts_BT = torch.rand(rows, length, generator=generator) < 1 / mean_tokens
    starts_BT[:, 0] = True
    number_T = torch.arange(length)
    return number_T - torch.where(starts_BT, number_T, 0).cummax(dim=1).values


def draw(rows, length, heads, groups, head_size):
    generator = torch.Generator().manual_seed(1)
    sizes = (heads, groups, groups, heads)
    return [torch.randn(length, rows, n, head_size, generator=generator) for n in sizes]


def attend(core, drawn, position_BT, dtype, *, recomputes=False):
    """Return the output and the gradients of queries, keys and values on the GPU."""
    *inputs, upstream = [x.to("cuda", dtype) for x in drawn]
    inputs = [x.requires_grad_() for x in inputs]
    context = attention_context(position_BT.cuda(), drawn[0].shape[-1], 1e4, dtype, core=core)
    layer = DocumentAttention(SimpleNamespace(softmax_scale=None, recompute_attention=recomputes))
    output = layer(*inputs, context)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.flatten(2))]


def error(value, truth):
    return float((value.cpu().double() - truth.cpu()).norm() / truth.cpu().norm())


def check(core, dtype, rows, length, heads, groups, head_size, mean_tokens, *, recomputes=False):
    drawn = draw(rows, length, heads, groups, head_size)
    position_BT = positions(rows, length, mean_tokens)
    truth = attend("dense", drawn, position_BT, torch.float64)
    dense = attend("dense", drawn, position_BT, dtype)
    found = attend(core, drawn, position_BT, dtype, recomputes=recomputes)
    worst = 0.0
    for value, other, expected in zip(found, dense, truth, strict=True):
        bound = 2 * error(other, expected) + EPSILON[dtype]
        worst = max(worst, error(value, expected) / bound)
    assert worst <= 1
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 512, 4, 4, 64, 100),
        (1, 1000, 6, 2, 48, 7),
        (3, 257, 8, 1, 128, 1000),
        (1, 64, 2, 2, 16, 3),
    ],
)
def test_flex_is_as_good_as_dense(sizes, recomputes, dtype, figure):
    torch.set_float32_matmul_precision("highest")  # no TF32 in fp32 products
    worst = check("flex", dtype, *sizes, recomputes=recomputes)
    figure(f"flex {dtype} {sizes} recomputes={recomputes}: worst error, share of its bound", worst)


@pytest.mark.parametrize("sizes", [(2, 512, 4, 4, 64, 100), (3, 257, 8, 1, 128, 1000)])
def test_flash_is_as_good_as_dense_where_it_is_installed(sizes, figure):
    if not HAS_FLASH:
        figure("flash-attention", "not installed, not run")
        pytest.skip("flash-attention is not installed")
    worst = check("flash", torch.bfloat16, *sizes)
    figure(f"flash {sizes}: worst error, share of its bound", worst)


def peak_bytes(core, length, *, recomputes=False):
    drawn, position_BT = draw(1, length, 8, 8, 64), positions(1, length, 500)
    attend(core, drawn, position_BT, torch.bfloat16, recomputes=recomputes)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(core, drawn, position_BT, torch.bfloat16, recomputes=recomputes)
    return torch.cuda.max_memory_allocated() - before


def test_flex_needs_no_memory_of_t_squared(figure):
    """A bf16 mask of one row of 32,768 tokens alone takes 2 GiB."""
    short, long = (peak_bytes("flex", length) for length in (8192, 32768))
    figure("flex, T 8192 and 32768: peak MiB", f"{short / 2**20:.0f}, {long / 2**20:.0f}")
    assert long <= 5 * short
    assert long < 32768**2


def kept_bytes(recomputes):
    """Return what the forward pass of one layer's attention keeps beside its inputs and output."""
    drawn, position_BT = draw(2, 4096, 16, 16, 64), positions(2, 4096, 500)
    inputs = [x.to("cuda", torch.bfloat16).requires_grad_() for x in drawn[:3]]
    context = attention_context(position_BT.cuda(), 64, 1e4, torch.bfloat16, core="flex")
    layer = DocumentAttention(SimpleNamespace(softmax_scale=None, recompute_attention=recomputes))
    layer(*inputs, context)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = layer(*inputs, context)
    return torch.cuda.memory_allocated() - before - output.nbytes


def test_selective_recomputation_keeps_less(figure):
    whole, selective = kept_bytes(False), kept_bytes(True)
    kept = f"{whole / 2**20:.1f}, {selective / 2**20:.1f}"
    figure("attention's insides kept, none and selective: MiB", kept)
    assert selective < whole
