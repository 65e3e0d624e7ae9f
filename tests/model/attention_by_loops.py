"""Attention as a loop over tokens in fp64, and rows to try it on; shared by the tests of attention.

T row length, B rows, H query heads, G key/value groups, K head size.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_mode.model.attention import DocumentAttention

BASE = 10_000.0


def positions_of(starts_B: list[set[int]], length: int) -> Tensor:
    """Return positions [B, T] of rows in which documents start at 0 and at the given tokens."""
    rows = []
    for starts in starts_B:
        row: list[int] = []
        for t in range(length):
            row.append(0 if t == 0 or t in starts else row[-1] + 1)
        rows.append(row)
    return torch.tensor(rows)


def turn(x_TBHK: Tensor, position_BT: Tensor, base: float) -> Tensor:
    """Rotate by complex numbers: pair (i, i + K/2) times exp(1j * position * base^(-2i/K))."""
    half = x_TBHK.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_TB1I = position_BT.t().double()[:, :, None, None] * frequency
    x = torch.complex(x_TBHK[..., :half], x_TBHK[..., half:])
    x = x * torch.polar(torch.ones_like(angle_TB1I), angle_TB1I)
    return torch.cat((x.real, x.imag), dim=-1)


def attend_by_loops(query_TBHK, key_TBGK, value_TBGK, position_BT, scale=None):
    """Return [T, B, H*K] in fp64: each token over the tokens of its document up to itself."""
    T, B, H, K = query_TBHK.shape
    scale = 1 / math.sqrt(K) if scale is None else scale
    query = turn(query_TBHK.double(), position_BT, BASE)
    key = turn(key_TBGK.double(), position_BT, BASE)
    value = value_TBGK.double()
    rows = []
    for t in range(T):
        for b in range(B):
            start = t - int(position_BT[b, t])
            for h in range(H):
                g = h // (H // key.shape[2])
                score_S = key[start : t + 1, b, g] @ query[t, b, h] * scale
                rows.append(torch.softmax(score_S, 0) @ value[start : t + 1, b, g])
    return torch.stack(rows).view(T, B, H * K)


def draw(T, B, H, G, K, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, B, H, K), (T, B, G, K), (T, B, G, K))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def core(scale=None, *, recomputes=False) -> DocumentAttention:
    return DocumentAttention(SimpleNamespace(softmax_scale=scale, recompute_attention=recomputes))


def outputs_and_gradients(output_TBX, inputs):
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output_TBX.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(output_TBX, inputs, upstream.to(output_TBX.dtype))
    return [value.detach().double() for value in (output_TBX, *gradients)]


def assert_equals_loops(inputs, position_BT, *, context, scale=None, bound):
    found = outputs_and_gradients(core(scale)(*inputs, context), inputs)
    wide = [value.detach().double().requires_grad_() for value in inputs]
    truth = outputs_and_gradients(attend_by_loops(*wide, position_BT, scale), wide)
    for one, other in zip(found, truth, strict=True):
        assert (one - other).abs().max() <= bound * max(1.0, float(other.abs().max()))
