"""Attend inside documents: rotary positions, then a core that stops at document borders.

T row length, B rows, H query heads, G key/value groups, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_mode.model.attention_cores import AttentionCore, CoreName, attention_core


class AttentionContext(NamedTuple):
    """Hold what every layer of a stage needs beside the hidden states; built once a micro-batch."""

    cos_TB1K: Tensor
    sin_TB1K: Tensor
    core: AttentionCore


def attention_context(
    position_BT: Tensor,
    head_size: int,
    rope_base: float,
    dtype: torch.dtype,
    core: CoreName = "dense",
) -> AttentionContext:
    """Derive rotary tables and the attention core of that name from positions alone.

    `sin` carries the sign of rotate_half (RoFormer, eq. 34) in its first half, which saves a
    negation in each layer. Angles are taken in fp32 whatever `dtype` is.
    """
    half = torch.arange(0, head_size, 2, device=position_BT.device, dtype=torch.float32)
    frequency_K2 = rope_base ** (-half / head_size)
    angle_TBK2 = position_BT.t().unsqueeze(-1).float() * frequency_K2
    cos_TBK2, sin_TBK2 = angle_TBK2.cos(), angle_TBK2.sin()
    cos_TB1K = torch.cat((cos_TBK2, cos_TBK2), dim=-1).unsqueeze(2).to(dtype)
    sin_TB1K = torch.cat((-sin_TBK2, sin_TBK2), dim=-1).unsqueeze(2).to(dtype)
    return AttentionContext(cos_TB1K, sin_TB1K, attention_core(core, position_BT, dtype))


class Rotate(torch.autograd.Function):
    """Rotate pairs of features by position; the gradient is the rotation back.

    Written out because autograd's own graph would keep two more copies of queries and keys alive.
    """

    @staticmethod
    def forward(ctx: Any, features_TBHK: Tensor, cos_TB1K: Tensor, sin_TB1K: Tensor) -> Tensor:
        """Rotate [T, B, H, K] by tables [T, B, 1, K]."""
        ctx.save_for_backward(cos_TB1K, sin_TB1K)
        return rotate(features_TBHK, cos_TB1K, sin_TB1K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Rotate the gradient by the opposite angles."""
        cos_TB1K, sin_TB1K = ctx.saved_tensors
        return rotate(grads[0], cos_TB1K, -sin_TB1K), None, None


turn = cast(Callable[..., Tensor], Rotate.apply)


def rotate(features_TBHK: Tensor, cos_TB1K: Tensor, sin_TB1K: Tensor) -> Tensor:
    """Return features * cos + swap_halves(features) * signed sin."""
    half = features_TBHK.shape[-1] // 2
    rotated_TBHK = features_TBHK * cos_TB1K
    rotated_TBHK[..., :half].addcmul_(features_TBHK[..., half:], sin_TB1K[..., :half])
    rotated_TBHK[..., half:].addcmul_(features_TBHK[..., :half], sin_TB1K[..., half:])
    return rotated_TBHK


class DocumentAttention(nn.Module):
    """Serve as megatron-core's core attention: rotary positions and document-aware attention.

    megatron-core hands `attention_mask` through untouched; here it is the AttentionContext. With
    `config.recompute_attention` nothing between queries, keys, values and the result is kept for
    the backward pass (selective recomputation: Korthikanti et al., 2022, section 5).
    """

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.scale = config.softmax_scale
        self.recomputes = config.recompute_attention

    def forward(
        self, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, context: Any, /, **_: Any
    ) -> Tensor:
        """Return attended values [T, B, H*K]."""
        if not self.recomputes:
            return self.attend(query_TBHK, key_TBGK, value_TBGK, context)
        inputs = (query_TBHK, key_TBGK, value_TBGK, context)
        # Nothing is drawn inside, so there is no random state to keep.
        attended: Tensor = checkpoint(
            self.attend, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        return attended

    def attend(
        self, query_TBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, context: AttentionContext
    ) -> Tensor:
        """Turn queries and keys by their positions, then attend inside documents."""
        tables = (context.cos_TB1K, context.sin_TB1K)
        query_TBHK, key_TBGK = turn(query_TBHK, *tables), turn(key_TBGK, *tables)
        return context.core(query_TBHK, key_TBGK, value_TBGK, self.scale)
